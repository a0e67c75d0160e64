"""Figures of a scenario: turn by turn, phase by phase, and in all."""

import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from .result import Part, Result, Spread, Ttft, spread, ttft
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


class Factor(Part):
    """How many times as long another one's time to first token is."""

    median: float
    mean: float


class PhaseRow(Part):
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
    over_persistent: Factor | None = None
    faster_than: dict[str, Factor]  # by the earlier phase that the scenario names, same mode


class Total(Part):
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
    totals: list[Total]
    answers_equal: bool
    checks: list[CheckRow]
    turns: list[TurnRow]


@dataclass
class Times:
    """s, by (mode, phase), of each pass."""

    wall: dict[tuple[str, str], list[float]] = field(default_factory=lambda: defaultdict(list))
    restart: dict[tuple[str, str], list[float]] = field(default_factory=lambda: defaultdict(list))


def phase_rows(
    scenario: Scenario, modes: Sequence[str], turns: Sequence[TurnRow], times: Times
) -> list[PhaseRow]:
    by: dict[tuple[str, str], list[TurnRow]] = {}
    for turn in turns:
        by.setdefault((turn.mode, turn.phase), []).append(turn)
    rows = []
    for phase in scenario.phases:
        for mode in modes:
            row = _phase_row(by[mode, phase.name], times)
            if mode != "persistent" and "persistent" in modes:
                row.over_persistent = _factor(by[mode, phase.name], by["persistent", phase.name])
            if phase.faster_than:
                row.faster_than = {
                    phase.faster_than: _factor(by[mode, phase.faster_than], by[mode, phase.name])
                }
            rows.append(row)
    return rows


def _phase_row(turns: Sequence[TurnRow], times: Times) -> PhaseRow:
    """Of one phase in one mode."""
    key = mode, phase = turns[0].mode, turns[0].phase
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


def _factor(longer: Sequence[TurnRow], shorter: Sequence[TurnRow]) -> Factor:
    above, below = ([t.ttft_ms for t in turns] for turns in (longer, shorter))
    over = {f.__name__: round(f(above) / f(below), 2) for f in (statistics.median, statistics.mean)}
    return Factor(**over)


def totals(modes: Sequence[str], turns: Sequence[TurnRow], times: Times) -> list[Total]:
    wall = {mode: _sums(times.wall, mode) for mode in modes}
    made = []
    for mode in modes:
        once = [t for t in turns if (t.mode, t.run) == (mode, 0)]
        saves = None
        if mode != "persistent" and "persistent" in wall:
            saves = round(
                1 - statistics.median(wall["persistent"]) / statistics.median(wall[mode]), 3
            )
        total = Total(
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
    """Over all phases, of each pass."""
    return [
        sum(of)
        for of in zip(*(values for (m, _), values in times.items() if m == mode), strict=True)
    ]
