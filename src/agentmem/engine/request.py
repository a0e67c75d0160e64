"""What crosses the engine's border: a request goes in, deltas and one Finished come out."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

CacheState = Literal["cold", "warm", "hot"]  # nothing cached; read from disk; in RAM
FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class SamplingParams:
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # over prompt and answer, last `repetition_context_size` tokens
    repetition_context_size: int = 20
    presence_penalty: float = 0.0  # over the answer
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False


@dataclass(frozen=True)
class GenerateRequest:
    namespace: str
    agent_id: str
    tokens: list[int]  # the rendered prompt, at least one
    params: SamplingParams
    priority: int = 0  # lower goes first


@dataclass(frozen=True)
class TextDelta:
    text: str


@dataclass(frozen=True)
class RequestStats:
    """What one request cost. Times in ms; `ttft_ms` runs from submission to the first sampled token."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    cache: CacheState
    restored_bytes: int
    restore_ms: float
    prefill_ms: float
    ttft_ms: float
    queue_ms: float


@dataclass(frozen=True)
class Finished:
    reason: FinishReason
    stats: RequestStats


@dataclass(frozen=True)
class AgentInfo:
    """One row of GET /v1/agents. Bytes count a shared block once for each agent that holds it."""

    agent_id: str
    tier: Literal["warm", "hot"]
    tokens: int  # of the longest branch
    branches: int
    ram_bytes: int
    disk_bytes: int
    created: float  # Unix seconds
    last_used: float


class EngineAPI(Protocol):
    """What the server needs of the engine. Every method is called on the event loop."""

    model_name: str
    max_context: int  # prompt and answer, in tokens
    why_max_context: str  # what sets it, if not the model
    tokenizer: Any  # mlx_lm TokenizerWrapper

    def generate(self, request: GenerateRequest) -> AsyncIterator[TextDelta | Finished]:
        """Stream one answer; closing the iterator cancels it within one token.

        Raises: ContextLengthExceeded, Busy, ShuttingDown, EngineFailed (before the first item or mid-stream).
        """
        ...

    def health(self) -> dict[str, Any]:
        """{"status": "ok" | "degraded" | "failed" | "stopping", "errors": [...], ...figures}"""
        ...

    def metrics(self) -> bytes:
        """Prometheus' text format, see metrics.py."""
        ...

    async def agents(self, namespace: str) -> list[AgentInfo]: ...

    async def delete_agent(self, namespace: str, agent_id: str) -> bool:
        """Forget the agent; True once its bytes are off the disk, False if there was none."""
        ...

    async def prefetch_agent(self, namespace: str, agent_id: str) -> int | None:
        """Read the agent's newest branch into RAM; the bytes read, None if there is no such agent. Raises Busy."""
        ...

    def begin_drain(self) -> None:
        """Refuse new requests; cut running ones (ShuttingDown) after the grace time."""
        ...

    async def stop(self) -> None:
        """Drain, persist every tail, close the store, end the threads."""
        ...
