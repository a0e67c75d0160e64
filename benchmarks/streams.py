"""Many concurrent streams over HTTP, a third of them cut by the client; then all must be quiet.

Each of 64 clients (--streams) opens one stream after another for --seconds: agents old and new,
prompts short and long. Cuts come at a random moment. A stream that was not cut must be complete:
role, content, finish_reason, usage of exactly max_tokens, [DONE]. After the last one running,
waiting and reserved bytes must return to zero, /health be ok, and the server hold no more file
descriptors than after a warm-up of the same kind. The model is a tiny llama of random weights,
whose tokens are words.

    python benchmarks/streams.py --seconds 120 --json benchmarks/results/streams-tiny.json
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import shlex
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import httpx
from httpx_sse import EventSource
from prometheus_client.parser import text_string_to_metric_families

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from machine import describe_machine, write_result

from support.server_process import ServerProcess
from support.tiny_model_dir import write_tiny_model

SERVER_FLAGS = shlex.split("--block-size 32 --prefill-chunk 64 --max-running 16 --max-queue 256")
QUIET_S = 10.0  # within which everything must have returned to zero
_PATIENCE_S = 60.0  # without a byte: longer than any queue here, and pings come every 5 s
_ROOM = 600  # words of a conversation: longer ones start afresh
T = TypeVar("T")


@dataclass
class StreamedAnswer:
    """One streamed answer, as far as it came.

    `times` are the arrivals of content chunks, as time.perf_counter() tells them.
    """

    times: list[float] = field(default_factory=list)
    text: str = ""
    has_role: bool = False
    finish_reason: str | None = None
    usage: dict[str, Any] = field(default_factory=dict)
    agentmem: dict[str, Any] = field(default_factory=dict)
    is_done: bool = False

    def take(self, chunk: dict[str, Any]) -> None:
        if "error" in chunk:
            raise StreamError(f"error in a stream: {chunk['error']}")
        for choice in chunk["choices"]:
            self.has_role |= choice["delta"].get("role") == "assistant"
            self.finish_reason = choice["finish_reason"] or self.finish_reason
            if content := choice["delta"].get("content"):
                self.times.append(time.perf_counter())
                self.text += content
        self.usage = chunk.get("usage") or self.usage
        self.agentmem = chunk.get("agentmem") or self.agentmem

    def lacks(self, max_tokens: int) -> str | None:
        """Name what a complete answer of `max_tokens` words would have and this one has not."""
        got = self.usage.get("completion_tokens")
        words = len(self.text.split())
        checks = {
            "no role": self.has_role,
            f"{words} of {max_tokens} words": words == max_tokens,
            f"finish_reason {self.finish_reason}": self.finish_reason == "length",
            f"{got} of {max_tokens} tokens": got == max_tokens,
            "no agentmem object": bool(self.agentmem),
            "no [DONE]": self.is_done,
        }
        return ", ".join(name for name, holds in checks.items() if not holds) or None


class StreamError(Exception):
    """A stream that was not an answer."""


async def stream_chat(
    client: httpx.AsyncClient, body: dict[str, Any], cut_after: int | None = None
) -> StreamedAnswer:
    """Ask for a stream and read it.

    With `cut_after` hang up after that many content chunks (0: at the headers). Raises StreamError
    and httpx.HTTPError.
    """
    answer = StreamedAnswer()
    body = body | {"stream": True, "stream_options": {"include_usage": True}}
    async with client.stream("POST", "chat/completions", json=body) as response:
        if response.status_code != 200:
            raise StreamError(f"HTTP {response.status_code}: {(await response.aread()).decode()}")
        if cut_after == 0:
            return answer
        async for event in EventSource(response).aiter_sse():
            if event.data == "[DONE]":
                answer.is_done = True
            else:
                answer.take(event.json())
            if cut_after and len(answer.times) >= cut_after:
                return answer
    return answer


def read_metrics(server: ServerProcess) -> dict[str, float]:
    """Return the metrics that have no labels, by name."""
    text = server.client.get(server.url.removesuffix("/v1") + "/metrics").text
    found = {}
    for family in text_string_to_metric_families(text):
        found |= {s.name: s.value for s in family.samples if not s.labels}
    return found


def report(result: dict[str, Any], failures: list[str], path: Path | None) -> None:
    """Print and write the result; exit with 1 if a demand failed."""
    result = {**result, "failures": failures}
    print(json.dumps({k: v for k, v in result.items() if k not in ("rows", "samples")}, indent=2))
    write_result(result, path)
    for failure in failures:
        print(f"FAILED: {failure}", file=sys.stderr)
    sys.exit(1 if failures else 0)


class Load:
    """Clients that stream one answer after another until the time is over.

    What became of the streams is counted.
    """

    def __init__(self, url: str, *, streams: int, seconds: float, seed: int):
        self._url = url
        self._streams = streams
        self._seconds = seconds
        self._random = random.Random(seed)
        self._chats: dict[str, list[dict[str, str]]] = {}  # agent to messages, an answer last
        self.tally: Counter[str] = Counter()  # complete, cut, failed, tokens, and cold, warm, hot
        self.errors: list[str] = []

    async def run(self, progress: Callable[[str], None]) -> None:
        end = time.monotonic() + self._seconds
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        async with httpx.AsyncClient(
            base_url=self._url, timeout=_PATIENCE_S, limits=limits
        ) as client:
            clients = [asyncio.create_task(self._client(client, end)) for _ in range(self._streams)]
            while time.monotonic() < end:
                await asyncio.sleep(min(5.0, max(0.1, end - time.monotonic())))
                progress(f"{max(0.0, end - time.monotonic()):4.0f} s left  {dict(self.tally)}")
            await asyncio.gather(*clients)

    async def _client(self, client: httpx.AsyncClient, end: float) -> None:
        while time.monotonic() < end:
            try:
                await self._one(client)
            except (StreamError, httpx.HTTPError) as e:
                self.tally["failed"] += 1
                self.errors.append(f"{type(e).__name__}: {e}")
                # a server that refuses everything is not asked at full speed
                await asyncio.sleep(0.5)

    async def _one(self, client: httpx.AsyncClient) -> None:
        rng = self._random
        agent = f"agent-{rng.randrange(self._streams * 5 // 4)}"  # some are asked twice at once
        messages = self._prompt(agent)
        max_tokens = rng.randint(8, 64)
        body = {
            "messages": messages,
            "agent_id": agent,
            "seed": rng.randrange(1000),
            "ignore_eos": True,
            "max_tokens": max_tokens,
        }
        if rng.random() < 1 / 3:
            answer = await self._cut(client, body)
        else:
            answer = await stream_chat(client, body)
        if answer is None:
            self.tally["cut"] += 1
            return
        lacks = answer.lacks(max_tokens)
        if lacks:
            raise StreamError(f"a stream that was not cut is incomplete: {lacks}")
        self.tally.update(("complete", answer.agentmem["cache"]))
        self.tally["tokens"] += max_tokens
        self._chats[agent] = [*messages, {"role": "assistant", "content": answer.text}]

    async def _cut(self, client: httpx.AsyncClient, body: dict[str, Any]) -> StreamedAnswer | None:
        """Hang up while it waits or prefills, or in the middle of the answer.

        Returns None, unless the answer was faster.
        """
        if self._random.random() < 2 / 3:
            await stream_chat(client, body, cut_after=self._random.randrange(body["max_tokens"]))
            return None
        try:
            async with asyncio.timeout(self._random.uniform(0, 0.05)):
                return await stream_chat(client, body)
        except TimeoutError:
            return None

    def _prompt(self, agent: str) -> list[dict[str, str]]:
        """Return the agent's conversation so far and a new message, or a new conversation."""
        before = self._chats.get(agent, [])
        if sum(len(m["content"].split()) for m in before) > _ROOM or self._random.random() < 0.2:
            before = []
        length = self._random.randint(1, 30 if before else 300)
        words = [f"w{self._random.randint(8, 255)}" for _ in range(length)]
        return [*before, {"role": "user", "content": " ".join(words)}]


