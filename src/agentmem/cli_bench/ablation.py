"""`agentmem bench ablation`: each component off in turn."""

from typing import TYPE_CHECKING, Annotated

import typer

from ..cli.agents import table
from ..errors import StartupError
from .common import Passes, Shared, Shown, benchmark

if TYPE_CHECKING:
    from ..bench.ablation import AblationResult

_NAMES = "persistence,quantization,rotation,batching,splice,overlap"


@benchmark
def ablation(
    shared: Shared,
    components: Annotated[str, typer.Option(help="comma-separated")] = _NAMES,
    context: Annotated[int, typer.Option(min=64, help="prompt tokens, more than a block")] = 640,
    passes: Passes = 3,
) -> "AblationResult":
    """What each component is good for: the same work with it and without it, in turns, in process.

    Without persistence the store is empty after a restart; without quantization blocks are in the
    model's own dtype; without rotation codes are made of keys and values as they are; without
    batching answers come one after the other; without splice each prompt is tokenized anew; without
    overlap decode waits for every read.

    JSON: {"rows": [{"component", "measure", "unit", "better", "on": {"median", "min", "max"},
    "off", "off_over_on"}]}.
    """
    names = [name.strip() for name in components.split(",") if name.strip()]
    if unknown := [name for name in names if name not in _NAMES.split(",")] or not names:
        raise StartupError(
            f"--components {unknown if names else components!r}: choose from {_NAMES}"
        )
    with shared.run() as run:
        from ..bench import ablation as bench

        if context <= (block := run.settings.block_size):
            raise StartupError(
                f"--context {context}: only what is longer than a block, {block} tokens, is ever coded"
            )
        work = bench.Bench(run.session, run.settings, run.load(), run.prompts(), context)
        done = run.task("with and without", len(names) * passes * 2)
        rows = list(bench.measure(work, names, passes, done))
        return bench.AblationResult(context=context, rows=rows, **run.head(passes))


def tables(result: "AblationResult") -> list[Shown]:
    lines = table(
        "component", "measure", "with", "without", "without/with", "unit", "better", left=2
    )
    for row in result.rows:
        ratio = "-" if row.off_over_on is None else f"{row.off_over_on:.2f}x"
        values = (
            f"{v.median:,.5f}" if row.unit == "nats" else f"{v.median:,.1f}"
            for v in (row.on, row.off)
        )
        lines.add_row(row.component, row.measure, *values, ratio, row.unit, row.better)
    return [f"{result.model}, {result.context:,} tokens, medians of {result.passes} passes", lines]
