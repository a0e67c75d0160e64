"""More clients than the server takes: whoever is let in is answered soon, the rest is told to wait.

100 clients (--clients) ask a tiny model for one streamed answer after another, three times as many
as may wait in its queue, for --seconds. A client that is refused tries again a moment later, as if
Retry-After said nothing. The server must answer 200 or, with Retry-After, 429, and nothing else;
the 99th percentile of the time to the first token of what it let in must stay within the queue
time that it was configured with, and a second; and its memory must be flat: the median of the last
quarter at most 5 % above that of the second one.

    python benchmarks/overload.py --json benchmarks/results/overload-tiny.json
"""

import argparse
import asyncio
import json
import random
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import httpx

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from machine import describe_machine, write_result

from support.server_process import ServerProcess
from support.tiny_model_dir import write_tiny_model

MAX_QUEUE = 33
QUEUE_TIME = 1.5  # s: below the 2 s after which a stream has begun, so that a refusal is a status
SERVER_FLAGS = shlex.split(
    f"--block-size 32 --prefill-chunk 64 --max-queue {MAX_QUEUE} --max-queue-time {QUEUE_TIME}"
)
_SLACK = 1.0  # s of a TTFT beyond the queue: prefill, and clients that share the machine
_GROWTH = 1.05  # of the process' memory, once it has served for a quarter of the time
_PAUSE = 0.2  # s until a refused client tries again
_WORDS = 200  # of the longest prompt


@dataclass
class Outcome:
    """What clients saw."""

    seconds: float = 0.0
    statuses: Counter[str] = field(default_factory=Counter)
    ttft: list[float] = field(default_factory=list)  # s, of what was let in
    rss: list[int] = field(default_factory=list)  # bytes, of the server, ten times a second
    wrong: list[str] = field(default_factory=list)

    def p99(self) -> float:
        """Return the 99th percentile of the times to the first token, s."""
        return sorted(self.ttft)[int(len(self.ttft) * 0.99)] if self.ttft else 0.0

    def growth(self) -> float:
        """Return the last quarter's memory over the second quarter's."""
        quarter = len(self.rss) // 4
        early = statistics.median(self.rss[quarter : 2 * quarter])
        return statistics.median(self.rss[-quarter:]) / early

    def failures(self) -> list[str]:
        """Name each demand that was not met."""
        found = sorted(set(self.wrong))
        if self.statuses.keys() - {"200", "429"}:
            found.append(f"statuses {dict(self.statuses)}")
        if not self.statuses["429"]:
            found.append("nobody was refused: that is no overload")
        if self.p99() > QUEUE_TIME + _SLACK:
            found.append(f"p99 of the time to the first token is {self.p99():.2f} s")
        if self.growth() > _GROWTH:
            found.append(f"memory grew to {self.growth():.2f} of what it was")
        return found


async def press(url: str, pid: int, *, clients: int, seconds: float, seed: int) -> Outcome:
    """Ask for `seconds`, with as many clients at once."""
    outcome = Outcome()
    until = time.monotonic() + seconds
    began = time.monotonic()
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as http:
        working = [_client(http, outcome, random.Random(seed + i), until) for i in range(clients)]
        await asyncio.gather(_watch(outcome, pid, until), *working)
    outcome.seconds = time.monotonic() - began
    return outcome


async def _client(
    http: httpx.AsyncClient, outcome: Outcome, rng: random.Random, until: float
) -> None:
    while time.monotonic() < until:
        words = " ".join(f"w{rng.randint(8, 250)}" for _ in range(rng.randint(5, _WORDS)))
        body = {
            "messages": [{"role": "user", "content": words}],
            "agent_id": f"a{rng.randint(0, 40)}",
            "max_tokens": rng.randint(5, 40),
            "ignore_eos": True,
            "stream": True,
        }
        asked = time.monotonic()
        async with http.stream("POST", "/chat/completions", json=body) as answer:
            outcome.statuses[str(answer.status_code)] += 1
            if answer.status_code == 200:
                await _read(answer, outcome, asked)
                continue
            if not answer.headers.get("retry-after", "").isdigit():
                outcome.wrong.append(f"{answer.status_code} without Retry-After")
            await answer.aread()
        await asyncio.sleep(_PAUSE * rng.random() * 2)


async def _read(answer: httpx.Response, outcome: Outcome, asked: float) -> None:
    """Read an answer to its end; note when its first token came."""
    first = 0.0
    last = ""
    async for line in answer.aiter_lines():
        if not line.startswith("data: "):
            continue
        last = line.removeprefix("data: ")
        if not first and last.startswith("{"):
            chunk = json.loads(last)
            if "error" in chunk:
                outcome.wrong.append(f"error in a stream: {chunk['error']['code']}")
            elif chunk["choices"] and chunk["choices"][0]["delta"].get("content"):
                first = time.monotonic() - asked
                outcome.ttft.append(first)
    if last != "[DONE]":
        outcome.wrong.append("a stream without its end")


async def _watch(outcome: Outcome, pid: int, until: float) -> None:
    while time.monotonic() < until:
        outcome.rss.append(await asyncio.to_thread(_rss, pid))
        await asyncio.sleep(0.1)


def _rss(pid: int) -> int:
    told = subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True)
    return int(told.stdout) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int, default=3 * MAX_QUEUE + 1)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where to write the result")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        model = write_tiny_model(Path(directory) / "tiny")
        with ServerProcess(Path(directory) / "home", *SERVER_FLAGS, model=model) as server:
            pid = server.process.pid
            wanted = {"clients": args.clients, "seconds": args.seconds, "seed": args.seed}
            outcome = asyncio.run(press(server.url, pid, **wanted))
            health = httpx.get(server.url.removesuffix("/v1") + "/health").json()["status"]
            if (code := server.stop()) or health != "ok":
                outcome.wrong.append(f"/health {health}, exit code {code}")
    told = {
        "seconds": outcome.seconds,
        "statuses": dict(outcome.statuses),
        "ttft": {"p50_s": statistics.median(outcome.ttft), "p99_s": outcome.p99()},
        "rss": {"first": outcome.rss[0], "last": outcome.rss[-1], "growth": outcome.growth()},
        "failures": outcome.failures(),
    }
    head = {
        "benchmark": "overload",
        "machine": describe_machine(),
        "model": "tiny llama",
        "date": time.strftime("%Y-%m-%d"),
        "clients": args.clients,
        "max_queue": MAX_QUEUE,
        "max_queue_time_s": QUEUE_TIME,
    }
    print(json.dumps(told, indent=2))
    write_result(head | told, args.json)
    sys.exit(1 if outcome.failures() else 0)


if __name__ == "__main__":
    main()
