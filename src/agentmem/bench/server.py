"""An agentmem server for a benchmark: a process of its own, on a store of its own, asked over HTTP."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from ..config import Settings
from ..errors import AgentMemError
from .session import Session

WARM_UP = 64  # prompt tokens that warm a server up
Messages = list[dict[str, str]]
_THREADS = 256  # at most; as many sequences as a server decodes at once


class BenchError(AgentMemError):
    """A server did what the benchmark can't go on with."""


class Server:
    """Started at once; returns when it is ready. `home` keeps its store over restarts."""

    def __init__(self, session: Session, settings: Settings, model: Path, home: Path, *flags: str):
        self._session = session
        home.mkdir(parents=True, exist_ok=True)
        self.log = home / "server.log"
        command = [sys.executable, "-m", "agentmem.cli.main", "serve", *_flags(settings), *flags]
        command += [
            "--model",
            str(model),
            "--home",
            str(home),
            "--host",
            "127.0.0.1",
            "--port",
            "0",
        ]
        environment = {k: v for k, v in os.environ.items() if k != "AGENTMEM_API_KEYS"}
        self.process = session.start(command, self.log, stdout=subprocess.PIPE, env=environment)
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("Ready: "):
                self.url = line.split()[1]
                break
        else:
            raise BenchError(f"the server ended with {self.process.wait()}: {last_line(self.log)}")
        self.client = connect(self.url)

    def post(self, path: str, **body: Any) -> dict[str, Any]:
        """`path` after /v1."""
        return self._call("POST", path, json=body)

    def delete(self, path: str) -> dict[str, Any]:
        return self._call("DELETE", path)

    def _call(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        response = self.client.request(method, path, **options)
        if response.status_code != 200:
            raise BenchError(f"{path}: {response.status_code} {response.text[:300]}")
        answer: dict[str, Any] = response.json()
        return answer

    def ask(self, agent: str, messages: Messages, max_tokens: int, **body: Any) -> "Answer":
        """Greedy, of exactly `max_tokens`."""
        answer = ask(self.client, messages, max_tokens, agent_id=agent, ignore_eos=True, **body)
        if (got := answer.usage["completion_tokens"]) != max_tokens:
            raise BenchError(
                f"an answer of {got} tokens, not {max_tokens}: does the context hold them?"
            )
        return answer

    @contextmanager
    def threads(self) -> Iterator[ThreadPoolExecutor]:
        """For requests at the same time. Where one fails, or the user interrupts, nobody waits for
        the others.
        """
        with ThreadPoolExecutor(_THREADS) as pool:
            try:
                yield pool
            except BaseException:
                self.process.kill()  # ends their requests
                self.process.wait()
                self.stop()
                raise

    def warm_up(self, messages: Messages, max_tokens: int = 2) -> None:
        """A cold prefill and a restore from disk, by an agent of its own."""
        self.ask("warm-up", messages, max_tokens)
        self.post("/agents/warm-up/evict")
        self.ask("warm-up", messages, max_tokens)

    def stop(self, signal_number: int = signal.SIGTERM) -> None:
        """As an administrator would; `signal.SIGKILL`: as a crash."""
        self.client.close()
        self.process.send_signal(signal_number)
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
        self._session.ended(self.process)

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.process.poll() is None:
            self.stop(signal.SIGKILL if kind else signal.SIGTERM)


@dataclass
class Answer:
    """A streamed answer, timed by the client."""

    began: float = field(default_factory=time.perf_counter)
    ttft_ms: float = 0.0  # from before the request to the first text
    total_ms: float = 0.0
    times: list[float] = field(default_factory=list)  # s after the request, of each chunk with text
    text: str = ""
    usage: dict[str, Any] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)  # the `agentmem` object

    @property
    def prompt_tokens(self) -> int:
        return int(self.usage["prompt_tokens"])

    @property
    def cached_tokens(self) -> int:
        return int((self.usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0)


def connect(url: str, *, proxies: bool = False) -> httpx.Client:
    """For any number of requests at once; an answer may take its time."""
    limits, timeout = httpx.Limits(max_connections=None), httpx.Timeout(10.0, read=None)
    return httpx.Client(base_url=url, timeout=timeout, limits=limits, trust_env=proxies)


def ask(
    client: httpx.Client,
    messages: Messages,
    max_tokens: int,
    *,
    may_be_empty: bool = False,
    **body: Any,
) -> Answer:
    """A whole greedy answer of any OpenAI-compatible server. Raises BenchError, httpx.HTTPError."""
    answer = [Answer(), *stream(client, messages, max_tokens, **body)][-1]
    answer.total_ms = (time.perf_counter() - answer.began) * 1e3
    if not answer.usage or not (answer.times or may_be_empty):
        raise BenchError(f"{client.base_url} sent no text or no usage; a benchmark needs both")
    answer.ttft_ms = answer.times[0] * 1e3 if answer.times else answer.total_ms
    return answer


def stream(
    client: httpx.Client, messages: Messages, max_tokens: int, **body: Any
) -> Generator[Answer, None, None]:
    """The same, as it grows; who stops reading hangs up."""
    body = {"messages": messages, "max_tokens": max_tokens, "temperature": 0, "stream": True} | body
    body |= {"stream_options": {"include_usage": True}}
    answer = Answer()
    with client.stream("POST", "/chat/completions", json=body) as response:
        if response.status_code != 200:
            raise BenchError(
                f"{response.url}: {response.status_code} {response.read().decode()[:300]}"
            )
        for line in response.iter_lines():
            if line.startswith("data: {"):
                _take(answer, json.loads(line[6:]), time.perf_counter() - answer.began)
                yield answer


def shares(answers: Sequence[Answer]) -> tuple[list[float], float]:
    """Of each answer, what part of it came while all of them streamed; and the seconds that they
    did, 0 if never.
    """
    streams = [[a.began + t for t in a.times] for a in answers]
    start, stop = max(times[0] for times in streams), min(times[-1] for times in streams)
    return [sum(start < t <= stop for t in times) / len(times) for times in streams], max(
        0.0, stop - start
    )


def tokens_per_s(answers: Sequence[Answer]) -> float | None:
    """Of all together while all of them stream; None if they never do. A chunk counts as its
    answer's mean.
    """
    parts, seconds = shares(answers)
    tokens = sum(
        part * a.usage["completion_tokens"] for part, a in zip(parts, answers, strict=True)
    )
    return float(tokens / seconds) if seconds else None


def check_state(answer: Answer, state: str) -> None:
    """Raises BenchError unless all of the prompt (or, cold, nothing) was cached: its last token
    never is.
    """
    cached = 0 if state == "cold" else answer.prompt_tokens - 1
    if answer.details["cache"] != state or answer.cached_tokens != cached:
        raise BenchError(
            f"{answer.details['cache']} with {answer.cached_tokens} tokens cached, not {state} with {cached}"
        )


def _take(answer: Answer, chunk: dict[str, Any], moment: float) -> None:
    if "error" in chunk:
        raise BenchError(f"an answer broke off: {chunk['error']}")
    for choice in chunk.get("choices") or []:
        delta = choice.get("delta") or {}
        text = delta.get("content") or delta.get("reasoning_content") or delta.get("reasoning")
        if text:
            answer.ttft_ms = answer.ttft_ms or moment * 1e3
            answer.times.append(moment)
            answer.text += text
    answer.usage = chunk.get("usage") or answer.usage
    answer.details = chunk.get("agentmem") or answer.details


def _flags(settings: Settings) -> list[str]:
    """What was set apart from where it listens, whom it knows and what it serves."""
    flags = []
    for name in settings.model_fields_set - {
        "model",
        "home",
        "host",
        "port",
        "api_keys",
        "allowed_hosts",
        "trace",
    }:
        value = getattr(settings, name)
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(flag if value else f"--no{flag[1:]}")
        elif value is not None:
            flags += [flag, str(value)]
    return flags


def last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it said nothing"
