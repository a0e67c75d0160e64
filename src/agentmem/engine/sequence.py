"""Sequence: one running request, from submission to its last token."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, auto

from ..errors import AgentMemError
from ..kvcache.cache import SequenceCache
from .contexts import Branch, Match, Node
from .output import OutputStream
from .request import CacheState, Finished, FinishReason, GenerateRequest, RequestStats, TextDelta
from .sampling import Sampler

Event = TextDelta | Finished | AgentMemError


class Status(Enum):
    WAITING = auto()
    RESTORING = auto()
    PREFILL = auto()
    DECODE = auto()
    FINISHED = auto()


@dataclass(eq=False)
class Sequence:
    request: GenerateRequest
    emit: Callable[[Event], object]
    tokens: list[int]  # prompt, then the answer; the last one is not in the cache yet
    sampler: Sampler | None = None
    output: OutputStream | None = None
    status: Status = Status.WAITING
    cancelled: bool = False
    discard: bool = False  # the agent was deleted meanwhile: nothing of this sequence is kept
    match: Match | None = None
    cache: SequenceCache | None = None
    branch: Branch | None = None
    nodes: list[Node] = field(default_factory=list)  # of the sealed blocks, in order
    lineage: bytes = b""  # of the open block, see contexts.block_key
    restored_bytes: int = 0
    submitted: float = field(default_factory=time.perf_counter)
    started: float = 0.0  # left the queue
    restored: float = 0.0  # cache in place, prefill begins
    prefilled: float = 0.0
    first_token: float = 0.0
    last_token: float = 0.0

    @property
    def prompt_len(self) -> int:
        return len(self.request.tokens)

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - self.prompt_len

    @property
    def num_to_prefill(self) -> int:
        """Prompt tokens that are not in the cache; before it has one, as many as matched when it was submitted."""
        have = self.cache.length if self.cache is not None else self.match.length if self.match else 0
        return self.prompt_len - have

    @property
    def cache_state(self) -> CacheState:
        if self.restored_bytes:
            return "warm"
        return "hot" if self.match and self.match.length else "cold"

    def stats(self) -> RequestStats:
        def span(start: float, stop: float) -> float:
            return max(0.0, stop - start) * 1e3 if start and stop else 0.0

        return RequestStats(
            prompt_tokens=self.prompt_len,
            completion_tokens=self.num_generated,
            cached_tokens=self.match.length if self.match else 0,
            cache=self.cache_state,
            restored_bytes=self.restored_bytes,
            restore_ms=span(self.started, self.restored),
            prefill_ms=span(self.restored, self.prefilled),
            ttft_ms=span(self.submitted, self.first_token),
            queue_ms=span(self.submitted, self.started),
        )

    def finish(self, reason: FinishReason) -> None:
        self.status = Status.FINISHED
        self.emit(Finished(reason, self.stats()))

    def fail(self, error: AgentMemError) -> None:
        self.status = Status.FINISHED
        self.emit(error)
