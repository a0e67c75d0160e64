"""An agentmem server for a benchmark: a process of its own, on a store of its own, over HTTP."""

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
from httpx_sse import SSEError

from ...client import read_events
from ...config import Settings
from ...errors import AgentMemError
from .session import Session

WARM_UP = 64  # prompt tokens that warm a server up
ChatMessages = list[dict[str, str]]
_THREADS = 256  # at most; as many sequences as a server decodes at once
# what a server is not told of a benchmark's settings: where it listens, whom it knows, what it
# serves
_OWN_SETTINGS = {"model", "home", "host", "port", "api_keys", "allowed_hosts", "trace"}


class BenchError(AgentMemError):
    """A server did what the benchmark can't go on with."""


class Server:
    """A server that is started at once and ready when the constructor returns.

    `home` keeps its store over restarts.
    """

    def __init__(self, session: Session, settings: Settings, model: Path, home: Path, *flags: str):
        self._session = session
        home.mkdir(parents=True, exist_ok=True)
        self.log = home / "server.log"
        command = [sys.executable, "-m", "agentmem", "serve", *_flags(settings), *flags]
        command += ["--model", str(model), "--home", str(home)]
        command += ["--host", "127.0.0.1", "--port", "0"]
        environment = {k: v for k, v in os.environ.items() if k != "AGENTMEM_API_KEYS"}
        self.process = session.start(command, self.log, stdout=subprocess.PIPE, env=environment)
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("Ready: "):
                self.url = line.split()[1]
                break
        else:
            ended = self.process.wait()
            raise BenchError(f"the server ended with {ended}: {last_line(self.log)}")
        self.client = connect(self.url)

    def post(self, path: str, **body: Any) -> dict[str, Any]:
        """Post to `path`, which comes after /v1. Raises BenchError unless the status is 200."""
        return self._call("POST", path, json=body)

    def delete(self, path: str) -> dict[str, Any]:
        return self._call("DELETE", path)

    def _call(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        response = self.client.request(method, path, **options)
        if response.status_code != 200:
            raise BenchError(f"{path}: {response.status_code} {response.text[:300]}")
        answer: dict[str, Any] = response.json()
        return answer

    def ask(
        self, agent: str, messages: ChatMessages, max_tokens: int, **body: Any
    ) -> "TimedAnswer":
        """Return a greedy answer of exactly `max_tokens`."""
        answer = ask(self.client, messages, max_tokens, agent_id=agent, ignore_eos=True, **body)
        got = answer.usage["completion_tokens"]
        if got != max_tokens:
            raise BenchError(
                f"an answer of {got} tokens, not {max_tokens}: does the context hold them?"
            )
        return answer

    @contextmanager
    def threads(self) -> Iterator[ThreadPoolExecutor]:
        """Give threads for requests at the same time.

        Where one fails, or the user interrupts, nobody waits for the others.
        """
        with ThreadPoolExecutor(_THREADS) as pool:
            try:
                yield pool
            except BaseException:
                self.process.kill()  # ends their requests
                self.process.wait()
                self.stop()
                raise

    def warm_up(self, messages: ChatMessages, max_tokens: int = 2) -> None:
        """Let an agent of its own take a cold prefill and a restore from disk."""
        self.ask("warm-up", messages, max_tokens)
        self.post("/agents/warm-up/evict")
        self.ask("warm-up", messages, max_tokens)

    def stop(self, signal_number: int = signal.SIGTERM) -> None:
        """Stop it as an administrator would; `signal.SIGKILL`: as a crash."""
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
class TimedAnswer:
    """A streamed answer, timed by the client."""

    began: float = field(default_factory=time.perf_counter)
    ttft_ms: float = 0.0  # from before the request to the first text
    total_ms: float = 0.0
    times: list[float] = field(default_factory=list)  # s after the request, of each text chunk
    text: str = ""
    usage: dict[str, Any] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)  # the `agentmem` object

    @property
    def prompt_tokens(self) -> int:
        return int(self.usage["prompt_tokens"])

    @property
    def cached_tokens(self) -> int:
        return int((self.usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0)

    @property
    def ended(self) -> float:
        """The moment when it was whole, as time.perf_counter() tells it."""
        return self.began + self.total_ms / 1e3


def connect(url: str, *, proxies: bool = False) -> httpx.Client:
    """Return a client for any number of requests at once; an answer may take its time."""
    return httpx.Client(
        base_url=url,
        timeout=httpx.Timeout(10.0, read=None),
        limits=httpx.Limits(max_connections=None),
        trust_env=proxies,
    )


def ask(
    client: httpx.Client,
    messages: ChatMessages,
    max_tokens: int,
    *,
    may_be_empty: bool = False,
    **body: Any,
) -> TimedAnswer:
    """Return a whole greedy answer of any OpenAI-compatible server.

    Raises BenchError, httpx.HTTPError.
    """
    answer = TimedAnswer()
    for grown in stream(client, messages, max_tokens, **body):
        answer = grown
    answer.total_ms = (time.perf_counter() - answer.began) * 1e3
    if not answer.usage or not (answer.times or may_be_empty):
        raise BenchError(f"{client.base_url} sent no text or no usage; a benchmark needs both")
    answer.ttft_ms = answer.times[0] * 1e3 if answer.times else answer.total_ms
    return answer


def stream(
    client: httpx.Client, messages: ChatMessages, max_tokens: int, **body: Any
) -> Generator[TimedAnswer, None, None]:
    """Yield the same answer as it grows; who stops reading hangs up."""
    asked = {
        "messages": messages,
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        **body,
        "stream_options": {"include_usage": True},
    }
    answer = TimedAnswer()
    with client.stream("POST", "/chat/completions", json=asked) as response:
        if response.status_code != 200:
            said = response.read().decode()[:300]
            raise BenchError(f"{response.url}: {response.status_code} {said}")
        try:
            for chunk in read_events(response):
                _take(answer, chunk, time.perf_counter() - answer.began)
                yield answer
        except SSEError as e:
            raise BenchError(f"{response.url}: {e}") from None


def shares(answers: Sequence[TimedAnswer]) -> tuple[list[float], float]:
    """Return what part of each answer came while all of them streamed, and the s that they did.

    The time is 0 where they never did.
    """
    start = max(answer.began + answer.times[0] for answer in answers)
    stop = min(answer.began + answer.times[-1] for answer in answers)
    parts = []
    for answer in answers:
        within = sum(start < answer.began + t <= stop for t in answer.times)
        parts.append(within / len(answer.times))
    return parts, max(0.0, stop - start)


def tokens_per_s(answers: Sequence[TimedAnswer]) -> float | None:
    """Return the rate of all together while all of them stream; None if they never do.

    A chunk counts as its answer's mean.
    """
    parts, seconds = shares(answers)
    tokens = sum(
        part * a.usage["completion_tokens"] for part, a in zip(parts, answers, strict=True)
    )
    return float(tokens / seconds) if seconds else None


def check_state(answer: TimedAnswer, state: str) -> None:
    """Raise BenchError unless all of the prompt (or, cold, nothing) was cached.

    A prompt's last token never is.
    """
    cached = 0 if state == "cold" else answer.prompt_tokens - 1
    if answer.details["cache"] != state or answer.cached_tokens != cached:
        raise BenchError(
            f"{answer.details['cache']} with {answer.cached_tokens} tokens cached, "
            f"not {state} with {cached}"
        )


def _take(answer: TimedAnswer, chunk: dict[str, Any], moment: float) -> None:
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
    """Return options of `serve` for what was set, besides _OWN_SETTINGS."""
    flags = []
    for name in settings.model_fields_set - _OWN_SETTINGS:
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
