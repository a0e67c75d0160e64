"""`agentmem bench staggered`: agents that arrive while others work."""

from typing import TYPE_CHECKING, Annotated

import typer

from ..cli.agents import table
from ..errors import StartupError
from .common import Passes, Shared, Shown, benchmark

if TYPE_CHECKING:
    from ..bench.staggered import StaggeredResult

Context = Annotated[
    int, typer.Option(min=64, help="tokens of A's cold prompt, and of each of the pair")
]


@benchmark
def staggered(
    shared: Shared,
    context: Context = 2000,
    passes: Passes = 3,
) -> "StaggeredResult":
    """Warm agents B that arrive while A prefills a long cold prompt and C answers: who waits how
    long for whom.

    Then the paper's staggered arrivals: two cold agents, the second 2 s after the first, beside one
    after the other.

    JSON: {"meanwhile": {"b": {"ttft_ms": ..}, "b_alone": {..}, "a_finish_ms": {"median": ..},
    "a_delay", "c_gap_ms": {"median", "p99", "max"}, ..}, "pair": {"wall_ms", "wall_ratio",
    "second", ..}, "timeline": [{"agent", "asked_s", "tokens_s"}, ..]}.
    """
    with shared.run() as run:
        from ..bench import staggered as bench

        limit = run.max_context
        if max(context, bench.B_CONTEXT) + 64 > limit:
            raise StartupError(
                f"--context {context} and an answer are more than the model's context of {limit} tokens"
            )
        done = run.task("arriving", passes * bench.ROUNDS)
        prompts = run.prompts()
        samples = bench.measure(
            run.session, run.settings, run.model, prompts, context, limit, passes, done
        )
        return bench.StaggeredResult(
            context=context,
            b_context=bench.B_CONTEXT,
            meanwhile=bench.meanwhile_of(samples),
            pair=bench.pair_of(samples),
            timeline=samples.timeline,
            **run.head(passes),
        )


def tables(result: "StaggeredResult") -> list[Shown]:
    of, pair = result.meanwhile, result.pair
    a, b, c = (
        f"A prefills {result.context:,} tokens",
        f"B, warm, {result.b_context:,} tokens",
        "C answers",
    )
    lines = table("ms, medians", "together", "alone", "")
    lines.add_row(
        f"{b}: first token",
        f"{of.b.ttft_ms:,.0f}",
        f"{of.b_alone.ttft_ms:,.0f}",
        f"{of.b_over_alone:.1f}x",
    )
    without_b = f"{of.a_finish_without_b_ms.median:,.0f} without B"
    lines.add_row(f"{a}: done", f"{of.a_finish_ms.median:,.0f}", without_b, f"{of.a_delay:+.1%}")
    for name in ("median", "p99", "max"):
        gaps = [f"{getattr(gap, name):,.0f}" for gap in (of.c_gap_ms, of.c_gap_alone_ms)]
        lines.add_row(f"{c}: between two tokens, {name}", *gaps, "")
    shown: list[Shown] = [f"{result.model}, over HTTP, {result.passes} passes", lines]
    lines = table("two cold agents, ms", "2 s apart", "one after the other", "")
    lines.add_row(
        "wall time",
        f"{pair.wall_ms.median:,.0f}",
        f"{pair.sequential_wall_ms.median:,.0f}",
        f"{pair.wall_ratio:.2f}x",
    )
    ratio = f"{pair.second_over_sequential:.2f}x"
    lines.add_row(
        "first token of the second",
        f"{pair.second.ttft_ms:,.0f}",
        f"{pair.sequential.ttft_ms:,.0f}",
        ratio,
    )
    return [
        *shown,
        lines,
        "The paper's pair: 4K tokens each on an M4 Pro, wall time 1x, first token of the second 2x",
    ]
