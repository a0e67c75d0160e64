"""RamBudget: what `--kv-budget` has left, counted by real bytes, and what must go for room.

Counted are blocks and tails in RAM, what is being read from disk, and for each running sequence the
working copy it has room for, the blocks it will seal up to there, and the copy of its tail that it
will leave.
"""

import logging
import time
from collections import Counter
from collections.abc import Container, Iterable, Mapping
from types import MappingProxyType

import mlx.core as mx

from ..errors import StartupError
from ..kvcache.layers.kv import STEP
from ..kvcache.layers.working import working_bytes
from ..kvcache.quantize import sealed_bytes
from ..linux_cpu.allocator import release_freed_memory
from ..prefix_cache.block_pool import Entry
from ..prefix_cache.cache import PrefixCache
from ..prefix_cache.match import Match
from ..prefix_cache.restore import Restorer
from ..prefix_cache.resume import UNSAVED_SNAPSHOTS, unsaved_blocks
from ..prefix_cache.write_back import WriteBack
from ..store.agent_store import AgentStore
from ..tensors import is_state, stack_part
from .footprint import process_footprint
from .sequence import Sequence

log = logging.getLogger(__name__)
_STUCK = 5.0  # s without room and without anything running, after which unsaved caches are given up
_EVICT_FROM = 0.95
_EVICT_TO = 0.9  # of the memory limit
_FILE_HEADER = 4096  # bytes, at most
_NOTHING_HELD: Mapping[str, int] = MappingProxyType({})
_SAVE_INTERVAL = 0.25  # s
_STATES = "states"  # what all snapshots of recurrent state are counted as


def _footprint_above(limit: float) -> int | None:
    """Return the process's bytes if they are more than `limit`, else None.

    Memory that is only kept for reuse is let go of first.
    """
    if process_footprint() <= limit:
        return None
    mx.clear_cache()
    release_freed_memory()
    footprint = process_footprint()
    return footprint if footprint > limit else None


