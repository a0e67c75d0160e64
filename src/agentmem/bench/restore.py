"""How fast agents come back from disk, and what a fork costs.

Beside a restore stands reading the same files and copying them once. In process: the engine evicts
the agents, then prefetches them: their codes are read, verified and made into arrays, before a warm
request makes its working copy of them. Once with the files in the system's cache, once without
(Linux, where the directory is on a disk). One agent is computed, the others are imported from its
export.
"""

import asyncio
import io
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..cli.show import size, table
from .harness.in_process import NAMESPACE, ask_engine, key_of, running_engine
from .harness.machine import process_writes
from .harness.options import BenchRun, Passes, Shared, Shown, benchmark
from .harness.result import Result, ResultPart, Spread, spread

if TYPE_CHECKING:
    from ..engine.engine import Engine
    from ..models.loading import LoadedModel

Source = Literal["system's cache", "disk"]
_FIRST = "agent-0"


class RestoreRow(ResultPart):
    source: Source
    agents: int  # at once
    bytes: int  # of their files
    files: int
    raw_ms: Spread  # read and copied once, one file after the other
    restore_ms: Spread
    raw_bytes_per_s: int  # from the medians
    restore_bytes_per_s: int
    restore_over_raw: float  # of the times


class RestoreResult(Result):
    benchmark: Literal["restore"] = "restore"
    tokens: int  # of an agent
    rows: list[RestoreRow]
    fork_ms: Spread
    fork_written_bytes: Spread | None  # by the process; Linux only


@dataclass
class _Times:
    """ms of reading and of restoring, by pass."""

    raw: list[float] = field(default_factory=list)
    restore: list[float] = field(default_factory=list)


def measure(
    run: BenchRun,
    loaded: "LoadedModel",
    tokens: list[int],
    agents: int,
    *,
    passes: int,
    done: Callable[[], None],
) -> dict[str, Any]:
    """Return the result's own fields.

    `done` is told when the agents are there, and of each pass.
    """
    # each with files of its own, as agents have that are not copies
    changes = {"home": run.session.directory / "engine", "sharing": "agent"}
    settings = run.settings.model_copy(update=changes)
    with running_engine(settings, loaded) as (engine, do):
        store = settings.store_dir
        found = do(_measure(engine, store, tokens, agents, passes=passes, done=done))
        return {"tokens": len(tokens)} | found


async def _measure(
    engine: "Engine",
    store: Path,
    tokens: list[int],
    agents: int,
    *,
    passes: int,
    done: Callable[[], None],
) -> dict[str, Any]:
    await _build(engine, tokens, 1)
    await engine.agents.evict(key_of(_FIRST))
    of_one = _files(store)
    await _build(engine, tokens, agents)
    await _evict(engine, agents)
    of_all = _files(store)
    done()
    times: dict[tuple[Source, int], _Times] = {}
    forks: list[float] = []
    written: list[float] = []
    for number in range(passes):
        # what comes second may find it easier
        order = (True, False) if number % 2 else (False, True)
        for source in _sources(store):
            for count, files in ((1, of_one), (agents, of_all)):
                of = times.setdefault((source, count), _Times())
                for reading in order:
                    _prepare(of_all, source)
                    if reading:
                        of.raw.append(_read_ms(files))
                    else:
                        of.restore.append(await _restore_ms(engine, count))
                        await _evict(engine, agents)
        took, nbytes = await _fork(engine)
        forks.append(took)
        if nbytes is not None:
            written.append(nbytes)
        done()
    rows = []
    for (source, count), of in times.items():
        rows.append(_row(source, count, of_one if count == 1 else of_all, of))
    return {
        "rows": rows,
        "fork_ms": spread(forks),
        "fork_written_bytes": spread(written) if written else None,
    }


async def _build(engine: "Engine", tokens: list[int], agents: int) -> None:
    """Make as many agents of the same tokens; the first is computed if need be."""
    await ask_engine(engine, _FIRST, tokens)
    export = await engine.archives.export(key_of(_FIRST))
    archive = b"".join(export.chunks)
    await asyncio.to_thread(export.close)
    for name in _names(agents)[1:]:
        await engine.archives.import_(NAMESPACE, name, io.BytesIO(archive))


async def _evict(engine: "Engine", agents: int) -> None:
    for name in _names(agents):
        await engine.agents.evict(key_of(name))


def _names(agents: int) -> list[str]:
    return [f"agent-{i}" for i in range(agents)]


def _files(store: Path) -> list[Path]:
    found = []
    for kind in ("blocks", "tails"):
        found += sorted(store.glob(f"*/{kind}/**/*"))
    return [path for path in found if path.is_file()]


