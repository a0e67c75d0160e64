"""Who takes part in the next step: all running sequences decode, and the oldest waiting one prefills a chunk."""

from collections import deque
from dataclasses import dataclass

from ..errors import Busy
from .sequence import Sequence, Status


@dataclass(frozen=True)
class Step:
    decode: tuple[Sequence, ...]
    prefill: Sequence | None
    chunk: int  # prompt tokens of `prefill` in this step


class Scheduler:
    """First come, first served. `active` holds what has left the queue: restoring, prefilling, decoding."""

    def __init__(self, *, max_running: int, max_queue: int, prefill_chunk: int):
        self._max_running, self._max_queue, self._prefill_chunk = max_running, max_queue, prefill_chunk
        self.waiting: deque[Sequence] = deque()
        self.active: list[Sequence] = []

    def add(self, seq: Sequence) -> None:
        if len(self.waiting) >= self._max_queue:
            raise Busy(f"{len(self.waiting)} requests are waiting already (max_queue): try again later")
        self.waiting.append(seq)

    @property
    def can_admit(self) -> bool:
        return bool(self.waiting) and len(self.active) < self._max_running

    def admit(self) -> list[Sequence]:
        """Move sequences from the queue to the active ones while there is room; the caller gives them their caches."""
        fresh = []
        while self.can_admit:
            seq = self.waiting.popleft()
            self.active.append(seq)
            fresh.append(seq)
        return fresh

    def remove(self, seq: Sequence) -> None:
        for queue in (self.waiting, self.active):
            if seq in queue:
                queue.remove(seq)

    def schedule(self) -> Step | None:
        """None: nothing can run now."""
        decode = tuple(s for s in self.active if s.status is Status.DECODE)
        prefill = next((s for s in self.active if s.status is Status.PREFILL), None)
        if not decode and prefill is None:
            return None
        return Step(decode, prefill, self._chunk(prefill) if prefill else 0)

    def _chunk(self, seq: Sequence) -> int:
        """Up to the next multiple of the chunk size: where a prefill began does not shift what follows.

        The last prompt token is left: it is the first input of decode, so that no prefill computes logits.
        """
        assert seq.cache is not None
        at = seq.cache.length
        stop = (at // self._prefill_chunk + 1) * self._prefill_chunk
        return min(stop, seq.prompt_len - 1) - at