class RamBudget:
    """Keeps caches and the process within their limits, in bytes. Engine thread only."""

    def __init__(
        self,
        *,
        limit: int,
        memory_limit: int,
        prefix_cache: PrefixCache,
        restorer: Restorer,
        write_back: WriteBack,
        store: AgentStore,
        on_codes: bool,
        max_context: int,
        active: list[Sequence],
    ):
        """Raise StartupError if `limit` is too small for any sequence.

        `active` is the scheduler's own list: the sequences that hold RAM or are about to.
        """
        self.limit = limit
        self.memory_limit = memory_limit
        self._prefix_cache = prefix_cache
        self._restorer = restorer
        self._write_back = write_back
        self._store = store
        self._spec = prefix_cache.spec
        self._on_codes = on_codes
        self._active = active
        # time.monotonic(): a request waits for RAM, and nothing runs
        self.short_since: float | None = None
        self.under_pressure = False  # the process is near its memory limit
        self.noted_reserved = 0  # bytes, see `note`
        self.noted_used = 0
        self._saves_asked = 0.0
        # the most that a tail takes: all of it dense, the block that it was cut from, and the
        # states at two positions
        spec = prefix_cache.spec
        self._tail_bytes = spec.block_size * spec.dense_bytes + sealed_bytes(spec, spec.block_size)
        self._tail_bytes += 2 * spec.state_bytes
        self.max_context = self._largest(max_context)
        cut = self.max_context < max_context
        self.why_max_context = (
            f" (kv_budget, {limit:,} bytes of RAM, has no room for more)" if cut else ""
        )

    def running_bytes(
        self, capacity: int, num_sealed: int = 0, held: Mapping[str, int] = _NOTHING_HELD
    ) -> int:
        """Return what a sequence takes that has room for `capacity` tokens.

        The first `num_sealed` blocks are not counted. `held`: of how many blocks that it has sealed
        itself each part is in RAM, snapshots of recurrent state as one part.
        """
        working = working_bytes(self._spec, capacity, on_codes=self._on_codes)
        if self._spec.opaque is not None:
            return working
        return working + self._new_blocks_bytes(capacity, num_sealed, held) + self._tail_bytes

    def _new_blocks_bytes(self, capacity: int, num_sealed: int, held: Mapping[str, int]) -> int:
        """Return what a sequence will add to the pool.

        It adds only so much at a time of layers with a window, and of snapshots (resume.py).
        """
        spec = self._spec
        num_new = max(0, capacity // spec.block_size - num_sealed)
        nbytes = (
            spec.num_sinks * spec.dense_bytes
            if num_new and not num_sealed and spec.bits is not None
            else 0
        )
        for s, most in enumerate(unsaved_blocks(spec)):
            count = num_new
            if most is not None:
                count = min(num_new, max(0, most + 1 - held.get(stack_part(s), 0)))
            nbytes += count * spec.block_size * spec.stack_bytes[s]
        return nbytes + max(0, UNSAVED_SNAPSHOTS - held.get(_STATES, 0)) * spec.state_bytes

    def growth_bytes(self, capacity: int) -> int:
        """Return the bytes of the next step from `capacity` tokens."""
        return self.running_bytes(capacity + STEP) - self.running_bytes(capacity)

    @property
    def reserved_bytes(self) -> int:
        """Return the bytes that are spoken for and not in the block pool."""
        running = sum(self._running_bytes(seq) for seq in self._active)
        return running + self._restorer.incoming_bytes

    @property
    def used_bytes(self) -> int:
        """Return the bytes in the block pool and those that are spoken for."""
        return self._prefix_cache.pool.nbytes + self.reserved_bytes

    def note(self) -> None:
        """Note what is used now, between two steps, for other threads to read."""
        self.noted_reserved = self.reserved_bytes
        self.noted_used = self._prefix_cache.pool.nbytes + self.noted_reserved

    def sharing_bytes(self, match: Match) -> int:
        """Return what running sequences can count on less once another one holds `match`.

        What they sealed stays for it.
        """
        if self._spec.needs_all_parts:
            return 0
        shared = {id(block) for block in match.blocks}
        return sum(
            self._running_bytes(seq, shared) - self._running_bytes(seq) for seq in self._active
        )

    def _running_bytes(self, seq: Sequence, shared: Container[int] = ()) -> int:
        """Return what a sequence takes beside its sealed blocks.

        `shared`: ids of blocks that another sequence is about to hold.
        """
        if not seq.capacity:
            return 0
        matched = len(seq.match.blocks) if seq.match else 0
        num_sealed = max(len(seq.blocks), matched)
        if self._spec.needs_all_parts:
            return self.running_bytes(seq.capacity, num_sealed)
        own = seq.blocks[seq.cached_at_start // self._spec.block_size :]
        held = (
            part
            for n in own
            if n.refs == 1 and id(n) not in shared and n.data
            for part in n.data.parts
        )
        parts = Counter(_STATES if is_state(part) else part for part in held)
        return self.running_bytes(seq.capacity, num_sealed, parts)

    def make_room(self, nbytes: int, kept: Iterable[Entry], *, urgent: bool = True) -> bool:
        """Evict what is idle until `nbytes` more fit; if they can't now, evict nothing.

        Returns whether they fit. `urgent`: a request can't go on without, so what is not on disk
        yet is saved now, or given up if it can't be. `kept`: what must stay.
        """
        prefix_cache = self._prefix_cache
        short = nbytes + self.used_bytes - self.limit
        if short <= 0:
            return True
        stay = self.in_use() | {id(e) for e in kept}
        lost = prefix_cache.pool.evict(short, stay, lossy=urgent and self._may_lose())
        if lost is None and urgent:
            self._save_soon(short)
        for entry in lost or ():
            log.warning(
                "the cache of %d tokens left RAM unsaved: they will be prefilled again",
                len(entry.tokens),
            )
            prefix_cache.lose(entry)
        return lost is not None

    def evict_idle(self, nbytes: int) -> None:
        """Drop `nbytes` of what is on disk and in no one's use, or all of that."""
        prefix_cache = self._prefix_cache
        for entry in prefix_cache.pool.evict(nbytes, self.in_use(), partly=True) or ():
            prefix_cache.lose(entry)

    def in_use(self) -> set[int]:
        """Return the ids of what active sequences work with, and of what pinned agents hold."""
        ids: set[int] = set()
        for seq in self._active:
            ids.update(id(entry) for entry in seq.entries())
        for agent in self._prefix_cache.agents.values():
            if agent.pinned:
                ids.update(id(entry) for entry in agent.entries())
        return ids

    def relieve_process(self) -> str | None:
        """Keep the process below `memory_limit` by evicting.

        Returns what to tell new requests if that won't do, else None.
        """
        footprint = _footprint_above(_EVICT_FROM * self.memory_limit)
        self.under_pressure = footprint is not None
        if footprint is None:
            return None
        too_many = footprint - int(_EVICT_TO * self.memory_limit)
        self.evict_idle(too_many)
        self._save_soon(too_many)
        footprint = _footprint_above(self.memory_limit)
        if footprint is None:
            return None
        return (
            f"the process takes {footprint:,} bytes, more than memory_limit ({self.memory_limit:,})"
        )

    def _may_lose(self) -> bool:
        """Tell whether to give up caches that are not on disk.

        A store that can't write must not stop the serving.
        """
        stuck = self.short_since is not None and time.monotonic() - self.short_since > _STUCK
        return stuck or self._store.background_error is not None

    def _save_soon(self, nbytes: int) -> None:
        """Save what rests, so that `nbytes` of it can leave RAM soon."""
        now = time.monotonic()
        if now - self._saves_asked > _SAVE_INTERVAL:
            self._saves_asked = now
            self._write_back.save_for_room(nbytes)

    def _largest(self, wanted: int) -> int:
        """Return the tokens of the longest sequence, at most `wanted`, that fits into empty RAM."""
        needed = self._alone_bytes(STEP)
        if needed > self.limit:
            raise StartupError(
                f"kv_budget: {self.limit:,} bytes of RAM for caches are too few for this model, "
                f"which needs {needed:,} for a sequence of {STEP} tokens; give it more, or use a "
                "smaller --block-size"
            )
        capacity = STEP
        while capacity < wanted and self._alone_bytes(capacity + STEP) <= self.limit:
            capacity += STEP
        return min(capacity, wanted)

    def _alone_bytes(self, capacity: int) -> int:
        """Return the most that a sequence takes.

        On top of what it works with, that is the tail and the windows that it starts from, and
        files' headers.
        """
        if (spec := self._spec).opaque is not None:
            return self.running_bytes(capacity)
        blocks = capacity // spec.block_size + 1
        seen = sum(
            min(blocks, in_window + 1) * spec.block_size * spec.stack_bytes[s]
            for s, in_window in enumerate(spec.window_blocks)
            if in_window is not None
        )
        return self.running_bytes(capacity) + seen + self._tail_bytes + (blocks + 1) * _FILE_HEADER
