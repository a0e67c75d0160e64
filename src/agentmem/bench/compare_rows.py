"""From samples of a comparison to its rows, and what a token takes in memory."""

from pathlib import Path

from ..errors import ModelError
from ..kvcache.spec_of_config import spec_of_config
from .compare import STATES, CacheRow, CompareRow, DecodeRow, Samples
from .contenders import AGENTMEM, MLX_LM, Contender
from .find_config import read_config
from .float32 import on_cpu
from .result import spread, ttft
from .server import Server


def rows(samples: dict[int, dict[str, Samples]]) -> list[CompareRow]:
    made = []
    for context, by_server in samples.items():
        times = {
            name: {
                state: [a.ttft_ms for a in answers]
                for state, answers in of.answers.items()
                if answers
            }
            for name, of in by_server.items()
        }
        ours = times.get(AGENTMEM, {})
        for name, of in by_server.items():
            asked = {state: answers for state, answers in of.answers.items() if answers}
            over = {
                state: spread(_pairs(ours[state], times[name][state]), 4)
                for state in asked
                if state in ours
            }
            row = CompareRow(
                server=name,
                context=context,
                **{state: ttft(times[name][state]) if state in asked else None for state in STATES},  # type: ignore[arg-type]
                prompt_tokens={
                    state: [a.prompt_tokens for a in answers] for state, answers in asked.items()
                },
                cached_tokens={
                    state: [a.cached_tokens for a in answers] for state, answers in asked.items()
                },
                agentmem_over=over if over and name != AGENTMEM else None,
            )
            made.append(row)
    return made


def _pairs(ours: list[float], theirs: list[float]) -> list[float]:
    return [our / their for our, their in zip(ours, theirs, strict=True)]


def decode_rows(samples: dict[tuple[str, int, int], list[float]]) -> list[DecodeRow]:
    made = []
    for (name, context, batch), speeds in samples.items():
        ours = samples.get((AGENTMEM, context, batch)) if name != AGENTMEM else None
        over = spread(_pairs(ours, speeds), 3) if ours else None
        row = DecodeRow(
            server=name,
            batch=batch,
            context=context,
            tokens_per_s=spread(speeds),
            agentmem_over=over,
        )
        made.append(row)
    return made


def fp16_bytes(model: Path) -> int | None:
    """Of one token's keys and values in all layers; None where only mlx-lm's own classes know."""
    try:
        spec = spec_of_config(read_config(model / "config.json"))
    except ModelError:
        return None
    return spec.dense_bytes or None


def cache_row(
    contender: Contender, context: int, agent: str, model: Path, block_size: int
) -> CacheRow:
    """Of `agent`, whose conversation has just been held."""
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
        source = (
            f"computed: keys and values of all layers in {'float32' if on_cpu() else '16 bits'}"
        )
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
    """(all of it, its whole blocks alone: those of a copy that is cut after the last one)."""
    held = _get(server, agent)
    blocks = held["tokens"] // block_size
    if not blocks:
        return held["ram_bytes"] / held["tokens"], None
    server.post(f"/agents/{agent}/fork", to=f"{agent}-blocks")
    server.post(f"/agents/{agent}-blocks/truncate", tokens=blocks * block_size)
    copy = _get(server, f"{agent}-blocks")
    return held["ram_bytes"] / held["tokens"], copy["ram_bytes"] / copy["tokens"]


def _get(server: Server, agent: str) -> dict[str, int]:
    answer: dict[str, int] = server.client.get(f"/agents/{agent}").raise_for_status().json()
    return answer
