"""Each component on, and off: what it is good for, on the same prompts, in turns, in one process.

persistence   the store is there after a restart, or empty
quantization  4 bits, or the model's own dtype
rotation      keys and values rotated by a Hadamard matrix before they become codes, or not
batching      four agents decode at once, or one after the other
splice        cached token ids are kept where the text agrees, or every prompt is tokenized anew
overlap       blocks are read while others decode, or while they wait
"""

from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ..cli.show import table
from ..errors import StartupError
from .harness.options import Passes, Shared, Shown, benchmark
from .harness.result import Result, ResultPart, Spread, spread

if TYPE_CHECKING:
    from .ablation_components import Ablation

COMPONENTS = ("persistence", "quantization", "rotation", "batching", "splice", "overlap")
# by how the measure's name begins; else ms
_UNITS = {
    "RAM": "MB",
    "KL": "nats",
    "change": "%",
    "tokens": "tokens",
    "4 answers": "tokens/s",
}


class AblationRow(ResultPart):
    component: str
    measure: str
    unit: str
    better: Literal["lower", "higher"]
    on: Spread
    off: Spread
    off_over_on: float | None  # of the medians; None where on is 0


class AblationResult(Result):
    benchmark: Literal["ablation"] = "ablation"
    context: int
    rows: list[AblationRow]


@dataclass
class _Values:
    """One measure, by pass."""

    on: list[float] = field(default_factory=list)
    off: list[float] = field(default_factory=list)


def measure(
    ablation: "Ablation", components: list[str], passes: int, done: Callable[[], None]
) -> Iterator[AblationRow]:
    """Measure each component `passes` times on and off, in turns, both on the same prompts.

    `done` is told of each.
    """
    from .ablation_components import MEASURES, persistence

    persistence(ablation, on=True)  # warm-up
    for component in components:
        measured: dict[str, _Values] = {}
        for _ in range(passes):
            for on in (True, False):
                same = replace(ablation, prompts=copy(ablation.prompts))
                for name, value in MEASURES[component](same, on).items():
                    values = measured.setdefault(name, _Values())
                    (values.on if on else values.off).append(value)
                done()
            ablation = same
            ablation.session.cool_down()
        for name, values in measured.items():
            yield _row(component, name, values)


def _row(component: str, name: str, values: _Values) -> AblationRow:
    unit = next((unit for start, unit in _UNITS.items() if name.startswith(start)), "ms")
    digits = 5 if unit == "nats" else 2
    on = spread(values.on, digits)
    off = spread(values.off, digits)
    return AblationRow(
        component=component,
        measure=name,
        unit=unit,
        better="higher" if unit == "tokens/s" else "lower",
        on=on,
        off=off,
        off_over_on=round(off.median / on.median, 3) if on.median else None,
    )


def tables(result: AblationResult) -> list[Shown]:
    lines = table(
        "component", "measure", "with", "without", "without/with", "unit", "better", left=2
    )
    for row in result.rows:
        digits = 5 if row.unit == "nats" else 1
        lines.add_row(
            row.component,
            row.measure,
            f"{row.on.median:,.{digits}f}",
            f"{row.off.median:,.{digits}f}",
            "-" if row.off_over_on is None else f"{row.off_over_on:.2f}x",
            row.unit,
            row.better,
        )
    passes = f"medians of {result.passes} passes"
    return [f"{result.model}, {result.context:,} tokens, {passes}", lines]


@benchmark(tables)
def ablation(
    shared: Shared,
    components: Annotated[str, typer.Option(help="comma-separated")] = ",".join(COMPONENTS),
    context: Annotated[int, typer.Option(min=64, help="prompt tokens, more than a block")] = 640,
    passes: Passes = 3,
) -> AblationResult:
    """What each component is good for: the same work with it and without it, in turns, in process.

    Without persistence the store is empty after a restart; without quantization blocks are in the
    model's own dtype; without rotation codes are made of keys and values as they are; without
    batching answers come one after the other; without splice each prompt is tokenized anew; without
    overlap decode waits for every read.

    JSON: {"rows": [{"component", "measure", "unit", "better", "on": {"median", "min", "max"},
    "off", "off_over_on"}]}.
    """
    names = _chosen(components)
    with shared.run() as run:
        from .ablation_components import Ablation

        block = run.settings.block_size
        if context <= block:
            raise StartupError(
                f"--context {context}: only what is longer than a block, {block} tokens, "
                "is ever coded"
            )
        work = Ablation(
            session=run.session,
            settings=run.settings,
            loaded=run.load(),
            prompts=run.prompts,
            context=context,
        )
        done = run.task("with and without", len(names) * passes * 2)
        rows = list(measure(work, names, passes, done))
        return AblationResult(context=context, rows=rows, **run.head(passes))


def _chosen(components: str) -> list[str]:
    """Return the names in an option's text. Raises StartupError."""
    names = [name.strip() for name in components.split(",") if name.strip()]
    unknown = [name for name in names if name not in COMPONENTS]
    if unknown or not names:
        wrong = unknown if names else repr(components)
        raise StartupError(f"--components {wrong}: choose from {','.join(COMPONENTS)}")
    return names
