"""How fast an agent comes back from disk, against reading the same files and copying them once; and what a fork costs.

    raw       every file of the agent read into memory, then copied once
    store     the same, verified and made into arrays, by 1, 2 and 4 reader threads
    engine    evict the agent, then prefetch it: what a warm request waits for

Four agents (one that was computed, three imported from its export) are read at once by 1, 2 and 4 threads, from the
operating system's cache, as everything else here, and from the disk (Linux). Medians of `--repeats`, taken in turns.

    python benchmarks/restore.py --json benchmarks/results/restore-demo.json
"""

import argparse
import asyncio
import io
import os
import pydoc_data.topics
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from agentmem.config import Settings
from agentmem.models.allocator import keep_freed_memory
from agentmem.models.blas import load_fast_blas

HOME = Path("~/.agentmem").expanduser()
keep_freed_memory()
load_fast_blas(HOME)

from machine import describe_machine, write_result  # noqa: E402  (after the BLAS)

from agentmem.engine.engine import Engine  # noqa: E402
from agentmem.engine.request import GenerateRequest, SamplingParams  # noqa: E402
from agentmem.kvcache.block import copy_host  # noqa: E402
from agentmem.models.loading import load_model  # noqa: E402
from agentmem.store.agent_store import AgentStore  # noqa: E402
from agentmem.store.layout import Layout  # noqa: E402
from agentmem.store.records import StoreIndex  # noqa: E402

AGENTS = ("a", "b", "c", "d")


def timed(function: Callable[[], object]) -> float:
    """ms"""
    began = time.perf_counter()
    function()
    return (time.perf_counter() - began) * 1e3


def read_raw(paths: list[Path]) -> None:
    for path in paths:
        buffer = bytearray(path.stat().st_size)
        with path.open("rb", buffering=0) as file:
            file.readinto(buffer)
        bytes(buffer)


def read_store(store: AgentStore, index: StoreIndex, agents: tuple[str, ...]) -> None:
    """As the engine does: bytes become arrays on the thread that read them."""
    parents = {block.key: block.parent for block in index.blocks}
    futures = []
    for branch in index.branches:
        key = branch.head if branch.agent in agents else None
        while key is not None:
            futures.append(store.read_block(key))
            futures[-1].add_done_callback(lambda f: copy_host(f.result()))
            key = parents[key]
        if branch.agent in agents and branch.tail is not None:
            futures.append(store.read_tail(branch.id))
            futures[-1].add_done_callback(lambda f: copy_host(f.result()[0]))
    for future in futures:
        future.result()


async def prefill(engine: Engine, tokens: list[int]) -> None:
    async for _ in engine.generate(GenerateRequest("default", "a", tokens, SamplingParams(max_tokens=0))):
        pass


async def build(engine: Engine, tokens: list[int]) -> None:
    await prefill(engine, tokens)
    export = await engine.export_agent("default", "a")
    archive = b"".join(export.chunks)
    await asyncio.to_thread(export.close)
    for name in AGENTS[1:]:
        await engine.import_agent("default", name, io.BytesIO(archive))


def process_writes() -> int:
    return int(Path("/proc/self/io").read_text().split("write_bytes: ")[1].split()[0])


async def measure_engine(engine: Engine, repeats: int) -> dict[str, Any]:
    rows: dict[str, list[float]] = {"one": [], "four": [], "fork": []}
    written = []
    for i in range(repeats):
        for which, agents in (("one", AGENTS[:1]), ("four", AGENTS)):
            for name in AGENTS:
                await engine.evict_agent("default", name)
            assert not any(agent.ram_bytes for agent in await engine.agents("default"))
            began = time.perf_counter()
            await asyncio.gather(*(engine.prefetch_agent("default", name) for name in agents))
            rows[which].append((time.perf_counter() - began) * 1e3)
        before, began = process_writes(), time.perf_counter()
        await engine.fork_agent("default", "a", f"fork-{i}", None)
        rows["fork"].append((time.perf_counter() - began) * 1e3)
        written.append(process_writes() - before)
        await engine.delete_agent("default", f"fork-{i}")  # it would hold the blocks in RAM
    return {f"{name}_ms": values for name, values in rows.items()} | {"fork_written_bytes": written}