@dataclass(frozen=True)
class Outcome:
    seconds: float
    tally: dict[str, int]
    errors: list[str]
    # running, waiting, restoring requests and reserved bytes, once all streams have ended
    after: dict[str, float]
    health: str
    open_files: tuple[int, int]  # of the server: after the warm-up, and at the end

    def failures(self) -> list[str]:
        found = [f"{n} x {error}" for error, n in Counter(self.errors).most_common(5)]
        for name, value in self.after.items():
            if value != 0:
                found.append(f"after the last stream {name} is {value:g}")
        if self.health != "ok":
            found.append(f"/health says {self.health}")
        before, after = self.open_files
        if after > before:
            found.append(f"file descriptors of the server grew from {before} to {after}")
        if not self.tally.get("complete") or not self.tally.get("cut"):
            found.append(f"nothing was complete, or nothing cut: {self.tally}")
        return found


def run_streams(
    server: ServerProcess,
    *,
    streams: int = 64,
    seconds: float = 120.0,
    seed: int = 0,
    progress: Callable[[str], None] = lambda text: None,
) -> Outcome:
    """Drive `server` (a tiny model with SERVER_FLAGS) with streams.

    The outcome's failures() must be empty.
    """
    warm_up = Load(server.url, streams=streams, seconds=min(5.0, seconds / 4), seed=seed + 1)
    asyncio.run(warm_up.run(progress))
    _quiet(server)
    files_before = open_files(server.process.pid)
    load = Load(server.url, streams=streams, seconds=seconds, seed=seed)
    began = time.monotonic()
    asyncio.run(load.run(progress))
    took = time.monotonic() - began
    after = _quiet(server)
    health = server.client.get(server.url.removesuffix("/v1") + "/health").json()["status"]
    files_after = _settled(lambda: open_files(server.process.pid), lambda n: n <= files_before)
    return Outcome(
        seconds=took,
        tally=dict(load.tally),
        errors=warm_up.errors + load.errors,
        after=after,
        health=health,
        open_files=(files_before, files_after),
    )


