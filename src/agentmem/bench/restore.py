"""How fast agents come back from disk, beside reading the same files and copying them once; and
what a fork costs.

In process: the engine evicts the agents, then prefetches them: their codes are read, verified and
made into arrays, before a warm request makes its working copy of them. Once with the files in the
system's cache, once without (Linux, where the directory is on a disk). One agent is computed, the
others are imported from its export.
"""

import asyncio
import io
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from ..agent_key import AgentKey
from ..config import Settings
from ..engine.engine import Engine
from ..models.loading import LoadedModel
from .in_process import NAMESPACE, ask_engine, running_engine
from .machine import process_writes
from .result import Part, Result, Spread, spread
from .session import Session

Source = Literal["system's cache", "disk"]
_FIRST = "agent-0"


class RestoreRow(Part):
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


def measure(
    session: Session,
    settings: Settings,
    loaded: LoadedModel,
    tokens: list[int],
    agents: int,
    passes: int,
    done: Callable[[], None],
) -> dict[str, Any]:
    """The result's own fields. `done` is told when the agents are there, and of each pass."""
    # each with files of its own, as agents have that are not copies
    settings = settings.model_copy(
        update={"home": session.directory / "engine", "sharing": "agent"}
    )
    with running_engine(settings, loaded) as (engine, run):
        return {"tokens": len(tokens)} | run(
            _measure(engine, settings.store_dir, tokens, agents, passes, done)
        )


async def _measure(
    engine: Engine,
    store: Path,
    tokens: list[int],
    agents: int,
    passes: int,
    done: Callable[[], None],
) -> dict[str, Any]:
    await _build(engine, tokens, 1)
    await engine.evict_agent(AgentKey(NAMESPACE, _FIRST))
    of_one = _files(store)
    await _build(engine, tokens, agents)
    for name in _names(agents):
        await engine.evict_agent(AgentKey(NAMESPACE, name))
    of_all = _files(store)
    done()
    times: dict[tuple[Source, int], tuple[list[float], list[float]]] = {}
    forks: list[float] = []
    written: list[float] = []
    for number in range(passes):
        for source in _sources(store):
            for count, files in ((1, of_one), (agents, of_all)):
                raw, restore = times.setdefault((source, count), ([], []))
                for reading in (
                    (True, False) if number % 2 else (False, True)
                ):  # what comes second may find it easier
                    _prepare(of_all, source)
                    if reading:
                        raw.append(_read_ms(files))
                        continue
                    restore.append(await _restore_ms(engine, count))
                    for name in _names(agents):
                        await engine.evict_agent(AgentKey(NAMESPACE, name))
        took, nbytes = await _fork(engine)
        forks.append(took)
        written += [] if nbytes is None else [nbytes]
        done()
    rows = [_row(source, n, of_one if n == 1 else of_all, *t) for (source, n), t in times.items()]
    return {
        "rows": rows,
        "fork_ms": spread(forks),
        "fork_written_bytes": spread(written) if written else None,
    }


async def _build(engine: Engine, tokens: list[int], agents: int) -> None:
    """As many agents of the same tokens; the first is computed if need be."""
    await ask_engine(engine, _FIRST, tokens)
    export = await engine.export_agent(AgentKey(NAMESPACE, _FIRST))
    archive = b"".join(export.chunks)
    await asyncio.to_thread(export.close)
    for name in _names(agents)[1:]:
        await engine.import_agent(NAMESPACE, name, io.BytesIO(archive))


def _names(agents: int) -> list[str]:
    return [f"agent-{i}" for i in range(agents)]


def _files(store: Path) -> list[Path]:
    return [
        path
        for kind in ("blocks", "tails")
        for path in sorted(store.glob(f"*/{kind}/**/*"))
        if path.is_file()
    ]


def _sources(directory: Path) -> tuple[Source, ...]:
    """A file system in RAM, as /tmp often is, has no disk to read from."""
    number = directory.stat().st_dev
    mounts = Path("/proc/self/mountinfo")
    device = f" {os.major(number)}:{os.minor(number)} "
    lines = (
        [line for line in mounts.read_text().splitlines() if device in line]
        if mounts.exists()
        else []
    )
    in_ram = any(" - tmpfs " in line for line in lines)
    return (
        ("system's cache", "disk")
        if hasattr(os, "posix_fadvise") and not in_ram
        else ("system's cache",)
    )


def _prepare(files: list[Path], source: Source) -> None:
    """In the system's cache, or out of it."""
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


async def _restore_ms(engine: Engine, agents: int) -> float:
    assert not any(agent.ram_bytes for agent in await engine.agents(NAMESPACE))
    began = time.perf_counter()
    read = await asyncio.gather(
        *(engine.prefetch_agent(AgentKey(NAMESPACE, name)) for name in _names(agents))
    )
    took = (time.perf_counter() - began) * 1e3
    assert all(read), f"bytes read, by agent: {read}"
    return took


async def _fork(engine: Engine) -> tuple[float, int | None]:
    """(ms, bytes that the process gave to the disk)."""
    before, began = process_writes("self"), time.perf_counter()
    await engine.fork_agent(AgentKey(NAMESPACE, _FIRST), "fork", None)
    took, after = (time.perf_counter() - began) * 1e3, process_writes("self")
    await engine.delete_agent(AgentKey(NAMESPACE, "fork"))  # it would hold the blocks in RAM
    return took, None if before is None or after is None else after - before


def _row(
    source: Source, agents: int, files: list[Path], raw: list[float], restore: list[float]
) -> RestoreRow:
    nbytes, of_raw, of_restore = (
        sum(path.stat().st_size for path in files),
        spread(raw),
        spread(restore),
    )
    return RestoreRow(
        source=source,
        agents=agents,
        bytes=nbytes,
        files=len(files),
        raw_ms=of_raw,
        restore_ms=of_restore,
        raw_bytes_per_s=int(nbytes / of_raw.median * 1e3),
        restore_bytes_per_s=int(nbytes / of_restore.median * 1e3),
        restore_over_raw=round(of_restore.median / of_raw.median, 2),
    )
