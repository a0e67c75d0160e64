"""`agentmem bench restore`: how fast agents come back from disk."""

from typing import TYPE_CHECKING, Annotated

import typer

from ..cli.agents import size, table
from .common import Passes, Shared, Shown, benchmark

if TYPE_CHECKING:
    from ..bench.restore import RestoreResult


@benchmark
def restore(
    shared: Shared,
    tokens: Annotated[int, typer.Option(min=64, help="tokens of an agent")] = 4000,
    agents: Annotated[
        int, typer.Option(min=2, help="agents that come back at once, besides one alone")
    ] = 4,
    passes: Passes = 9,
) -> "RestoreResult":
    """Bytes a second from disk into RAM, verified, beside reading the same files and copying them
    once; cost of a fork.

    JSON: {"rows": [{"source", "agents", "bytes", "raw_ms", "restore_ms", "raw_bytes_per_s",
    "restore_bytes_per_s", "restore_over_raw"}], "fork_ms", "fork_written_bytes"}.
    """
    with shared.run() as run:
        from ..bench import restore as bench

        ids, loaded = run.prompts().ids(tokens), run.load()
        done = run.task("restoring", passes + 1)
        found = bench.measure(run.session, run.settings, loaded, ids, agents, passes, done)
        return bench.RestoreResult(**found, **run.head(passes))


def tables(result: "RestoreResult") -> list[Shown]:
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
        times = f"{row.raw_ms.median:,.1f}", f"{row.restore_ms.median:,.1f}"
        speeds = (
            size(row.raw_bytes_per_s),
            size(row.restore_bytes_per_s),
            f"{row.restore_over_raw:.1f}x",
        )
        lines.add_row(row.source, str(row.agents), size(row.bytes), str(row.files), *times, *speeds)
    written = (
        f", {size(result.fork_written_bytes.median)} written" if result.fork_written_bytes else ""
    )
    title = f"Agents of {result.tokens:,} tokens, {result.model}, medians of {result.passes} passes"
    return [title, lines, f"A fork: {result.fork_ms.median:.1f} ms{written}"]
