"""What a benchmark writes: the same head for all, then rows of its own.

benchmarks/schemas/ has the JSON schemas.
"""

import statistics
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict

from ... import __version__


class ResultPart(BaseModel):
    model_config = ConfigDict(extra="forbid", json_schema_serialization_defaults_required=True)


class Spread(ResultPart):
    """Several measurements of one thing."""

    median: float
    min: float
    max: float
    values: list[float]


def spread(values: Sequence[float], digits: int = 2) -> Spread:
    """Summarize measurements, each rounded to so many digits after the point."""
    rounded = [round(v, digits) for v in values]
    return Spread(
        median=round(statistics.median(values), digits),
        min=min(rounded),
        max=max(rounded),
        values=rounded,
    )


class Ttft(ResultPart):
    """Time to first token in ms: the median, and what it is the median of."""

    ttft_ms: float
    min_ms: float
    max_ms: float
    values_ms: list[float]


def ttft(values: Sequence[float]) -> Ttft:
    """Summarize times to first token, in ms."""
    of = spread(values)
    return Ttft(ttft_ms=of.median, min_ms=of.min, max_ms=of.max, values_ms=of.values)


class Noise(ResultPart):
    """A fixed computation's time before and after the run; quiet: within 10 %."""

    probe_before_ms: float
    probe_after_ms: float
    change: float
    quiet: bool


class Result(ResultPart):
    """The head. Each benchmark adds `rows`."""

    benchmark: str
    agentmem: str = __version__
    date: str
    machine: dict[str, Any]
    model: str
    settings: dict[str, Any]  # those not at their default
    passes: int
    noise: Noise
