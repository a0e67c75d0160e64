"""Time to first token, cold, warm and hot, of one prompt length, beside a bare mlx-lm loop over the same chunks.

Cold: a new agent. Warm: the same prompt by the same agent after the engine was stopped and started again, its cache on
disk. Hot: the same prompt once more. Bare: `model(chunk, cache)` over mlx-lm's own KVCache, then one decode step, with
nothing around it. Every repeat has a prompt of its own and takes all four, one after the other, so that a slow minute
of the machine hits them alike. The model stays in memory over restarts; loading it is no part of any figure.

    python benchmarks/ttft.py --tokens 1000 --repeats 5 --json benchmarks/results/ttft-demo.json
"""

import argparse
import asyncio
import json
import pydoc_data.topics
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from agentmem.config import Settings
from agentmem.models.allocator import keep_freed_memory
from agentmem.models.blas import load_fast_blas

HOME = Path("~/.agentmem").expanduser()
keep_freed_memory()
load_fast_blas(HOME)

import mlx.core as mx  # noqa: E402  (after the BLAS)
from machine import describe_machine, write_result  # noqa: E402
from mlx_lm.models.cache import make_prompt_cache  # noqa: E402

from agentmem.engine.engine import Engine  # noqa: E402
from agentmem.engine.request import Finished, GenerateRequest, RequestStats, SamplingParams  # noqa: E402
from agentmem.models.loading import LoadedModel, load_model  # noqa: E402


def bare_ttft_ms(model: Any, prompt: list[int], chunk: int) -> float:
    began = time.perf_counter()
    cache = make_prompt_cache(model)
    for start in range(0, len(prompt) - 1, chunk):
        model(mx.array([prompt[start : min(start + chunk, len(prompt) - 1)]]), cache=cache)
        mx.eval([c.state for c in cache])
    mx.eval(model(mx.array([prompt[-1:]]), cache=cache)[:, -1].argmax(-1))
    return (time.perf_counter() - began) * 1e3


async def ask(engine: Engine, agent: str, prompt: list[int]) -> RequestStats:
    request = GenerateRequest("default", agent, prompt, SamplingParams(max_tokens=1, temperature=0.0))
    async for event in engine.generate(request):
        if isinstance(event, Finished):
            return event.stats
    raise AssertionError("the stream ended without Finished")


def measure(loaded: LoadedModel, settings: Settings, prompts: list[list[int]]) -> list[dict[str, float]]:
    rows = []
    for i, prompt in enumerate(prompts):
        row = {"bare": bare_ttft_ms(loaded.model, prompt, settings.prefill_chunk)}
        for states in (("cold",), ("warm", "hot")):
            engine = Engine(settings, lambda: loaded)
            engine.start()
            for state in states:
                stats = asyncio.run(ask(engine, f"agent-{i}", prompt))
                assert stats.cache == state, f"{stats.cache}, not {state}"
                assert stats.cached_tokens == (0 if state == "cold" else len(prompt) - 1)
                row[state] = stats.ttft_ms
            asyncio.run(engine.stop())
        rows.append(row)
        print(f"{i + 1}/{len(prompts)}  " + "  ".join(f"{k} {v:,.0f} ms" for k, v in row.items()), file=sys.stderr)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="where to write the result")
    args = parser.parse_args()
    loaded = load_model(args.model, HOME)
    text = "\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    tokens = loaded.tokenizer.encode(text[: 5 * args.tokens * (args.repeats + 1)])
    prompts = [tokens[i * args.tokens : (i + 1) * args.tokens] for i in range(args.repeats + 1)]
    assert len(prompts[-1]) == args.tokens, "the corpus is too short for that"
    with tempfile.TemporaryDirectory() as home:
        settings = Settings(home=Path(home), model=args.model)
        measure(loaded, settings, prompts[-1:])  # warm-up
        rows = measure(loaded, settings, prompts[:-1])
    medians = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
    result = {
        "benchmark": "ttft",
        "machine": describe_machine(),
        "model": loaded.name,
        "tokens": args.tokens,
        "kv_bits": settings.kv_bits,
        "rows": rows,
        "median_ms": medians,
        "cold_over_bare": statistics.median(row["cold"] / row["bare"] for row in rows),
        "cold_over_warm": medians["cold"] / medians["warm"],
        "cold_over_hot": medians["cold"] / medians["hot"],
    }
    print(json.dumps({k: v for k, v in result.items() if k != "rows"}, indent=2))
    write_result(result, args.json)
    mx.clear_streams()


if __name__ == "__main__":
    main()
