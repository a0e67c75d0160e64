"""What holding answers to a JSON schema costs a batch that decodes.

The same agents answer at once, in rounds that take turns: all free, all held to a schema that goes
on for longer than the answer, and every other one held. From each round: an agent's tokens per
second, by its median gap between two tokens once all have begun, and the CPU time of the whole
process. Costs are medians over pairs of neighbouring rounds, so that a machine that slows down
slows both. On a machine that others use too, CPU time is the figure to look at.

    python benchmarks/constrained.py --json benchmarks/results/constrained-demo.json
"""

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentmem.linux_cpu.prepare import prepare_mlx

HOME = Path("~/.agentmem").expanduser()
prepare_mlx(HOME)

import numpy as np  # noqa: E402
from llguidance import LLMatcher  # noqa: E402
from machine import describe_machine, write_result  # noqa: E402

from agentmem.bench.harness.in_process import RunCoroutine, key_of, running_engine  # noqa: E402
from agentmem.chat.grammar_compiler import GrammarCompiler  # noqa: E402
from agentmem.config import Settings  # noqa: E402
from agentmem.engine.api import Finished, GenerateRequest, SamplingParams  # noqa: E402
from agentmem.engine.engine import Engine  # noqa: E402
from agentmem.models.loading import load_model  # noqa: E402

MOST = 0.10  # of the throughput that constraints may cost
TEXT = "Make a long list of people in JSON, with all that is known of each.\n"
WORD = {"type": "string", "maxLength": 24}
PERSON = {
    "type": "object",
    "properties": {
        "name": WORD,
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "role": {"enum": ["author", "editor", "reviewer", "reader"]},
        "tags": {"type": "array", "items": WORD, "maxItems": 4},
        "address": {
            "type": "object",
            "properties": {"street": WORD, "city": WORD, "zip": {"pattern": "^[0-9]{5}$"}},
            "required": ["street", "city"],
            "additionalProperties": False,
        },
    },
    "required": ["name", "age", "role", "tags"],
    "additionalProperties": False,
}
SCHEMAS = [
    {"type": "array", "items": PERSON, "minItems": 1000},
    {"type": "array", "items": {"anyOf": [PERSON, {"type": "number"}]}, "minItems": 1000},
    {"type": "array", "items": {"type": "string", "minLength": 8}, "minItems": 1000},
    {"type": "array", "items": {"type": "object"}, "minItems": 1000},
]


@dataclass(frozen=True)
class Asked:
    """One agent's answer in a round."""

    agent: str
    prompt: list[int]
    params: SamplingParams
    grammar: LLMatcher | None


@dataclass(frozen=True)
class Told:
    """When its pieces came, in s of time.perf_counter(), and how many tokens it had by then."""

    times: list[float]
    counts: list[int]

    def gaps(self, since: float) -> list[float]:
        """Return the seconds between two tokens, from a time on."""
        first = next(i for i, at in enumerate(self.times) if at >= since)
        spans = np.diff(self.times[first:]) / np.diff(self.counts[first:])
        return [float(span) for span in spans]


async def answer(engine: Engine, asked: Asked) -> Told:
    told = Told([], [])
    request = GenerateRequest(
        key_of(asked.agent), asked.prompt, asked.params, grammar=asked.grammar
    )
    async for event in engine.generate(request):
        if isinstance(event, Finished):
            assert event.reason == "length", "a schema ended before the answer"
            return told
        told.times.append(time.perf_counter())
        told.counts.append(event.num_tokens)
    raise AssertionError("the stream ended without Finished")