def measure_store(root: Path, fingerprint: str, repeats: int) -> dict[str, Any]:
    rows: dict[str, list[float]] = {}
    for _ in range(repeats):
        for threads in (1, 2, 4):
            with_meta = {"calibration": _calibration(root / fingerprint)}
            store = AgentStore.open(root, fingerprint, with_meta, readers=threads)
            index = store.index()
            layout = Layout(root / fingerprint)
            paths = _paths(layout, index, "a")
            rows.setdefault("raw", []).append(timed(lambda paths=paths: read_raw(paths)))
            for which, agents in (("one", ("a",)), ("four", AGENTS)):
                took = timed(lambda store=store, index=index, agents=agents: read_store(store, index, agents))
                rows.setdefault(f"{which}_{threads}", []).append(took)
            if forget([path for agent in AGENTS for path in _paths(layout, index, agent)]):
                took = timed(lambda store=store, index=index: read_store(store, index, AGENTS))
                rows.setdefault(f"four_from_disk_{threads}", []).append(took)
            store.close()
    return {f"{name}_ms": values for name, values in rows.items()} | {
        "files": len(paths),
        "bytes": sum(path.stat().st_size for path in paths),
    }


def forget(paths: list[Path]) -> bool:
    """Take the files out of the system's cache; False where there is no way to."""
    if not hasattr(os, "posix_fadvise"):
        return False
    for path in paths:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return True


def _calibration(directory: Path) -> str:
    import sqlite3

    with sqlite3.connect(directory / "manifest.sqlite") as db:
        return db.execute("SELECT value FROM meta WHERE key = 'calibration'").fetchone()[0]


def _paths(layout: Layout, index: StoreIndex, agent: str) -> list[Path]:
    parents = {block.key: block.parent for block in index.blocks}
    (branch,) = [b for b in index.branches if b.agent == agent]
    paths, key = [], branch.head
    while key is not None:
        paths.append(layout.block(key))
        key = parents[key]
    return [*paths, *layout.tails.glob(f"{branch.id}-*")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--tokens", type=int, default=4000)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", type=Path, help="where to write the result")
    args = parser.parse_args()
    loaded = load_model(args.model, HOME, lambda text: print(text, file=sys.stderr))
    tokens = loaded.tokenizer.encode("\n".join(pydoc_data.topics.topics.values()))[: args.tokens]
    with tempfile.TemporaryDirectory() as directory:
        settings = Settings(home=Path(directory))
        engine = Engine(settings, lambda: loaded)
        engine.start()
        print(f"prefilling {args.tokens} tokens ...", file=sys.stderr)
        asyncio.run(build(engine, tokens))
        in_engine = asyncio.run(measure_engine(engine, args.repeats))
        fingerprint = engine._core.store._layout.root.name
        asyncio.run(engine.stop())
        in_store = measure_store(settings.store_dir, fingerprint, args.repeats)
    medians = {name: statistics.median(v) for name, v in {**in_engine, **in_store}.items() if isinstance(v, list)}
    ratios = {
        "store_over_raw": medians["one_4_ms"] / medians["raw_ms"],
        "engine_over_raw": medians["one_ms"] / medians["raw_ms"],
        **{
            f"{which}_speedup_{threads}_threads": medians[f"{which}_1_ms"] / medians[f"{which}_{threads}_ms"]
            for which in ("four", "four_from_disk")
            for threads in (2, 4)
            if f"{which}_1_ms" in medians
        },
    }
    result = {"benchmark": "restore", "machine": describe_machine(), "model": args.model, "tokens": args.tokens}
    result |= {"medians": medians, **ratios, "engine": in_engine, "store": in_store}
    write_result(result, args.json)
    for name, value in {**medians, **ratios}.items():
        print(f"{name:<32} {value:,.2f}")


if __name__ == "__main__":
    main()
