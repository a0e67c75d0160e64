"""More agents than RAM has room for take turns, over HTTP.

Two parts; it exits with 1 and a line for each failed demand.

A. 20 agents of about 800 tokens, RAM for 5, 100 requests round robin, one at a time: the first 20
   cold, each later one the agent's conversation so far and a short message. All must be answered;
   every return warm, with at most 2 of the tokens that the agent had computed again (the last
   sampled one is never in a cache); no agent's tokens prefilled twice (from the trace); cache
   bytes, sampled every 50 ms, never over the budget; the process's RSS flat over the last half:
   medians of the third and the last quarter within 2 %.
B. 5 agents, RAM for 2, 3 requests in flight: at least 80 % of the total restore time must lie under
   decode steps of other agents, from the timestamps in the trace. Pauses under 1 ms between two
   such steps belong to them; prefill steps do not, and are shown apart.

Budgets come from a first small run of one agent through all its turns. I is what it takes when idle
(`ram_bytes` of GET /v1/agents), W the working copy of a running one: its tokens, rounded up to 256,
in the dtype of the caches (SmolLM2 in float32: 46,080 bytes a token), R all that the server
reserves for it (the most of agentmem_reserved_bytes: W, the blocks it may seal, its next tail). A
gets 5 I + W, I the median over the turns; B 2 (I + R), I the largest.

    python benchmarks/round_robin.py --json benchmarks/results/round-robin-demo.json
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import mlx.core as mx
from mlx_lm.utils import load_tokenizer

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from machine import describe_machine
from sealing import read_trace
from streams import StreamError, read_metrics, report

from agentmem.bench.harness.corpus import Prompts
from support.server_process import ServerProcess

DEMO = Path("~/.agentmem/models/demo").expanduser()
AGAIN = 2  # tokens of an agent's that a return may compute again
RSS_GROWTH = 1.02
OVERLAP = 0.8
_GAP_US = 1000.0  # between two decode steps that count as one
Figures = tuple[dict[str, Any], list[str]]  # and the demands that failed


@dataclass(frozen=True)
class Turn:
    agent: str
    had_tokens: int  # prompt and answer of the turn before
    prompt_tokens: int
    total_tokens: int
    ended: float  # time.perf_counter()
    agentmem: dict[str, Any]

    @property
    def computed_again(self) -> int:
        return self.had_tokens - self.agentmem["cached_tokens"]


class Conversation:
    """One agent's conversation; a turn at a time."""

    def __init__(self, agent: str, messages: list[dict[str, str]]):
        self.agent = agent
        self._messages = messages
        self._tokens = 0
        self._lock = threading.Lock()

    def turn(self, server: ServerProcess, max_tokens: int, **body: Any) -> Turn:
        with self._lock:
            body |= {
                "messages": self._messages,
                "agent_id": self.agent,
                "temperature": 0,
                "max_tokens": max_tokens,
            }
            response = server.client.post("/chat/completions", json=body)
            if response.status_code != 200:
                raise StreamError(f"{self.agent}: HTTP {response.status_code}: {response.text}")
            ended = time.perf_counter()
            answer = response.json()
            usage = answer["usage"]
            said = {"role": "assistant", "content": answer["choices"][0]["message"]["content"]}
            self._messages = [*self._messages, said, {"role": "user", "content": "Go on."}]
            turn = Turn(
                agent=self.agent,
                had_tokens=self._tokens,
                prompt_tokens=usage["prompt_tokens"],
                total_tokens=usage["total_tokens"],
                ended=ended,
                agentmem=answer["agentmem"],
            )
            self._tokens = turn.total_tokens
            return turn


def conversations(model: Path, agents: int, tokens: int) -> list[Conversation]:
    """Begin conversations of about `tokens` each: 20 less leave room for the turns."""
    prompts = Prompts(load_tokenizer(model))
    return [Conversation(f"agent-{i}", prompts.messages(tokens - 20)) for i in range(agents)]


@dataclass(frozen=True)
class Sample:
    at: float  # time.perf_counter()
    ram_bytes: float
    reserved_bytes: float
    rss_bytes: int


@dataclass
class Run:
    """A server and what is watched of it; `trace` is there once it has stopped."""

    server: ServerProcess
    samples: list[Sample] = field(default_factory=list)
    trace: list[dict[str, Any]] = field(default_factory=list)

    def watch(self, stop: threading.Event) -> None:
        while not stop.wait(0.05):
            metrics = read_metrics(self.server)
            rss = rss_bytes(self.server.process.pid)
            sample = Sample(
                at=time.perf_counter(),
                ram_bytes=metrics["agentmem_ram_bytes"],
                reserved_bytes=metrics["agentmem_reserved_bytes"],
                rss_bytes=rss,
            )
            self.samples.append(sample)

    def over_budget(self, budget: int) -> list[str]:
        peak = max(s.ram_bytes for s in self.samples)
        if peak <= budget:
            return []
        return [f"cache bytes reached {peak:,.0f}, the budget is {budget:,}"]


