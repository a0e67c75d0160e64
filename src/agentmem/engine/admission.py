"""How sequences get their caches and give them back.

They are admitted when RAM allows, preempted when it runs out, and left idle in the end. A second
request of an agent, while one runs, does not wait: it starts from what the agent's branches and the
shared blocks hold when its prefill begins, on a branch of its own.
"""

import logging
import math
import os
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from ..errors import Busy
from ..kvcache.block import Tail
from ..kvcache.layers.kv import STEP, capacity_for
from ..prefix_cache.agent import Agent, Branch
from ..prefix_cache.block_pool import CachedTail
from ..prefix_cache.cache import PrefixCache
from ..prefix_cache.explain import explain
from ..prefix_cache.match import Match
from ..prefix_cache.restore import Restorer
from ..prefix_cache.resume import last_snapshot
from ..prefix_cache.write_back import WriteBack
from .budget import RamBudget
from .constraint import Constraint
from .model_runner import ModelRunner
from .output import OutputStream
from .sampling import Sampler
from .scheduler import Scheduler
from .sequence import Sequence, Status
from .tasks import Tasks, finished
from .trace import Trace

log = logging.getLogger(__name__)
_PREFETCH = 4  # of the queue, looked at in advance
LOOK_INTERVAL = 0.05  # s between two looks at the queue, unless something enters or ends
_GIVE_UP = 15.0  # s without room and without anything running