def _sources(directory: Path) -> tuple[Source, ...]:
    """Return what can be read from: a file system in RAM, as /tmp often is, has no disk."""
    number = directory.stat().st_dev
    mounts = Path("/proc/self/mountinfo")
    device = f" {os.major(number)}:{os.minor(number)} "
    in_ram = False
    if mounts.exists():
        lines = mounts.read_text().splitlines()
        in_ram = any(device in line and " - tmpfs " in line for line in lines)
    if hasattr(os, "posix_fadvise") and not in_ram:
        return ("system's cache", "disk")
    return ("system's cache",)


def _prepare(files: list[Path], source: Source) -> None:
    """Bring files into the system's cache, or out of it."""
    for path in files:
        with path.open("rb") as file:
            if source == "disk":
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                file.read()


def _read_ms(files: list[Path]) -> float:
    began = time.perf_counter()
    for path in files:
        buffer = bytearray(path.stat().st_size)
        with path.open("rb", buffering=0) as file:
            file.readinto(buffer)
        bytes(buffer)
    return (time.perf_counter() - began) * 1e3


async def _restore_ms(engine: "Engine", agents: int) -> float:
    assert not any(agent.ram_bytes for agent in engine.agents.infos(NAMESPACE))
    began = time.perf_counter()
    asked = [engine.agents.prefetch(key_of(name)) for name in _names(agents)]
    read = await asyncio.gather(*asked)
    took = (time.perf_counter() - began) * 1e3
    assert all(read), f"bytes read, by agent: {read}"
    return took


async def _fork(engine: "Engine") -> tuple[float, int | None]:
    """Return (ms, bytes that the process gave to the disk)."""
    before = process_writes("self")
    began = time.perf_counter()
    await engine.forks.fork(key_of(_FIRST), "fork", None)
    took = (time.perf_counter() - began) * 1e3
    after = process_writes("self")
    await engine.agents.delete(key_of("fork"))  # it would hold the blocks in RAM
    return took, None if before is None or after is None else after - before


def _row(source: Source, agents: int, files: list[Path], times: _Times) -> RestoreRow:
    nbytes = sum(path.stat().st_size for path in files)
    raw = spread(times.raw)
    restore = spread(times.restore)
    return RestoreRow(
        source=source,
        agents=agents,
        bytes=nbytes,
        files=len(files),
        raw_ms=raw,
        restore_ms=restore,
        raw_bytes_per_s=int(nbytes / raw.median * 1e3),
        restore_bytes_per_s=int(nbytes / restore.median * 1e3),
        restore_over_raw=round(restore.median / raw.median, 2),
    )


def tables(result: RestoreResult) -> list[Shown]:
    lines = table(
        "from",
        "agents",
        "bytes",
        "files",
        "read ms",
        "restore ms",
        "read /s",
        "restore /s",
        "restore/read",
    )
    for row in result.rows:
        lines.add_row(
            row.source,
            str(row.agents),
            size(row.bytes),
            str(row.files),
            f"{row.raw_ms.median:,.1f}",
            f"{row.restore_ms.median:,.1f}",
            size(row.raw_bytes_per_s),
            size(row.restore_bytes_per_s),
            f"{row.restore_over_raw:.1f}x",
        )
    fork = f"A fork: {result.fork_ms.median:.1f} ms"
    if result.fork_written_bytes:
        fork += f", {size(result.fork_written_bytes.median)} written"
    passes = f"medians of {result.passes} passes"
    return [f"Agents of {result.tokens:,} tokens, {result.model}, {passes}", lines, fork]


Tokens = Annotated[int, typer.Option(min=64, help="tokens of an agent")]
Agents = Annotated[
    int, typer.Option(min=2, help="agents that come back at once, besides one alone")
]


@benchmark(tables)
def restore(
    shared: Shared, tokens: Tokens = 4000, agents: Agents = 4, passes: Passes = 9
) -> RestoreResult:
    """Bytes a second from disk into RAM, verified, beside reading the same files and copying them
    once; cost of a fork.

    JSON: {"rows": [{"source", "agents", "bytes", "raw_ms", "restore_ms", "raw_bytes_per_s",
    "restore_bytes_per_s", "restore_over_raw"}], "fork_ms", "fork_written_bytes"}.
    """
    with shared.run() as run:
        ids = run.prompts.ids(tokens)
        loaded = run.load()
        done = run.task("restoring", passes + 1)
        found = measure(run, loaded, ids, agents, passes=passes, done=done)
        return RestoreResult(**found, **run.head(passes))