@contextmanager
def started(model: Path, kv_budget: int | None = None) -> Iterator[Run]:
    with tempfile.TemporaryDirectory() as directory:
        trace = Path(directory) / "trace.json"
        stop = threading.Event()
        flags = ["--trace", str(trace)]
        if kv_budget:
            flags += ["--kv-budget", str(kv_budget)]
        with (
            ServerProcess(Path(directory) / "home", *flags, model=model) as server,
            ThreadPoolExecutor(1) as pool,
        ):
            run = Run(server)
            watching = pool.submit(run.watch, stop)
            try:
                yield run
            finally:
                stop.set()
            watching.result()
            server.stop()
        run.trace = read_trace(trace)


def rss_bytes(pid: int) -> int:
    if sys.platform == "linux":
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    command = ["ps", "-o", "rss=", "-p", str(pid)]
    return int(subprocess.run(command, capture_output=True, text=True).stdout) * 1024


def one_agent(model: Path, tokens: int, turns: int, max_tokens: int) -> dict[str, Any]:
    """Return what one agent takes, in bytes.

    It is idle after each turn, and has a working copy in the last one.
    """
    (chat,) = conversations(model, 1, tokens)
    idle = []
    total = 0
    with started(model) as run:
        for _ in range(turns):
            total = chat.turn(run.server, max_tokens, ignore_eos=True).total_tokens
            (agent,) = run.server.client.get("/agents").json()["data"]
            idle.append(agent["ram_bytes"])
    return {
        "idle": idle,
        "tokens": total,
        "working_copy": -(-total // 256) * 256 * bytes_per_token(model),
        "reserved": int(max(s.reserved_bytes for s in run.samples)),
    }


def bytes_per_token(model: Path) -> int:
    """Return the bytes of keys and values in the server's dtype: float32 on a CPU, else 16 bits."""
    config = json.loads((model / "config.json").read_text())
    dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    size = 4 if mx.default_device() == mx.Device(mx.cpu) else 2
    return 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * dim * size


def part_a(args: argparse.Namespace) -> Figures:
    rounds = -(-args.requests // args.agents)
    one = one_agent(args.model, args.tokens, rounds, args.answer_tokens)
    budget = args.fit * int(statistics.median(one["idle"])) + one["working_copy"]
    chats = conversations(args.model, args.agents, args.tokens)
    turns = []
    with started(args.model, budget) as run:
        for i in range(args.requests):
            turn = chats[i % len(chats)].turn(run.server, args.answer_tokens)
            turns.append(turn)
            print(f"A {i + 1}/{args.requests}  {turn.agent} {turn.agentmem}", file=sys.stderr)
    cold = turns[: len(chats)]
    returns = turns[len(chats) :]
    rss = [quarter_rss(run.samples, turns, quarter) for quarter in (2, 3)]
    failures = run.over_budget(budget)
    caches = Counter(t.agentmem["cache"] for t in returns)
    again = [t.computed_again for t in returns]
    for cache, n in caches.items():
        if cache != "warm":
            failures.append(f"{n} of {len(returns)} returns were {cache}")
    if max(again) > AGAIN:
        over = sum(n > AGAIN for n in again)
        failures.append(f"returns computed up to {max(again)} tokens again, {over} over {AGAIN}")
    failures += prefilled_twice(run.trace, turns)
    if rss[1] > rss[0] * RSS_GROWTH:
        failures.append(f"RSS grew over the last half from {rss[0]:,.0f} to {rss[1]:,.0f} bytes")
    result = {
        "one_agent": one,
        "kv_budget": budget,
        "tokens": [min(t.total_tokens for t in turns), max(t.total_tokens for t in turns)],
        "answered": len(turns),
        "returns": caches,
        "computed_again": Counter(again),
        "prefilled_tokens": sum(e["args"]["tokens"] for e in run.trace if e["name"] == "prefill"),
        "sent_tokens": sum(t.prompt_tokens - t.had_tokens for t in turns),
        "ram_bytes_max": max(s.ram_bytes for s in run.samples),
        "reserved_bytes_max": max(s.reserved_bytes for s in run.samples),
        "rss_bytes": rss,
        "cold_ttft_ms": statistics.median(t.agentmem["ttft_ms"] for t in cold),
        "warm_ttft_ms": statistics.median(t.agentmem["ttft_ms"] for t in returns),
        "restore_ms": statistics.median(t.agentmem["restore_ms"] for t in returns),
    }
    return result, failures


def prefilled_twice(trace: list[dict[str, Any]], turns: list[Turn]) -> list[str]:
    """Find agents that prefilled more than they were sent.

    An agent prefills its last prompt, less the answers in it: decode put those into the cache.
    """
    most: Counter[str] = Counter()
    for turn in turns:
        most[turn.agent] += turn.prompt_tokens - turn.had_tokens + AGAIN
    for event in trace:
        if event["name"] == "prefill":
            most[event["args"]["agent"]] -= event["args"]["tokens"]
    over = [-left for left in most.values() if left < 0]
    if not over:
        return []
    return [f"{len(over)} agents prefilled up to {max(over)} tokens more than they were sent"]


def quarter_rss(samples: list[Sample], turns: list[Turn], quarter: int) -> float:
    """Return the median over the requests of one quarter (1 to 3; 0 is the first) of the run."""
    start = turns[len(turns) * quarter // 4 - 1].ended
    stop = turns[len(turns) * (quarter + 1) // 4 - 1].ended
    return statistics.median(s.rss_bytes for s in samples if start < s.at <= stop)


def part_b(args: argparse.Namespace) -> Figures:
    shortest = args.overlap_answer_tokens * 3 // 4
    longest = args.overlap_answer_tokens * 5 // 4
    one = one_agent(args.model, args.tokens, args.rounds, longest)
    budget = 2 * (max(one["idle"]) + one["reserved"])
    chats = conversations(args.model, 5, args.tokens)
    rng = random.Random(0)
    turns = []
    with started(args.model, budget) as run, ThreadPoolExecutor(args.in_flight) as pool:
        asked = []
        for _ in range(args.rounds):
            for chat in chats:
                # of unequal lengths, or they would end, and restore, together
                length = rng.randint(shortest, longest)
                asked.append(pool.submit(chat.turn, run.server, length, ignore_eos=True))
        for future in asked:
            turn = future.result()
            turns.append(turn)
            print(f"B {len(turns)}/{len(asked)}  {turn.agent} {turn.agentmem}", file=sys.stderr)
    restores = [e for e in run.trace if e["name"] == "restore"]
    total = sum(e["dur"] for e in restores) or 1.0
    under_decode = sum(overlap(e, run.trace, "decode") for e in restores) / total
    under_any = sum(overlap(e, run.trace, "decode", "prefill") for e in restores) / total
    result = {
        "one_agent": one,
        "kv_budget": budget,
        "answered": len(turns),
        "cache": Counter(t.agentmem["cache"] for t in turns),
        "restores": len(restores),
        "restore_ms": total / 1e3,
        "share_under_decode": under_decode,
        "share_under_any_step": under_any,
        "ram_bytes_max": max(s.ram_bytes for s in run.samples),
    }
    failures = run.over_budget(budget)
    if under_decode < OVERLAP:
        failures.append(
            f"{under_decode:.0%} of the restore time lies under decode of other agents, "
            f"not {OVERLAP:.0%}"
        )
    return result, failures


def overlap(restore: dict[str, Any], trace: list[dict[str, Any]], *names: str) -> float:
    """Return the us of a restore under steps of these names in which another agent took part."""
    total = 0.0
    stop = restore["ts"] + restore["dur"]
    # up to here; a step that follows within the gap begins here
    covered = restore["ts"] - 2 * _GAP_US
    for event in sorted((e for e in trace if e["name"] in names), key=lambda e: e["ts"]):
        agents = event["args"].get("agents") or [event["args"]["agent"]]
        if all(agent == restore["args"]["agent"] for agent in agents):
            continue
        start = covered if event["ts"] - covered < _GAP_US else event["ts"]
        end = event["ts"] + event["dur"]
        total += max(0.0, min(end, stop) - max(start, restore["ts"]))
        covered = max(covered, end)
    return total


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", type=Path, default=DEMO, help="a model directory; default: the demo model"
    )
    parser.add_argument("--part", choices=["a", "b", "both"], default="both")
    parser.add_argument("--tokens", type=int, default=800, help="about, of an agent")
    parser.add_argument("--agents", type=int, default=20, help="of part A")
    parser.add_argument(
        "--fit", type=int, default=5, help="idle agents that the budget of part A has room for"
    )
    parser.add_argument("--requests", type=int, default=100, help="of part A")
    parser.add_argument("--answer-tokens", type=int, default=6, help="of part A")
    parser.add_argument("--in-flight", type=int, default=3, help="requests at once in part B")
    parser.add_argument("--rounds", type=int, default=5, help="turns of an agent in part B")
    parser.add_argument(
        "--overlap-answer-tokens", type=int, default=30, help="of part B, give or take a quarter"
    )
    parser.add_argument("--json", type=Path, help="where to write the result")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    result: dict[str, Any] = {
        "benchmark": "round_robin",
        "machine": describe_machine(),
        "model": args.model.name,
    }
    failures: list[str] = []
    for name, part in (("a", part_a), ("b", part_b)):
        if args.part in (name, "both"):
            try:
                result[name], failed = part(args)
                failures += failed
            except (StreamError, httpx.HTTPError) as e:
                failures.append(f"not all was answered: {type(e).__name__}: {e}")
    report(result, failures, args.json)


if __name__ == "__main__":
    main()