class Admission:
    """Moves sequences from the queue to a cache and back. Engine thread only."""

    def __init__(
        self,
        *,
        tasks: Tasks,
        runner: ModelRunner,
        scheduler: Scheduler,
        budget: RamBudget,
        prefix_cache: PrefixCache,
        restorer: Restorer,
        write_back: WriteBack,
        trace: Trace,
        tokenizer: Any,
        vocab_size: int,
    ):
        """`tokenizer`: mlx_lm's TokenizerWrapper; `vocab_size`: ids that may be sampled."""
        self._tasks = tasks
        self._runner = runner
        self._scheduler = scheduler
        self._budget = budget
        self._prefix_cache = prefix_cache
        self._restorer = restorer
        self._write_back = write_back
        self._trace = trace
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._mask_threads = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="mask")
        self.short = False  # the most urgent of the queue waits for RAM
        # time.monotonic(); before, there is hardly more room than at the last look
        self._look_at = 0.0

    @property
    def can_admit(self) -> bool:
        """Tell whether a sequence waits that may become active, and RAM was not short for it."""
        seq = self._scheduler.next_waiting()
        return seq is not None and not self.short

    # -- from the queue to a cache

    def admit(self) -> None:
        """Start what waits, in order, as far as RAM goes; then read ahead for the next."""
        if not self._scheduler.waiting:
            self.short = False
            self._budget.short_since = None
        elif time.monotonic() >= self._look_at:
            self._admit()
            self._prefetch()
            self._note_progress()
            self._look_at = time.monotonic() + LOOK_INTERVAL

    def _admit(self) -> None:
        self.short = False
        while (seq := self._scheduler.next_waiting()) is not None and not self.short:
            if not seq.reading:
                self.look_up(seq)
            self.short = not self._reserve(seq, self._growth())
            if not self.short:
                self._scheduler.activate(seq)
                seq.started = seq.started or time.perf_counter()
                self._restore_or_start(seq)

    def entered(self, seq: Sequence) -> None:
        """Look up a sequence that is new in the queue: where it stands there depends on it."""
        self.look_up(seq)
        self._look_at = 0.0

    def look_up(self, seq: Sequence) -> None:
        """Note what of a sequence's tokens is cached now."""
        request = seq.request
        prefix_cache = self._prefix_cache
        own = prefix_cache.match_whole(seq.kept, seq.tokens) if seq.kept is not None else None
        seq.match = own or prefix_cache.match(request.agent, seq.reusable)

    def _growth(self) -> int:
        """Return the bytes that let all who hold a cache go on for a while."""
        return sum(
            self._budget.growth_bytes(seq.capacity) for seq in self._scheduler.active if seq.cache
        )

    def _reserve(self, seq: Sequence, slack: int) -> bool:
        """Make room for all tokens so far and what is to be read, with `slack` bytes left."""
        budget = self._budget
        match = seq.match
        assert match is not None
        seq.capacity = 0
        capacity = capacity_for(len(seq.tokens))
        needed = budget.running_bytes(capacity, len(match.blocks))
        needed += match.missing_bytes + budget.sharing_bytes(match)
        if not budget.make_room(needed + slack, match.entries()):
            return False
        seq.capacity = capacity
        return True

    def _restore_or_start(self, seq: Sequence) -> None:
        """Start if all that matched is in RAM, else read what is on disk and look again.

        Again, because another request may have moved the agent's branches on meanwhile.
        """
        match = seq.match
        assert match is not None
        seq.status = Status.RESTORING
        if seq.reading:  # ahead of need, and it is needed now
            return
        if match.missing:
            self._read(seq, match)
        else:
            self._start(seq, match)

    def _read(self, seq: Sequence, match: Match) -> None:
        """Begin to read what `match` lacks; a sequence that waits for it goes on then."""
        seq.reading = True
        self._prefix_cache.hold_match(match)
        self._tasks.start(self._go_on_once_read(seq, match))

    async def _go_on_once_read(self, seq: Sequence, match: Match) -> None:
        """Wait for what `match` lacks, then start `seq` if it is restoring by then."""
        began = time.perf_counter()
        try:
            restored = await finished(self._restorer.restore(match))
            seq.reading = False
            if not seq.preempted:
                seq.restored_bytes += restored.nbytes
            self._trace.span(
                "restore",
                began,
                max(began, restored.at),
                agent=seq.request.agent.agent_id,
                bytes=restored.nbytes,
            )
            if seq.status is Status.RESTORING:
                self.look_up(seq)
                if self._reserve(seq, 0):
                    self._restore_or_start(seq)
                else:
                    self._requeue(seq)
        finally:
            self._prefix_cache.release_match(match)
            self._look_at = 0.0

    def _start(self, seq: Sequence, match: Match) -> None:
        """Give a sequence its cache and its branch; all that `match` needs is in RAM."""
        prefix_cache = self._prefix_cache
        write_back = self._write_back
        snapshot, seq.lineage = self._restorer.snapshot(match)
        seq.blocks = list(match.blocks)
        seq.match = None
        prefix_cache.hold(seq.blocks)
        prefix_cache.touch(match)
        self._let_go(seq)
        agent = prefix_cache.agent(seq.request.agent)
        self._apply(seq, agent)
        seq.branch = write_back.claim_branch(
            agent, match, persist=not (seq.discard or agent.ephemeral)
        )
        write_back.note(agent, seq.branch)
        wanted = seq.request.checkpoint or seq.prompt_len - 1
        seq.cache = self._runner.new_cache(
            snapshot,
            capacity=seq.capacity,
            checkpoint_at=min(wanted, seq.prompt_len - 1),
            last_state=last_snapshot(prefix_cache.spec, seq.blocks),
        )
        seq.cached_at_start = match.length
        if not seq.preempted:
            seq.num_cached = match.length
            agent.explained = explain(agent, seq.tokens, match, scored=seq.num_to_score > 0)
            seq.cause = agent.explained.cause
        if seq.output is None:
            seq.sampler = Sampler(seq.request.params, self._vocab_size)
            if seq.request.grammar is not None:
                seq.constraint = Constraint(
                    seq.request.grammar, self._vocab_size, self._mask_threads
                )
            seq.output = OutputStream(
                self._tokenizer,
                stop=seq.request.params.stop,
                stop_token_ids=seq.request.params.stop_token_ids,
                ignore_eos=seq.request.params.ignore_eos and seq.constraint is None,
                continues_text=seq.request.continues_text,
            )
        seq.restored = seq.restored or time.perf_counter()
        seq.status = Status.PREFILL
        self.prefilled_maybe(seq)

    def _apply(self, seq: Sequence, agent: Agent) -> None:
        """Set what the request says of its agent."""
        request = seq.request
        known = bool(agent.branches)
        if request.ephemeral is not None and not known:
            agent.ephemeral = request.ephemeral
        if request.ttl is not None and not seq.preempted:
            agent.ttl = request.ttl

    def prefilled_maybe(self, seq: Sequence) -> None:
        """Let a sequence decode once nothing of its prompt is left to prefill, and its forks."""
        if seq.num_to_prefill == 0:
            seq.prefilled = seq.prefilled or time.perf_counter()
            seq.status = Status.DECODE
            self._fork(seq)

    def _fork(self, seq: Sequence) -> None:
        """Put what shares a prompt into the queue, each as if it had been preempted at its end.

        Each goes on from a branch of its own, which shares the sealed blocks; the tail is copied
        when it starts. So one that there is no room for now waits like any other, and none is
        prefilled again.
        """
        forks = [fork for fork in seq.forks if not fork.cancelled]
        seq.forks = []
        if not forks:
            return
        assert seq.cache is not None
        nothing_to_keep = not seq.cache.length or self._runner.spec.opaque is not None
        snapshot = None if nothing_to_keep or seq.discard else seq.cache.snapshot()
        if snapshot is not None and snapshot.tail is None:
            self._prefix_cache.add_states(seq.blocks[-1], snapshot.blocks[-1])
        for fork in forks:
            fork.begin_as_fork(seq)
            if snapshot is not None:
                fork.kept = self._branch_at_end(seq, snapshot.tail)
            self._scheduler.waiting.append(fork)
            self.entered(fork)

    def _branch_at_end(self, seq: Sequence, tail: Tail | None) -> Branch:
        """Return a branch for a fork of `seq`, which ends where that stands; `tail`: its tail."""
        assert seq.cache is not None and seq.branch is not None
        agent = seq.branch.agent
        branch = self._prefix_cache.new_branch(agent)
        branch.in_use = branch.preempted = True
        branch.last_used = time.time()
        branch.save_at = math.inf  # only where RAM is short, until then
        branch.blocks = list(seq.blocks)
        self._prefix_cache.hold(branch.blocks)
        tokens = np.array(seq.tokens[seq.cache.num_sealed : seq.cache.length], dtype=np.uint32)
        cached = CachedTail(tokens, lineage=seq.lineage, discardable=agent.ephemeral)
        self._prefix_cache.set_tail(branch, cached, tail)
        agent.branches[branch.id] = branch
        return branch

    def look_again(self, seq: Sequence) -> bool:
        """Start again from blocks that another request has sealed meanwhile, if there are any.

        It is asked ahead of a sequence's first chunk. Returns whether the sequence starts elsewhere
        now.
        """
        assert seq.cache is not None and seq.branch is not None
        if seq.cache.length > seq.cached_at_start:
            return False
        match = self._prefix_cache.match(seq.request.agent, seq.reusable)
        if match.length < seq.cache.length + self._runner.spec.block_size or match.missing:
            return False
        if not self._budget.make_room(
            self._budget.sharing_bytes(match), match.entries(), urgent=False
        ):
            return False
        self._prefix_cache.hold(match.all_blocks)
        self._prefix_cache.release(seq.blocks)
        self._write_back.abandon(seq.branch)
        self._start(seq, match)
        self._prefix_cache.release(match.all_blocks)
        return True

    # -- ahead of need

    def _prefetch(self) -> None:
        """Read what the next in the queue matched, evicting nothing that any of them needs."""
        if self._budget.under_pressure:
            return
        queue = self._scheduler.upcoming()[:_PREFETCH]
        for seq in queue:
            if not seq.reading:
                self.look_up(seq)
        wanted = [entry for seq in queue if seq.match is not None for entry in seq.match.entries()]
        for seq in queue:
            match = seq.match
            if seq.reading or match is None or not match.missing:
                continue
            nbytes = match.missing_bytes
            if not self._budget.make_room(nbytes + self._growth(), wanted, urgent=False):
                return
            self._read(seq, match)

    # -- RAM of the running

    def grow(self) -> None:
        """Make room for one more token of each that decodes, at the cost of the least urgent."""
        for seq in list(self._scheduler.active):
            while (
                seq.cache is not None
                and seq.status is Status.DECODE
                and seq.cache.length >= seq.capacity
            ):
                if self._budget.make_room(self._budget.growth_bytes(seq.capacity), ()):
                    seq.capacity += STEP
                else:
                    self._preempt(self._scheduler.least_urgent())

    def _preempt(self, seq: Sequence) -> None:
        """Give a sequence's RAM to others; it goes on from here when there is room again."""
        log.info(
            "preempted a request of agent %r after %d tokens: no RAM",
            seq.request.agent.agent_id,
            seq.num_generated,
        )
        self._scheduler.preemptions += 1
        seq.preempted = True
        branch = seq.branch
        self._give_back(seq, preempted=True)
        if branch is not None and branch.agent.branches.get(branch.id) is branch:
            branch.in_use = branch.preempted = True
            seq.kept = branch
        self._requeue(seq)

    def _let_go(self, seq: Sequence) -> None:
        """Let others use the branch that a preempted sequence left.

        One that only holds a prompt, as it does for those that it was forked with, is dropped.
        """
        kept = seq.kept
        if kept is None:
            return
        seq.kept = None
        kept.in_use = kept.preempted = False
        if seq.forked and not seq.num_generated and kept.agent.branches.get(kept.id) is kept:
            self._prefix_cache.drop_branch(kept)
            self._write_back.abandon(kept)

    def _requeue(self, seq: Sequence) -> None:
        """Put a sequence back into the queue."""
        seq.capacity = 0
        seq.status = Status.WAITING
        self._scheduler.preempt(seq)
        self.look_up(seq)  # where it stands in the queue depends on it

    def leave(self, seq: Sequence) -> None:
        """Take `seq` out of the running and keep what it computed, if anything."""
        self._scheduler.remove(seq)
        seq.status = Status.FINISHED
        self._let_go(seq)
        self._give_back(seq)

    def _give_back(self, seq: Sequence, *, preempted: bool = False) -> None:
        """Make a branch of its agent of what a sequence's cache holds; drop the working copy."""
        prefix_cache = self._prefix_cache
        cache = seq.cache
        branch = seq.branch
        blocks = seq.blocks
        self._look_at = 0.0
        seq.cache = seq.branch = seq.match = None
        seq.blocks = []
        seq.capacity = 0
        if cache is None or branch is None:
            return
        tokens = np.array(seq.tokens[: cache.length], dtype=np.uint32)
        same = None if preempted else prefix_cache.covering(branch, tokens)
        for block in blocks:
            block.last_used = time.time()
        opaque = self._runner.spec.opaque is not None
        unchanged = cache.length == seq.cached_at_start and not (preempted and seq.forked)
        if opaque or seq.discard or same is not None or unchanged:
            prefix_cache.drop_unneeded(blocks)
            prefix_cache.release(blocks)
            self._write_back.abandon(branch)
            if same is not None:
                same.last_used = same.agent.last_used = time.time()
            if opaque and not seq.discard:
                prefix_cache.enter(branch.agent)
        else:
            tail = CachedTail(tokens[cache.num_sealed :], lineage=seq.lineage)
            snapshot = cache.snapshot()
            if blocks and snapshot.tail is None:
                prefix_cache.add_states(blocks[-1], snapshot.blocks[-1])
            self._write_back.commit(branch, blocks, tail, snapshot.tail)
            self._write_back.note(branch.agent, branch)

    def _note_progress(self) -> None:
        """Give up unsaved caches, then a request, where nothing runs that could free RAM."""
        scheduler = self._scheduler
        budget = self._budget
        if not self.short or scheduler.active:
            budget.short_since = None
            return
        now = time.monotonic()
        budget.short_since = budget.short_since or now
        seq = scheduler.next_waiting()
        if seq is not None and now - budget.short_since > _GIVE_UP:
            budget.short_since = None
            self.leave(seq)
            message = (
                f"No RAM for caches came free: of kv_budget ({budget.limit:,} bytes) "
                f"{budget.used_bytes:,} are in use by agents that are pinned or can't be saved."
            )
            seq.fail(Busy(message, code="kv_budget_full"))
