"""Sequence: one running request, from submission to its last token."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum, auto

import mlx.core as mx

from ..errors import AgentMemError
from ..kvcache.layers.opaque import OpaqueCache
from ..kvcache.sequence import SequenceCache
from ..prefix_cache.agent import Branch
from ..prefix_cache.block_pool import CachedBlock, Entry
from ..prefix_cache.info import Cause
from ..prefix_cache.match import Match
from ..prefix_cache.resume import Holder
from .api import CacheState, Finished, FinishReason, GenerateRequest, RequestStats, TextDelta
from .constraint import Constraint
from .output import OutputStream

Event = TextDelta | Finished | AgentMemError


class Status(Enum):
    """Stages of a sequence, in order; a preempted one waits again."""

    WAITING = auto()
    RESTORING = auto()
    PREFILL = auto()
    DECODE = auto()
    FINISHED = auto()


@dataclass(eq=False)
class Sequence:
    """One running request: what is asked, what it holds, and how far it is."""

    request: GenerateRequest
    emit: Callable[[Event], object]
    tokens: list[int]  # prompt, then the answer so far
    # from logits [1, vocab], the tokens so far and the prompt's length to the next token [1]
    sampler: Callable[[mx.array, list[int], int], mx.array] | None = None
    constraint: Constraint | None = None
    output: OutputStream | None = None
    status: Status = Status.WAITING
    cancelled: bool = False
    discard: bool = False  # the agent was deleted meanwhile: nothing of this sequence is kept
    # other answers to the same prompt, which go on from it once it is prefilled
    forks: list["Sequence"] = field(default_factory=list)
    forked: bool = False  # was one of those
    match: Match | None = None  # until the cache is made from it
    reading: bool = False  # what it matched is on its way from disk, perhaps ahead of need
    capacity: int = 0  # tokens that RAM is reserved for
    cache: SequenceCache | OpaqueCache | None = None
    preempted: bool = False  # gave its RAM to others at least once, or was forked
    kept: Branch | None = None  # what it had computed by then, while it waits to go on
    cached_at_start: int = 0  # tokens that `cache` began with
    num_cached: int = 0  # the same, when the sequence first left the queue
    branch: Branch | None = None
    blocks: list[CachedBlock] = field(default_factory=list)  # of the sealed blocks, in order
    lineage: bytes = b""  # of the open block, see prefix_cache/lineage.py
    num_scored: int = 0  # tokens of the prompt, from its second on, whose log probability was told
    cause: Cause = "first"  # why no more was cached
    restored_bytes: int = 0
    served_ms: float = 0.0  # that its own prefill took
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
    def num_to_score(self) -> int:
        """Return how many tokens of the prompt have log probabilities that are yet to be told."""
        if self.request.params.prompt_logprobs is None:
            return 0
        return self.prompt_len - 1 - self.num_scored

    @property
    def reusable(self) -> list[int]:
        """Return the tokens that may come from a cache, and one more.

        Where the logits of a prompt are wanted, its tokens have to be computed.
        """
        return self.tokens[: self.num_scored + 1] if self.num_to_score else self.tokens

    @property
    def num_to_prefill(self) -> int:
        """Return how many tokens are not in the cache, but for the last.

        The last one is decode's next input, so that no prefill computes logits. A sequence without
        a cache counts as many as matched when it was last looked up.
        """
        have = 0
        if self.cache is not None:
            have = self.cache.length
        elif self.match is not None:
            have = self.match.length
        return len(self.tokens) - 1 - have

    def entries(self) -> Iterator[Entry]:
        """Yield what of the block pool it works with."""
        yield from self.blocks
        if self.match is not None:
            yield from self.match.entries()

    def holds(self) -> Iterator[Holder]:
        """Yield the path that it works with, or matched, and where it goes on from."""
        if self.cache is not None:
            yield self.blocks, self.cache.length
        if self.match is not None:
            yield self.match.all_blocks, self.match.length

    @property
    def wanted(self) -> bool:
        """Whether anybody waits for its answer, or for its prompt to be prefilled."""
        return not self.cancelled or any(not fork.cancelled for fork in self.forks)

    @property
    def cache_state(self) -> CacheState:
        """Return whether its prompt was read from disk, was in RAM, or was not cached."""
        if self.restored_bytes:
            return "warm"
        return "hot" if self.num_cached else "cold"

    def stats(self) -> RequestStats:
        """Return what the request has cost so far."""

        def span(start: float, stop: float) -> float:
            return max(0.0, stop - start) * 1e3 if start and stop else 0.0

        return RequestStats(
            prompt_tokens=self.prompt_len,
            completion_tokens=self.num_generated,
            cached_tokens=self.num_cached,
            cache=self.cache_state,
            restored_bytes=self.restored_bytes,
            restore_ms=span(self.started, self.restored),
            prefill_ms=span(self.restored, self.prefilled),
            ttft_ms=span(self.submitted, self.first_token),
            queue_ms=span(self.submitted, self.started),
            cause=self.cause,
        )

    def begin_as_fork(self, other: "Sequence") -> None:
        """Take over what prefilling the prompt took, all of which `other` did."""
        self.forked = self.preempted = True
        self.discard = other.discard
        self.num_scored = other.num_scored
        self.num_cached = other.num_cached
        self.cause = other.cause
        self.restored_bytes = other.restored_bytes
        self.served_ms = other.served_ms
        self.submitted = other.submitted
        self.started = other.started
        self.restored = other.restored
        self.prefilled = other.prefilled

    def finish(self, reason: FinishReason) -> None:
        """Tell the client that the answer has ended."""
        self.status = Status.FINISHED
        self.emit(Finished(reason, self.stats(), self.output.stop_string if self.output else None))

    def fail(self, error: AgentMemError) -> None:
        """Tell the client what went wrong, for the forks that have not begun too."""
        self.status = Status.FINISHED
        self.emit(error)
        for fork in self.forks:
            fork.fail(error)
