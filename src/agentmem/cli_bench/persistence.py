"""`agentmem bench persistence`: what is left after a restart and after a kill."""

from typing import TYPE_CHECKING, Annotated

import typer

from ..cli.agents import table
from .common import Passes, Shared, Shown, benchmark

if TYPE_CHECKING:
    from ..bench.persistence import PersistenceResult


@benchmark
def persistence(
    shared: Shared,
    context: Annotated[int, typer.Option(min=64, help="prompt tokens")] = 2000,
    passes: Passes = 3,
) -> "PersistenceResult":
    """What an agent still has after its server was stopped, killed at rest, or killed right after
    an answer.

    JSON: {"rows": [{"ending", "cold": {"ttft_ms"}, "restarted": {"ttft_ms"}, "lost_tokens",
    "same_answers", ...}]}.
    """
    with shared.run() as run:
        from ..bench import persistence as bench

        done = run.task("stopping and killing", passes * len(bench.ENDINGS))
        rows = bench.measure(
            run.session, run.settings, run.model, run.prompts(), context, passes, done
        )
        return bench.PersistenceResult(rows=rows, **run.head(passes))


def tables(result: "PersistenceResult") -> list[Shown]:
    lines = table(
        "ending",
        "cold ms",
        "restarted ms",
        "cold/restarted",
        "lost tokens",
        "same answers",
        "ready s",
    )
    for row in result.rows:
        speedup = row.cold.ttft_ms / row.restarted.ttft_ms
        times = f"{row.cold.ttft_ms:,.0f}", f"{row.restarted.ttft_ms:,.0f}", f"{speedup:.1f}x"
        lost = f"{row.lost_tokens.median:,.0f}"
        lines.add_row(
            row.ending,
            *times,
            lost,
            "yes" if row.same_answers else "no",
            f"{row.ready_s.median:.1f}",
        )
    tokens = result.rows[0].prompt_tokens
    return [
        f"An agent of {tokens:,} tokens, {result.model}, medians of {result.passes} passes",
        lines,
    ]
