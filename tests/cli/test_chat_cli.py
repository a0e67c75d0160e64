"""`agentmem chat` in a real terminal, and from a pipe, against real servers on a tiny model."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from support.server_process import ServerProcess
from support.terminal import CTRL_C, CTRL_D, UP, Terminal
from support.tiny import BLOCK, random_tokens
from support.tiny_model_dir import write_tiny_model

FLAGS = ("--block-size", str(BLOCK), "--prefill-chunk", "64", "--tail-delay", "0.05")
LONG = 400  # tokens of every answer: long enough to be stopped
COST = (
    r"(cold|warm|hot), ([\d,]+) of ([\d,]+) tokens cached, [\d,]+ ms to the first token, "
    r"([\d,]+) tokens at [\d.]+/s"
)


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
    plain = {
        k: v for k, v in os.environ.items() if not k.startswith("AGENTMEM_") and k != "NO_COLOR"
    }
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
    """Return where the cache of an answer that ended was, and three numbers of tokens.

    They are those that were cached, those of the prompt, and those of the answer.
    """
    cache, *numbers = terminal.until(COST).groups()
    return cache, *(int(number.replace(",", "")) for number in numbers)


def transcript(server: ServerProcess, agent: str) -> list[dict]:
    response = server.client.get(f"/agents/{agent}/transcript")
    return response.json()["messages"] if response.status_code == 200 else []


def metric(server: ServerProcess, name: str) -> float:
    text = server.client.get(server.url.removesuffix("/v1") + "/metrics").text
    return float(re.search(rf"^{name} (\S+)$", text, re.M)[1])


def test_two_turns_a_stopped_answer_a_restart_of_the_server_and_a_third_turn_that_is_cached(
    model, tmp_path, chat
):
    tokens = "agentmem_inter_token_seconds_count"
    home = tmp_path / "served"
    with (
        ServerProcess(home, *FLAGS, model=model) as server,
        chat(server.url, "line", "--max-tokens", LONG) as terminal,
    ):
        terminal.until("line is new.*\n.*line> ")
        terminal.line(words(40, 1))
        assert figures(terminal) == ("cold", 0, 45, LONG)
        terminal.until("line> ")
        terminal.line(words(10, 2))
        assert figures(terminal) == ("hot", 45 + LONG - 1, 45 + LONG + 16, LONG)
        terminal.until("line> ")

        terminal.line(words(10, 3))
        terminal.until(r"\n *\w+ ")
        terminal.type(CTRL_C)
        kept = int(
            terminal.until(r"stopped: kept as far as it came, ([\d,]+) tokens")[1].replace(",", "")
        )
        terminal.until("line> ")
        generated = metric(server, tokens)
        assert metric(server, "agentmem_running_requests") == 0 and generated < 3 * (LONG - 1)
        time.sleep(0.2)
        assert metric(server, tokens) == generated
        assert server.stop() == 0
        terminal.line(words(10, 4))
        terminal.until("no server answers at .*\n.*Enter sends your line again.*\nline> ")

        port = server.url.removesuffix("/v1").rpartition(":")[2]
        with ServerProcess(home, *FLAGS, "--port", port, model=model) as server:
            terminal.line("")
            cache, cached, prompt, _ = figures(terminal)
            assert (cache, prompt) == ("warm", kept + 15)
            assert cached >= kept - 2
            said = transcript(server, "line")
            assert [m["content"] for m in said[::2]] == [
                words(40, 1),
                words(10, 2),
                words(10, 3),
                words(10, 4),
            ]
            assert 0 < len(said[5]["content"]) < len(said[3]["content"])
            terminal.line("/quit")
            assert terminal.ends() == 0


def test_a_chat_resumes_forks_takes_instructions_and_shows_what_is_held(server, chat, environment):
    with chat(server.url, "one", "--max-tokens", 4, "--system", "w9 w9") as terminal:
        terminal.line("w20 \\")
        terminal.until(r"\.\.\. ")
        terminal.line("w21")
        figures(terminal)
        terminal.line("/nothing")
        terminal.until("there is no /nothing")
        terminal.line("/fork")
        terminal.until("usage: /fork NAME.*\n+one> ")
        terminal.line("/fork two")
        terminal.until("two goes on from here\n+two> ")
        terminal.line("/system w11")
        terminal.line(" /help w22")
        figures(terminal)
        terminal.line("/stats")
        terminal.until(
            r"two: hot, \d+ tokens, 1 branch, [\d.]+ KB in RAM, .*\n"
            r"this chat: \d+ of \d+ .* 2 answers"
        )
        terminal.line("/help")
        terminal.until("/quit +leave[^>]*two> ")
        terminal.type(CTRL_D)
        assert terminal.ends() == 0
    said = [(m["role"], m["content"]) for m in transcript(server, "two")]
    assert [text for role, text in said if role != "assistant"] == [
        "w9 w9",
        "w20 \nw21",
        "w11",
        "/help w22",
    ]
    assert len(transcript(server, "one")) == 3

    history = Path(environment["AGENTMEM_HOME"]) / "chat_history"
    assert (
        history.stat().st_mode & 0o777 == 0o600 and history.parent.stat().st_mode & 0o777 == 0o700
    )
    with chat(server.url, "two", "--system", "w11") as terminal:  # which holds already
        terminal.until(r"two: 2 turns, \d+ tokens, hot.*\nuser: /help w22\ntwo: assistant.*\ntwo> ")
        terminal.type(UP)
        terminal.until("/help$")
        time.sleep(
            0.3
        )  # Python does not see a Ctrl-C that comes while readline draws a line, until the next key
        terminal.type(CTRL_C)
        assert terminal.ends() == 0
    assert len(transcript(server, "two")) == len(said)


def test_what_is_pasted_is_one_message_whatever_its_lines(server, chat):
    with chat(server.url, "paste", "--max-tokens", 4) as terminal:
        terminal.until("paste> ")
        assert b"\x1b[?2004h" in terminal.raw  # without it a terminal types the lines one by one
        terminal.line("\x1b[200~w20 w21\nw22\n\nw23\x1b[201~")
        figures(terminal)
        assert questions(server, "paste") == ["w20 w21\nw22\n\nw23"]


@contextmanager
def halted(server: ServerProcess) -> Iterator[None]:
    server.process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        server.process.send_signal(signal.SIGCONT)


def questions(server: ServerProcess, agent: str) -> list[str]:
    return [
        message["content"] for message in transcript(server, agent) if message["role"] == "user"
    ]


def test_a_question_stopped_before_its_answer_began_was_never_asked(server, chat):
    with chat(server.url, "early", "--max-tokens", 4) as terminal:
        terminal.line("w29")
        figures(terminal)
        with halted(server):
            terminal.line("w30 w31")
            time.sleep(0.5)
            terminal.type(CTRL_C)
            terminal.until("nothing was said\nearly> ")
        terminal.line("")
        terminal.until("early> ")
        terminal.line(f"{UP} w32")
        figures(terminal)
        assert questions(server, "early") == ["w29", "w30 w31 w32"]


def test_a_stopped_answer_that_the_server_cannot_be_told_of_goes_with_the_next_question(
    server, chat
):
    with chat(server.url, "later", "--max-tokens", LONG) as terminal:
        terminal.until("later> ")
        terminal.line("w29")
        terminal.until(r"\n *\w+ ")
        with halted(server):
            time.sleep(0.5)
            terminal.type(CTRL_C)
            time.sleep(0.5)
            terminal.type(CTRL_C)
            terminal.until("goes to the server with the next message.*\nlater> ")
        terminal.line("w30")
        figures(terminal)
        assert questions(server, "later") == ["w29", "w30"]
        assert [message["role"] for message in transcript(server, "later")] == [
            "user",
            "assistant",
        ] * 2


def test_an_answer_lost_with_its_server_is_asked_again_and_is_in_the_conversation_once(
    model, tmp_path, chat
):
    home = tmp_path / "served"
    with (
        ServerProcess(home, *FLAGS, model=model) as server,
        chat(server.url, "lost", "--max-tokens", LONG) as terminal,
    ):
        terminal.until("lost> ")
        terminal.line("w40")
        terminal.until(r"\n *\w+ ")
        server.stop(signal.SIGKILL)
        terminal.until("went away before its answer was whole\n.*Enter sends.*\nlost> ")
        port = server.url.removesuffix("/v1").rpartition(":")[2]
        with ServerProcess(home, *FLAGS, "--port", port, model=model) as server:
            terminal.line("")
            figures(terminal)
            assert questions(server, "lost") == ["w40"]


def piped(
    environment: dict[str, str], url: str, text: str, *options: str
) -> subprocess.CompletedProcess:
    command = [
        sys.executable,
        "-m",
        "agentmem",
        "chat",
        "--url",
        url,
        "--temperature",
        "0",
        *options,
    ]
    return subprocess.run(
        command, env=environment, input=text, capture_output=True, text=True, timeout=60
    )


def test_piped_lines_are_answered_without_decoration_and_an_error_ends_it(server, environment):
    done = piped(
        environment, server.url, "w50\n\n/fork b\nw51\n", "--agent", "a", "--max-tokens", "3"
    )
    answers = [m["content"] for m in transcript(server, "b") if m["role"] == "assistant"]
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [answers[0], "b goes on from here", answers[1]]
    assert not Path(environment["AGENTMEM_HOME"]).exists()
    done = piped(
        environment,
        server.url,
        f"w50\n{words(9000, 1)}\nw51\n",
        "--agent",
        "c",
        "--max-tokens",
        "3",
    )
    assert (done.returncode, done.stdout.count("\n")) == (1, 1)
    assert re.fullmatch("agentmem: .*maximum context length.*\n", done.stderr)
    done = piped(environment, "http://127.0.0.1:1", "w50\n")
    assert done.returncode == 2 and "no server answers" in done.stderr


def test_a_terminal_without_unicode_shows_what_it_can(server, chat, environment):
    environment["PYTHONIOENCODING"] = "ascii"
    with chat(server.url, "é", "--max-tokens", 2) as terminal:
        terminal.until(r"\? is new.*\n.*\?> ")
        terminal.line("w9 é")
        terminal.until(r"cold, 0 of \d+ tokens cached")


class Reasons(BaseHTTPRequestHandler):
    """Reasons, answers with a control character, and, the second time, fails on the way."""

    asked = 0

    def do_GET(self):
        self._send(404, {"error": {"message": "none yet", "code": "transcript_not_found"}})

    def do_POST(self):
        type(self).asked += 1
        deltas = [{"reasoning_content": "because"}, {"content": "so\x1b[2J it is"}]
        events = [{"choices": [{"delta": delta, "finish_reason": None}]} for delta in deltas]
        cost = {"cache": "cold", "cached_tokens": 0, "ttft_ms": 1.5, "turn": "t1"}
        end = {
            "choices": [],
            "agentmem": cost,
            "usage": {"prompt_tokens": 9, "completion_tokens": 2},
        }
        failed = {"error": {"message": "out of luck", "code": "server_error"}}
        self._send(200, *events, failed if self.asked == 2 else end)

    def _send(self, status, *events):
        self.send_response(status)
        kind = "application/json" if status == 404 else "text/event-stream"
        self.send_header("content-type", kind)
        self.end_headers()
        self.wfile.write(
            b"".join(
                (b"" if status == 404 else b"data: ") + json.dumps(e).encode() + b"\n\n"
                for e in events
            )
        )

    def log_message(self, *_):
        pass


class Greets(Reasons):
    """Knows transcripts, and greets whoever says something."""

    def do_POST(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"<p>hello</p>")


@contextmanager
def served_by(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as other:
        thread = threading.Thread(target=other.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{other.server_port}"
        other.shutdown()
        thread.join()


@pytest.fixture
def reasons():
    with served_by(Reasons) as url:
        yield url


def test_an_answer_that_is_no_stream_of_events_is_told_apart(environment):
    with served_by(Greets) as url:
        done = piped(environment, url, "hello\n")
    assert (done.returncode, done.stdout) == (1, "")
    assert "no stream of events: is this an agentmem server?" in done.stderr


def test_reasoning_is_dim_control_characters_are_dropped_and_an_error_in_a_stream_is_a_message(
    reasons, chat
):
    with chat(reasons, "r") as terminal:
        terminal.until("r> ")
        terminal.line("why?")
        terminal.until(
            r"because\n+so\[2J it is\ncold, 0 of 9 tokens cached, 2 ms to the first token, 2 tokens"
        )
        assert b"\x1b[2mbecause\x1b[0m" in terminal.raw and b"\x1b[2mso" not in terminal.raw
        terminal.until("r> ")
        terminal.line("why?")
        terminal.until("out of luck\n.*Enter sends.*\nr> ")
        terminal.line("")
        terminal.until("cold, 0 of 9")
