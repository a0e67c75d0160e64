"""Scheduler: who takes part in the next step.

All running sequences decode, and one of the others prefills a chunk. Which one: the lowest
`priority` number, then the shortest remaining prefill, less the time it has waited while others
were served: a warm agent overtakes a cold one, and nobody starves. How much: a whole chunk while
nobody decodes; else as much as keeps the gap between two tokens of the others within `max_itl_ms`,
by what prefill and decode were last measured to take. Decode comes first: who has just been
restored does not wait for another one's chunk.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

from ..agent_key import AgentKey
from ..errors import Busy
from ..prefix_cache.resume import Holder
from .sequence import Sequence, Status

# where no max_itl_ms is set, a gap may last as long as this many tokens took at first
_SHARED_CHUNK = 128
# a read ends within milliseconds, and must not wait for a long chunk then
_CHUNK_BESIDE_RESTORE = 32
_HOLD_PREFILL_MS = 100.0
_MIN_CHUNK = 16  # below, a pass costs about as much as this many tokens anyway
_NEWEST = 0.5  # weight of the newest measurement


@dataclass(frozen=True)
class Step:
    """What the engine does next."""

    decode: tuple[Sequence, ...]
    prefill: Sequence | None
    chunk: int  # prompt tokens of `prefill` in this step


class Pace:
    """What passes take on this machine, in ms, as exponentially weighted means."""

    def __init__(self) -> None:
        self.decode_ms = 0.0  # a step
        self.prefill_ms = 0.0  # a token
        # the first one measured: over a short context, so about the fastest
        self.first_prefill_ms = 0.0

    def saw_decode(self, ms: float) -> None:
        """Take in that a step of decode took `ms`."""
        self.decode_ms += (ms - self.decode_ms) * (_NEWEST if self.decode_ms else 1.0)

    def saw_prefill(self, ms: float, num_tokens: int) -> None:
        """Take in that a chunk of `num_tokens` took `ms`."""
        if num_tokens >= _MIN_CHUNK:  # shorter ones say more of the pass than of its tokens
            self.first_prefill_ms = self.first_prefill_ms or ms / num_tokens
            self.prefill_ms += (ms / num_tokens - self.prefill_ms) * (
                _NEWEST if self.prefill_ms else 1.0
            )


class Scheduler:
    """The sequences that wait, and those that have left the queue.

    `waiting` is the queue; `active` are restoring, prefilling or decoding.
    """

    def __init__(
        self,
        *,
        max_running: int,
        max_queue: int,
        max_queue_time: float = math.inf,
        prefill_chunk: int,
        max_itl_ms: float | None = None,
    ):
        self._max_running = max_running
        self._max_queue = max_queue
        self._max_queue_time = max_queue_time  # s
        self._prefill_chunk = prefill_chunk
        self._max_itl_ms = max_itl_ms
        self.pace = Pace()
        self.waiting: list[Sequence] = []
        self.active: list[Sequence] = []
        self.preemptions = 0  # since the start: of those that gave up their RAM

    def add(self, seq: Sequence) -> None:
        """Put a sequence into the queue. Raises Busy where it is full."""
        self.check_room()
        self.waiting.append(seq)

    def check_room(self) -> None:
        """Raise Busy where the queue is full. On any thread, as things stand."""
        if len(self.waiting) >= self._max_queue:
            raise Busy(
                f"{len(self.waiting)} requests are waiting already (max_queue): try again later"
            )

    def overdue(self) -> list[Sequence]:
        """Return those that have waited for too long; who has begun once may wait on."""
        latest = time.perf_counter() - self._max_queue_time
        return [s for s in self.waiting if not s.preempted and s.submitted < latest]

    def upcoming(self) -> list[Sequence]:
        """Return the queue, in the order in which it will be served as things stand."""
        return sorted(self.waiting, key=self._urgency)

    def next_waiting(self) -> Sequence | None:
        """Return the one that may become active now, if RAM allows."""
        if len(self.active) >= self._max_running:
            return None
        return min(self.waiting, key=self._urgency, default=None)

    def activate(self, seq: Sequence) -> None:
        """Take a sequence out of the queue."""
        self.waiting.remove(seq)
        self.active.append(seq)

    def preempt(self, seq: Sequence) -> None:
        """Put an active sequence back into the queue, however full that is."""
        self.active.remove(seq)
        self.waiting.append(seq)

    def least_urgent(self) -> Sequence:
        """Return the one to preempt of those that hold a cache.

        It has the highest `priority` number, and is the newest.
        """
        holders = (seq for seq in self.active if seq.cache is not None)
        return max(holders, key=lambda seq: (seq.request.priority, seq.submitted))

    def of_agent(self, key: AgentKey) -> list[Sequence]:
        """Return the sequences of an agent, running or waiting."""
        return [seq for seq in (*self.active, *self.waiting) if seq.request.agent == key]

    def asks_for(self, key: AgentKey) -> bool:
        """Tell whether anything of an agent runs or waits."""
        return any(seq.request.agent == key for seq in (*self.active, *self.waiting))

    def holders(self) -> Iterator[Holder]:
        """Yield the paths that sequences hold, and the position from which each goes on."""
        for seq in (*self.active, *self.waiting):
            yield from seq.holds()

    def remove(self, seq: Sequence) -> None:
        """Take a sequence out, wherever it is."""
        for queue in (self.waiting, self.active):
            if seq in queue:
                queue.remove(seq)

    @property
    def can_run(self) -> bool:
        """Tell whether any sequence can take part in a step."""
        return any(s.status in (Status.DECODE, Status.PREFILL) for s in self.active)

    def schedule(self, reading_ms: float | None = None) -> Step | None:
        """Return the next step, or None where nothing can run now.

        `reading_ms`: how long caches have been read since the last prefill, if they are. A read
        ends within a decode step or two, and what it brings is often just one more step from its
        first token: where others decode, prefill waits for it, for a while.
        """
        decode = tuple(s for s in self.active if s.status is Status.DECODE)
        prefill = min(
            (s for s in self.active if s.status is Status.PREFILL), key=self._urgency, default=None
        )
        if not decode and prefill is None:
            return None
        if decode and reading_ms is not None and reading_ms < _HOLD_PREFILL_MS:
            return Step(decode, None, 0)
        return Step(decode, prefill, self._chunk(prefill, shared=bool(decode)) if prefill else 0)

    def _urgency(self, seq: Sequence) -> tuple[int, float]:
        """Return what sorts sequences by, the most urgent first."""
        waited_ms = (time.perf_counter() - seq.submitted) * 1e3 - seq.served_ms
        return seq.request.priority, seq.num_to_prefill * self.pace.prefill_ms - waited_ms

    def _chunk(self, seq: Sequence, *, shared: bool) -> int:
        """Return how many prompt tokens a sequence prefills in the next step."""
        assert seq.cache is not None
        at = seq.cache.length
        # alone, up to a multiple of the chunk size: where a prefill began does not shift what
        # follows
        size = self._shared_chunk() if shared else self._prefill_chunk - at % self._prefill_chunk
        if any(s.status is Status.RESTORING for s in self.active):
            size = min(size, _CHUNK_BESIDE_RESTORE)
        return min(size, seq.num_to_prefill)

    def _shared_chunk(self) -> int:
        """Return how many prompt tokens fit between two tokens of others."""
        if not self.pace.prefill_ms:
            return min(_SHARED_CHUNK, self._prefill_chunk)
        if self._max_itl_ms is None:
            room_ms = self.pace.first_prefill_ms * _SHARED_CHUNK
        else:
            room_ms = self._max_itl_ms - self.pace.decode_ms
        return min(max(_MIN_CHUNK, int(room_ms / self.pace.prefill_ms)), self._prefill_chunk)
