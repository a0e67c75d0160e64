"""`agentmem chat` in a real terminal, and from a pipe, against real servers on a tiny model."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from server_process import ServerProcess
from terminal import CLEAR_LINE, CTRL_C, CTRL_D, Terminal
from tiny import BLOCK, random_tokens
from tiny_model_dir import write_tiny_model

FLAGS = ("--block-size", str(BLOCK), "--prefill-chunk", "64", "--tail-delay", "0.05")
LONG = 200  # tokens of every answer: long enough to be stopped
COST = r"(cold|warm|hot), ([\d,]+) of ([\d,]+) tokens cached, [\d,]+ ms to the first token, ([\d,]+) tokens at [\d.]+/s"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny", max_context=8192)


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    with ServerProcess(tmp_path_factory.mktemp("server") / "home", *FLAGS, model=model) as server:
        yield server
        assert server.stop() == 0


@pytest.fixture
def environment(tmp_path) -> dict[str, str]:
    plain = {k: v for k, v in os.environ.items() if not k.startswith("AGENTMEM_") and k != "NO_COLOR"}
    return plain | {"AGENTMEM_HOME": str(tmp_path / "home")}


@pytest.fixture
def chat(environment) -> Callable[..., Terminal]:
    def start(url: str, agent: str, *options: object) -> Terminal:
        options = ("--agent", agent, "--url", url, "--temperature", "0", *map(str, options))
        return Terminal("chat", *options, environment=environment)

    return start


def words(n: int, seed: int) -> str:
    return " ".join(f"w{token}" for token in random_tokens(n, seed))


def figures(terminal: Terminal) -> tuple[str, int, int, int]:
    """Of an answer that ended: where its cache was, tokens cached, tokens of the prompt, tokens of the answer."""
    cache, *numbers = terminal.until(COST).groups()
    return cache, *(int(number.replace(",", "")) for number in numbers)


def transcript(server: ServerProcess, agent: str) -> list[dict]:
    response = server.client.get(f"/agents/{agent}/transcript")
    return response.json()["messages"] if response.status_code == 200 else []


def metric(server: ServerProcess, name: str) -> float:
    text = server.client.get(server.url.removesuffix("/v1") + "/metrics").text
    return float(re.search(rf"^{name} (\S+)$", text, re.M)[1])


def test_two_turns_a_stopped_answer_a_restart_of_the_server_and_a_third_turn_that_is_cached(model, tmp_path, chat):
    tokens = "agentmem_inter_token_seconds_count"
    home = tmp_path / "served"
    with ServerProcess(home, *FLAGS, model=model) as server, chat(server.url, "line", "--max-tokens", LONG) as terminal:
        terminal.until("line is new.*\n.*line> ")
        terminal.line(words(40, 1))
        assert figures(terminal) == ("cold", 0, 45, LONG)
        terminal.until("line> ")
        terminal.line(words(10, 2))
        assert figures(terminal) == ("hot", 45 + LONG - 1, 45 + LONG + 16, LONG)
        terminal.until("line> ")

        terminal.line(words(10, 3))
        terminal.until("\n *assistant")
        terminal.type(CTRL_C)
        kept = int(terminal.until(r"stopped: kept as far as it came, ([\d,]+) tokens")[1].replace(",", ""))
        terminal.until("line> ")
        generated = metric(server, tokens)
        assert metric(server, "agentmem_running_requests") == 0 and generated < 3 * (LONG - 1)
        time.sleep(0.2)
        assert metric(server, tokens) == generated
        assert server.stop() == 0
        terminal.line(words(10, 4))
        terminal.until("no server answers at .*\n.*Your line is kept")
        terminal.until(f"line> {words(10, 4)}")

        port = server.url.removesuffix("/v1").rpartition(":")[2]
        with ServerProcess(home, *FLAGS, "--port", port, model=model) as server:
            terminal.line("")
            cache, cached, prompt, _ = figures(terminal)
            assert (cache, prompt) == ("warm", kept + 15)
            assert cached >= kept - 2
            said = transcript(server, "line")
            assert [m["content"] for m in said[::2]] == [words(40, 1), words(10, 2), words(10, 3), words(10, 4)]
            assert 0 < len(said[5]["content"]) < len(said[3]["content"])
            terminal.line("/quit")
            assert terminal.ends() == 0
