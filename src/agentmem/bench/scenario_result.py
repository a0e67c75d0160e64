"""Figures of a scenario: turn by turn, phase by phase, and in all."""

import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from .harness.result import Result, ResultPart, Spread, Ttft, spread, ttft
from .scenario_checks import CheckRow, Said
from .scenario_file import Mode, Scenario


class TurnRow(Said):
    cache: str
    prompt_tokens: int
    cached_tokens: int
    prefilled_tokens: int
    completion_tokens: int
    ttft_ms: float
    wall_ms: float
    same_answer: bool  # as in the mode that ran first


class TtftFactor(ResultPart):
    """How many times as long another one's time to first token is."""

    median: float
    mean: float


class PhaseRow(ResultPart):
    """Token counts and caches are of one pass; times of all."""

    phase: str
    mode: str
    turns: int
    cache: dict[str, int]  # turns by cache state
    prompt_tokens: int
    cached_tokens: int
    prefilled_tokens: int
    completion_tokens: int
    ttft: Ttft
    ttft_mean_ms: float
    wall_s: Spread
    restart_s: Spread | None  # from the last answer before it to a server that is ready
    over_persistent: TtftFactor | None = None
    faster_than: dict[str, TtftFactor]  # by the earlier phase that the scenario names, same mode


class ModeTotal(ResultPart):
    mode: str
    prompt_tokens: int
    prefilled_tokens: int
    wall_s: Spread
    restart_s: Spread
    persistent_saves: float | None  # share of this mode's wall time


class ScenarioResult(Result):
    benchmark: Literal["scenario"] = "scenario"
    scenario: str
    description: str
    modes: list[Mode]
    rows: list[PhaseRow]
    totals: list[ModeTotal]
    answers_equal: bool
    checks: list[CheckRow]
    turns: list[TurnRow]


ByPhase = dict[tuple[str, str], list[float]]


@dataclass
class PhaseTimes:
    """Times of each pass in s, by (mode, phase)."""

    wall: ByPhase = field(default_factory=lambda: defaultdict(list))
    restart: ByPhase = field(default_factory=lambda: defaultdict(list))


def phase_rows(
    scenario: Scenario, modes: Sequence[str], turns: Sequence[TurnRow], times: PhaseTimes
) -> list[PhaseRow]:
    """Make a row of each phase in each mode."""
    by: dict[tuple[str, str], list[TurnRow]] = {}
    for turn in turns:
        by.setdefault((turn.mode, turn.phase), []).append(turn)
    rows = []
    for phase in scenario.phases:
        for mode in modes:
            these = by[mode, phase.name]
            row = _phase_row(these, times)
            if mode != "persistent" and "persistent" in modes:
                row.over_persistent = _factor(these, by["persistent", phase.name])
            if phase.faster_than:
                earlier = by[mode, phase.faster_than]
                row.faster_than = {phase.faster_than: _factor(earlier, these)}
            rows.append(row)
    return rows


def _phase_row(turns: Sequence[TurnRow], times: PhaseTimes) -> PhaseRow:
    """Make the row of one phase in one mode."""
    mode = turns[0].mode
    phase = turns[0].phase
    key = (mode, phase)
    once = [t for t in turns if t.run == 0]
    return PhaseRow(
        phase=phase,
        mode=mode,
        turns=len(once),
        cache=dict(Counter(t.cache for t in once)),
        prompt_tokens=sum(t.prompt_tokens for t in once),
        cached_tokens=sum(t.cached_tokens for t in once),
        prefilled_tokens=sum(t.prefilled_tokens for t in once),
        completion_tokens=sum(t.completion_tokens for t in once),
        ttft=ttft([t.ttft_ms for t in turns]),
        ttft_mean_ms=round(statistics.fmean(t.ttft_ms for t in turns), 2),
        wall_s=spread(times.wall[key]),
        restart_s=spread(times.restart[key]) if key in times.restart else None,
        faster_than={},
    )


def _factor(longer: Sequence[TurnRow], shorter: Sequence[TurnRow]) -> TtftFactor:
    above = [t.ttft_ms for t in longer]
    below = [t.ttft_ms for t in shorter]
    return TtftFactor(
        median=round(statistics.median(above) / statistics.median(below), 2),
        mean=round(statistics.mean(above) / statistics.mean(below), 2),
    )


def totals(modes: Sequence[str], turns: Sequence[TurnRow], times: PhaseTimes) -> list[ModeTotal]:
    """Make a row of each mode, over all phases."""
    wall = {mode: _sums(times.wall, mode) for mode in modes}
    made = []
    for mode in modes:
        once = [t for t in turns if (t.mode, t.run) == (mode, 0)]
        saves = None
        if mode != "persistent" and "persistent" in wall:
            persistent = statistics.median(wall["persistent"])
            saves = round(1 - persistent / statistics.median(wall[mode]), 3)
        total = ModeTotal(
            mode=mode,
            prompt_tokens=sum(t.prompt_tokens for t in once),
            prefilled_tokens=sum(t.prefilled_tokens for t in once),
            wall_s=spread(wall[mode]),
            restart_s=spread(_sums(times.restart, mode) or [0.0]),
            persistent_saves=saves,
        )
        made.append(total)
    return made


def _sums(times: Mapping[tuple[str, str], list[float]], mode: str) -> list[float]:
    """Return one mode's sum over all phases, of each pass."""
    by_phase = [values for (of, _), values in times.items() if of == mode]
    return [sum(one_pass) for one_pass in zip(*by_phase, strict=True)]
