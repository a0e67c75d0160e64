"""Rows of a comparison of servers, made from its samples; and what a token takes in memory."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ..errors import ModelError
from .harness.contenders import AGENTMEM, MLX_LM, About, Contender
from .harness.model_config import read_config
from .harness.result import Result, ResultPart, Spread, Ttft, spread, ttft
from .harness.server import Server, TimedAnswer

CompareState = Literal["cold", "second_turn", "after_restart", "resumed"]
STATES: tuple[CompareState, ...] = ("cold", "second_turn", "after_restart", "resumed")


class CompareRow(ResultPart):
    server: str
    context: int  # tokens asked for
    cold: Ttft
    second_turn: Ttft  # its answer and a new question on top
    after_restart: Ttft | None  # the second turn once more; null for a server not started here
    resumed: Ttft | None  # restarted again, and a third turn on top
    prompt_tokens: dict[CompareState, list[int]]  # by state, as the server counts
    cached_tokens: dict[CompareState, list[int]]  # of these, as the server says
    # by state: agentmem's ttft_ms over this server's, of each pass
    agentmem_over: dict[CompareState, Spread] | None


class ServerDecodeRow(ResultPart):
    server: str
    batch: int
    context: int  # tokens asked for
    tokens_per_s: Spread  # of all together, by round
    # by round: agentmem's tokens/s over this server's, right before or after
    agentmem_over: Spread | None


class CacheRow(ResultPart):
    """Bytes a token of a conversation in memory; null where a server does not tell."""

    server: str
    context: int
    bytes_per_token: float | None
    # agentmem: of its whole blocks, less the unfinished one in full precision
    sealed_bytes_per_token: float | None
    over_fp16: float | None  # of sealed ones where there are any
    source: str


class CompareResult(Result):
    benchmark: Literal["compare"] = "compare"
    servers: list[About]
    rows: list[CompareRow]
    decode: list[ServerDecodeRow]
    # of the model's keys and values; null where their layout is not known
    fp16_bytes_per_token: int | None
    cache: list[CacheRow]


@dataclass
class CompareSamples:
    """The answers of one server over one context, by state."""

    answers: dict[CompareState, list[TimedAnswer]] = field(
        default_factory=lambda: {state: [] for state in STATES}
    )

    def asked(self) -> dict[CompareState, list[TimedAnswer]]:
        """Return those of the states that there are answers of."""
        return {state: answers for state, answers in self.answers.items() if answers}

    def times(self) -> dict[CompareState, list[float]]:
        """Return ms to the first token, by state."""
        times = {}
        for state, answers in self.asked().items():
            times[state] = [answer.ttft_ms for answer in answers]
        return times


def rows(samples: dict[int, dict[str, CompareSamples]]) -> list[CompareRow]:
    """Make the rows of samples by context and server."""
    made = []
    for context, by_server in samples.items():
        ours = by_server[AGENTMEM].times() if AGENTMEM in by_server else {}
        for name, of in by_server.items():
            made.append(_row(name, context, of, ours if name != AGENTMEM else {}))
    return made


def _row(
    name: str,
    context: int,
    samples: CompareSamples,
    ours: dict[CompareState, list[float]],
) -> CompareRow:
    """Make one server's row; `ours` are agentmem's times, where they are to stand beside."""
    times = samples.times()
    asked = samples.asked()
    over = {}
    for state in asked:
        if state in ours:
            over[state] = spread(_pairs(ours[state], times[state]), 4)
    prompt_tokens = {}
    cached_tokens = {}
    for state, answers in asked.items():
        prompt_tokens[state] = [answer.prompt_tokens for answer in answers]
        cached_tokens[state] = [answer.cached_tokens for answer in answers]
    return CompareRow(
        server=name,
        context=context,
        cold=ttft(times["cold"]),
        second_turn=ttft(times["second_turn"]),
        after_restart=ttft(times["after_restart"]) if "after_restart" in times else None,
        resumed=ttft(times["resumed"]) if "resumed" in times else None,
        prompt_tokens=prompt_tokens,
        cached_tokens=cached_tokens,
        agentmem_over=over or None,
    )


def _pairs(ours: list[float], theirs: list[float]) -> list[float]:
    return [our / their for our, their in zip(ours, theirs, strict=True)]


def decode_rows(samples: dict[tuple[str, int, int], list[float]]) -> list[ServerDecodeRow]:
    """Make the rows of tokens/s by server, context and batch."""
    made = []
    for (name, context, batch), speeds in samples.items():
        ours = samples.get((AGENTMEM, context, batch)) if name != AGENTMEM else None
        row = ServerDecodeRow(
            server=name,
            batch=batch,
            context=context,
            tokens_per_s=spread(speeds),
            agentmem_over=spread(_pairs(ours, speeds), 3) if ours else None,
        )
        made.append(row)
    return made


def fp16_bytes(model: Path) -> int | None:
    """Return the bytes of one token's keys and values in all layers, in 16 bits.

    None where only mlx-lm's own classes know.
    """
    from ..kvcache.spec_of_config import spec_of_config

    try:
        spec = spec_of_config(read_config(model / "config.json"))
    except ModelError:
        return None
    return spec.dense_bytes or None


def cache_row(
    contender: Contender, context: int, agent: str, *, model: Path, block_size: int
) -> CacheRow:
    """Make the row of `agent`, whose conversation has just been held."""
    from .harness.float32 import on_cpu

    fp16 = fp16_bytes(model)
    whole: float | None = None
    sealed: float | None = None
    source = "unknown"
    if contender.name == AGENTMEM:
        assert isinstance(contender.running, Server)
        whole, sealed = _agentmem_bytes(contender.running, agent, block_size)
        source = "/v1/agents: ram_bytes over tokens"
    elif contender.name == MLX_LM and fp16:
        whole = float(fp16 * (2 if on_cpu() else 1))
        dtype = "float32" if on_cpu() else "16 bits"
        source = f"computed: keys and values of all layers in {dtype}"
    per_token = sealed or whole
    return CacheRow(
        server=contender.name,
        context=context,
        bytes_per_token=whole,
        sealed_bytes_per_token=sealed,
        over_fp16=round(per_token / fp16, 4) if per_token and fp16 else None,
        source=source,
    )


def _agentmem_bytes(server: Server, agent: str, block_size: int) -> tuple[float, float | None]:
    """Return bytes a token of (all of it, its whole blocks alone).

    The latter are those of a copy that is cut after the last one.
    """
    held = _get(server, agent)
    whole = held["ram_bytes"] / held["tokens"]
    blocks = held["tokens"] // block_size
    if not blocks:
        return whole, None
    server.post(f"/agents/{agent}/fork", to=f"{agent}-blocks")
    server.post(f"/agents/{agent}-blocks/truncate", tokens=blocks * block_size)
    copy = _get(server, f"{agent}-blocks")
    return whole, copy["ram_bytes"] / copy["tokens"]


def _get(server: Server, agent: str) -> dict[str, int]:
    answer: dict[str, int] = server.client.get(f"/agents/{agent}").raise_for_status().json()
    return answer
