"""What a conversation writes to disk, against what of it is there in the end.

One agent talks to a server over HTTP, turn by turn, and rests after each long enough for its tail
to be written, if it ever is before the server stops. Written: every byte of block and tail files;
and, on Linux, all that the process gave to the disk, the manifest and its log included. Kept: the
bytes of the files that are left.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from ..config import Settings
from ..store.upkeep.fsck import store_stats, stores
from .machine import process_writes
from .prompts import Prompts
from .result import Part, Result
from .server import BenchError, Messages, Server
from .session import Session

TAIL_DELAY, REST = 0.2, 0.6  # s, instead of 3 and more, so that this takes minutes; in proportion
_ANSWER = 16  # tokens


class WriteRow(Part):
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
    process_bytes: (
        int | None
    )  # given to the disk by the whole process before it stopped; Linux only
    bytes_per_token_halves: tuple[
        float, float
    ]  # first and second half of the turns: equal if writing is incremental


def measure(
    session: Session,
    settings: Settings,
    model: Path,
    prompts: Prompts,
    turns: int,
    tokens: int,
    done: Callable[[], None],
) -> dict[str, Any]:
    """The result's own fields."""
    home = session.directory / "write"
    settings = Settings(
        **settings.model_dump(include=settings.model_fields_set) | {"tail_delay": TAIL_DELAY}
    )
    with Server(session, settings, model, home) as server:
        before = process_writes(server.process.pid)
        rows = _converse(server, prompts, turns, tokens, done)
        after = process_writes(server.process.pid)
    (layout,) = stores(home / "store")
    stats = store_stats(layout)
    kept, written = stats.block_bytes + stats.tail_bytes, sum(stats.bytes_written_by_hour.values())
    if not kept:
        raise BenchError("nothing was kept: is the disk full?")
    half = len(rows) // 2
    halves = [
        round(sum(r.bytes for r in part) / sum(r.tokens for r in part), 1)
        for part in (rows[:half], rows[half:])
    ]
    return {
        "rows": rows,
        "tokens": sum(row.tokens for row in rows),
        "written_bytes": written,
        "kept_bytes": kept,
        "amplification": round(written / kept, 3),
        "process_bytes": None if before is None or after is None else after - before,
        "bytes_per_token_halves": halves,
    }


def _converse(
    server: Server, prompts: Prompts, turns: int, tokens: int, done: Callable[[], None]
) -> list[WriteRow]:
    messages: Messages = []
    rows, written, held = [], 0, 0
    for turn in range(1, turns + 1):
        messages.append({"role": "user", "content": prompts.text(max(8, tokens // turns - 24))})
        answer = server.ask("agent", messages, _ANSWER)
        messages.append({"role": "assistant", "content": answer.text})
        time.sleep(REST)
        now = server.client.get(server.url.removesuffix("/v1") + "/health").json()["store"][
            "bytes_written"
        ]
        total = answer.usage["total_tokens"]
        rows.append(WriteRow(turn=turn, tokens=total - held, bytes=now - written))
        written, held = now, total
        done()
    return rows