def _quiet(server: ServerProcess) -> dict[str, float]:
    names = ("running_requests", "waiting_requests", "restoring_requests", "reserved_bytes")

    def read() -> dict[str, float]:
        figures = read_metrics(server)
        return {name: figures.get(f"agentmem_{name}", float("nan")) for name in names}

    return _settled(read, lambda values: not any(values.values()))


def _settled(read: Callable[[], T], holds: Callable[[T], bool]) -> T:
    """Return the first value that holds, or the one after QUIET_S."""
    end = time.monotonic() + QUIET_S
    while not holds(value := read()) and time.monotonic() < end:
        time.sleep(0.1)
    return value


def open_files(pid: int) -> int:
    if sys.platform == "linux":
        return len(os.listdir(f"/proc/{pid}/fd"))
    listed = subprocess.run(["lsof", "-p", str(pid)], capture_output=True, text=True)
    return len(listed.stdout.splitlines())


@contextlib.contextmanager
def started(kv_budget: str) -> Iterator[ServerProcess]:
    with tempfile.TemporaryDirectory() as directory:
        model = write_tiny_model(Path(directory) / "tiny")
        flags = (*SERVER_FLAGS, "--kv-budget", kv_budget)
        with ServerProcess(Path(directory) / "home", *flags, model=model) as server:
            yield server
            server.stop()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--streams", type=int, default=64, help="open at once")
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument(
        "--kv-budget",
        default="24M",
        help="as of `agentmem serve`; default: 24M, so that streams queue",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where to write the result")
    args = parser.parse_args()
    with started(args.kv_budget) as server:
        outcome = run_streams(
            server,
            streams=args.streams,
            seconds=args.seconds,
            seed=args.seed,
            progress=lambda text: print(text, file=sys.stderr),
        )
    head = {"benchmark": "streams", "machine": describe_machine(), "model": "tiny llama"}
    report({**head, "streams": args.streams, **asdict(outcome)}, outcome.failures(), args.json)


if __name__ == "__main__":
    main()