class Rounds:
    """The rounds of one batch size."""

    def __init__(
        self, engine: Engine, run: RunCoroutine, grammars: list[LLMatcher], batch: int, tokens: int
    ):
        self._engine = engine
        self._run = run
        self._grammars = grammars
        self._batch = batch
        self._tokens = tokens
        self._prompt = engine.tokenizer.encode(TEXT)
        self.cpu_s = 0.0  # of the last round

    def free(self, seed: int) -> list[float]:
        """Return each agent's tokens per second where none is held."""
        return self._round(seed, [False] * self._batch)

    def held(self, seed: int) -> list[float]:
        return self._round(seed, [True] * self._batch)

    def mixed(self, seed: int) -> list[float]:
        """Every other agent is held, the second one first."""
        return self._round(seed, [i % 2 == 1 for i in range(self._batch)])

    def _round(self, seed: int, held: list[bool]) -> list[float]:
        asked = []
        for i, is_held in enumerate(held):
            grammar = self._grammars[i % len(self._grammars)] if is_held else None
            params = SamplingParams(self._tokens, ignore_eos=True, seed=seed + i)
            asked.append(Asked(f"agent {i}", self._prompt, params, grammar))

        async def together() -> list[Told]:
            return await asyncio.gather(*(answer(self._engine, one) for one in asked))

        began = time.process_time()
        told = self._run(together())
        self.cpu_s = time.process_time() - began
        since = max(one.times[0] for one in told)
        return [1 / statistics.median(one.gaps(since)) for one in told]


def measure(rounds: Rounds, count: int, batch: int) -> dict[str, Any]:
    rounds.free(0)
    rounds.held(0)  # the first ones warm up
    free: list[float] = []
    held: list[float] = []
    costs: list[float] = []
    cpu_costs: list[float] = []
    beside: list[float] = []  # what the free agents of a mixed round lose
    for i in range(1, count + 1):
        if i % 2:
            alone = rounds.free(i * 100)
            free_s = rounds.cpu_s
            constrained = rounds.held(i * 100)
            held_s = rounds.cpu_s
        else:
            constrained = rounds.held(i * 100)
            held_s = rounds.cpu_s
            alone = rounds.free(i * 100)
            free_s = rounds.cpu_s
        cpu_costs.append(held_s / free_s - 1)
        free.append(sum(alone))
        held.append(sum(constrained))
        costs.append(1 - held[-1] / free[-1])
        if batch > 1:
            both = rounds.mixed(i * 100)
            beside.append(1 - statistics.mean(both[::2]) / statistics.mean(alone[::2]))
    row = {
        "batch": batch,
        "rounds": count,
        "free_tokens_per_s": statistics.median(free),
        "held_tokens_per_s": statistics.median(held),
        "cost": statistics.median(costs),
        "costs": sorted(costs),
        "cpu_cost": statistics.median(cpu_costs),
        "cpu_costs": sorted(cpu_costs),
    }
    if batch > 1:
        row["cost_to_free_ones"] = statistics.median(beside)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo")
    parser.add_argument("--batches", default="1,8", help="batch sizes, comma-separated")
    parser.add_argument("--tokens", type=int, default=16, help="of each answer")
    parser.add_argument("--rounds", type=int, default=24, help="of each kind, beside warm-up")
    parser.add_argument("--json", type=Path, help="where to write the result")
    args = parser.parse_args()
    loaded = load_model(args.model, HOME)
    rows = []
    with tempfile.TemporaryDirectory() as home:
        settings = Settings(home=Path(home), max_running=64)
        with running_engine(settings, loaded) as (engine, run):
            compiler = GrammarCompiler(engine.tokenizer)
            grammars = []
            began = time.perf_counter()
            for schema in SCHEMAS:
                grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema))
                grammars.append(run(compiler.compile(grammar)))
            compile_ms = (time.perf_counter() - began) * 1e3
            for batch in [int(b) for b in args.batches.split(",")]:
                rounds = Rounds(engine, run, grammars, batch, args.tokens)
                row = measure(rounds, args.rounds, batch)
                rows.append(row)
                print(row, flush=True)
    result = {
        "benchmark": "constrained",
        "machine": describe_machine(),
        "model": loaded.name,
        "tokens": args.tokens,
        "compile_ms": compile_ms,
        "rows": rows,
    }
    write_result(result, args.json)
    if any(row["cost"] >= MOST for row in rows):
        sys.exit(f"FAILED: constraints cost {MOST:.0%} of the throughput or more")


if __name__ == "__main__":
    main()
