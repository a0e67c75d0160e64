"""What a conversation writes to disk, against what of it is there in the end.

One agent talks to a server over HTTP, turn by turn, and rests after each long enough for its tail
to be written, if it ever is before the server stops. Written: every byte of block and tail files;
and, on Linux, all that the process gave to the disk, the manifest and its log included. Kept: the
bytes of the files that are left.
"""

import time
from collections.abc import Callable
from typing import Annotated, Any, Literal

import typer

from ..cli.show import size
from ..config import Settings
from ..store.upkeep.fsck import store_stats, stores
from .harness.corpus import Prompts
from .harness.machine import process_writes
from .harness.options import BenchRun, Shared, Shown, benchmark
from .harness.result import Result, ResultPart
from .harness.server import BenchError, ChatMessages, Server

# s, instead of 3 and more, so that this takes minutes; in proportion
TAIL_DELAY = 0.2
REST = 0.6
_ANSWER = 16  # tokens


class WriteRow(ResultPart):
    turn: int
    tokens: int  # new ones
    bytes: int  # written by the end of its rest


class WriteResult(Result):
    benchmark: Literal["write"] = "write"
    rows: list[WriteRow]
    tokens: int
    written_bytes: int
    kept_bytes: int
    amplification: float  # written over kept
    # given to the disk by the whole process before it stopped; Linux only
    process_bytes: int | None
    # first and second half of the turns: equal if writing is incremental
    bytes_per_token_halves: tuple[float, float]


def measure(run: BenchRun, turns: int, tokens: int, done: Callable[[], None]) -> dict[str, Any]:
    """Return the result's own fields."""
    home = run.session.directory / "write"
    chosen = run.settings.model_dump(include=run.settings.model_fields_set)
    settings = Settings(**chosen | {"tail_delay": TAIL_DELAY})
    with run.server(home, settings) as server:
        before = process_writes(server.process.pid)
        rows = _converse(server, run.prompts, turns, tokens, done=done)
        after = process_writes(server.process.pid)
    (layout,) = stores(home / "store")
    stats = store_stats(layout)
    kept = stats.block_bytes + stats.tail_bytes
    written = sum(stats.bytes_written_by_hour.values())
    if not kept:
        raise BenchError("nothing was kept: is the disk full?")
    half = len(rows) // 2
    return {
        "rows": rows,
        "tokens": sum(row.tokens for row in rows),
        "written_bytes": written,
        "kept_bytes": kept,
        "amplification": round(written / kept, 3),
        "process_bytes": None if before is None or after is None else after - before,
        "bytes_per_token_halves": (_bytes_per_token(rows[:half]), _bytes_per_token(rows[half:])),
    }


def _bytes_per_token(rows: list[WriteRow]) -> float:
    return round(sum(row.bytes for row in rows) / sum(row.tokens for row in rows), 1)


def _converse(
    server: Server, prompts: Prompts, turns: int, tokens: int, *, done: Callable[[], None]
) -> list[WriteRow]:
    messages: ChatMessages = []
    rows = []
    written = 0
    held = 0
    for turn in range(1, turns + 1):
        question = prompts.text(max(8, tokens // turns - 24))
        messages.append({"role": "user", "content": question})
        answer = server.ask("agent", messages, _ANSWER)
        messages.append({"role": "assistant", "content": answer.text})
        time.sleep(REST)
        health = server.client.get(server.url.removesuffix("/v1") + "/health").json()
        now = health["store"]["bytes_written"]
        total = answer.usage["total_tokens"]
        rows.append(WriteRow(turn=turn, tokens=total - held, bytes=now - written))
        written = now
        held = total
        done()
    return rows


def tables(result: WriteResult) -> list[Shown]:
    first, second = result.bytes_per_token_halves
    shown: list[Shown] = [
        f"{len(result.rows)} turns, {result.tokens:,} tokens, {result.model}: "
        f"{size(result.written_bytes)} written, {size(result.kept_bytes)} kept: "
        f"{result.amplification:.2f} bytes for each",
        f"a token wrote {first:,.0f} bytes in the first half of the turns, "
        f"{second:,.0f} in the second",
    ]
    if result.process_bytes is not None:
        shown.append(
            f"the server gave the disk {size(result.process_bytes)} before it stopped, "
            "its database included"
        )
    return shown


@benchmark(tables)
def write(
    shared: Shared,
    turns: Annotated[int, typer.Option(min=2, help="turns of the conversation")] = 40,
    tokens: Annotated[int, typer.Option(min=64, help="about, at the end")] = 4000,
) -> WriteResult:
    """Write amplification: bytes that a conversation writes over the bytes that it keeps.

    JSON: {"rows": [{"turn", "tokens", "bytes"}], "written_bytes", "kept_bytes", "amplification",
    ...}.
    """
    with shared.run() as run:
        run.check_context(tokens + 64, f"--tokens {tokens}")
        found = measure(run, turns, tokens, run.task("conversing", turns))
        return WriteResult(**found, **run.head(1))
