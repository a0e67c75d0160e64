"""What the engine thread does: take commands, then schedule, run, commit, over and over."""

import logging
import queue
import time
from collections.abc import Callable
from dataclasses import replace
from typing import cast

import mlx.core as mx

from ..errors import AgentMemError, MemoryPressure, ShuttingDown
from ..kvcache.block import SealedBlock
from ..prefix_cache.block_pool import FRESH
from ..prefix_cache.cache import ROOT
from .admission import LOOK_INTERVAL, Admission
from .agents.export import Archives
from .agents.fork import Forks
from .agents.imports import ArchivedModel
from .agents.lifecycle import Lifecycle
from .api import FinishReason, TextDelta, TokenLogprob
from .figures import figures
from .logprobs import Logprobs, log_probabilities
from .metrics import Metrics
from .scheduler import Step
from .sequence import Sequence, Status
from .startup import Core
from .tasks import Tasks, failed_error

log = logging.getLogger(__name__)
_WATCH_INTERVAL = 0.25  # s between two looks at the process' memory


class EngineLoop:
    """Owned by the engine thread; every method runs there."""

    def __init__(self, core: Core, tasks: Tasks, inbox: "queue.SimpleQueue[Callable[[], None]]"):
        self.core, self._tasks, self._inbox = core, tasks, inbox
        self._admission = Admission(core, tasks)
        self.agents = Lifecycle(
            tasks=tasks,
            prefix_cache=core.prefix_cache,
            write_back=core.write_back,
            restorer=core.restorer,
            store=core.store,
            scheduler=core.scheduler,
            budget=core.budget,
            trace=core.trace,
        )
        self.forks = Forks(
            tasks=tasks,
            prefix_cache=core.prefix_cache,
            write_back=core.write_back,
            restorer=core.restorer,
            store=core.store,
            scheduler=core.scheduler,
            budget=core.budget,
        )
        self.archives = Archives(
            tasks=tasks,
            prefix_cache=core.prefix_cache,
            write_back=core.write_back,
            store=core.store,
            scheduler=core.scheduler,
            model=ArchivedModel(
                name=core.model.name,
                tokenizer=core.model.tokenizer,
                fingerprint=core.fingerprint,
                spec=core.runner.spec,
                vocab_size=core.runner.vocab_size,
            ),
        )
        self.ram_bytes = self.reserved_bytes = 0  # as they were between two steps
        self.memory_error: str | None = None
        self.metrics = Metrics(
            lambda: figures(core, self._admission.preemptions, self.ram_bytes, self.reserved_bytes)
        )
        self._drain_deadline: float | None = None  # time.monotonic()
        self._watch_due = 0.0  # time.monotonic()
        self._last_prefill = 0.0  # time.perf_counter()
        self._failed = False

    def run(self) -> None:
        """Until drained."""
        while True:
            self._take_commands()
            self._watch_memory()
            self._end_cancelled()
            self._admission.admit()
            self._end_prewarmed()
            self._admission.grow()
            step = self._schedule()
            if step is not None:
                self._commit(step, *self._decode(step))
                self._prefill(step)
            self._note_bytes()
            if self._drain_deadline is not None and self._drained():
                self._shut_down()
                return

    def run_failed(self) -> None:
        """After an internal failure: answer every request with it, until drained. The store keeps
        what it has.
        """
        self._failed = True
        for seq in (*self.core.scheduler.active, *self.core.scheduler.waiting):
            seq.fail(failed_error())
        self._tasks.end(failed_error())
        try:
            while self._drain_deadline is None:
                self._inbox.get()()
        finally:
            self._close()

    # -- commands

    def submit(self, seq: Sequence) -> None:
        try:
            if self._failed:
                raise failed_error()
            if self._drain_deadline is not None:
                raise ShuttingDown("the server is shutting down")
            if self.memory_error:
                raise MemoryPressure(self.memory_error)
            self.agents.check_ephemeral(seq.request)
            self.core.scheduler.add(seq)
            self._admission.entered(seq)
        except AgentMemError as e:
            seq.fail(e)

    def drain(self, grace: float) -> None:
        if self._drain_deadline is None:
            self._drain_deadline = time.monotonic() + grace
            for seq in [s for s in self.core.scheduler.waiting if not s.preempted]:
                self.core.scheduler.remove(seq)
                seq.fail(ShuttingDown("the server is shutting down"))

    def _take_commands(self) -> None:
        """Run what is in the inbox; with nothing else to do, wait for it or for the next tail to
        fall due.
        """
        timeout = self._idle_time()
        try:
            if timeout > 0:
                self._inbox.get(timeout=timeout)()
        except queue.Empty:
            return
        self._run_posted()

    def _run_posted(self) -> None:
        try:
            while True:
                self._inbox.get_nowait()()
        except queue.Empty:
            return

    def _idle_time(self) -> float:
        """Seconds that the thread may sleep."""
        if self.core.scheduler.can_run or self._admission.can_admit:
            return 0.0
        if self._drain_deadline is not None:
            return 0.02
        if self._admission.short or self.memory_error:
            return LOOK_INTERVAL
        soon = min(
            self.core.write_back.next_save - time.monotonic(),
            self.agents.next_expiry() - time.time(),
        )
        return min(60.0, max(0.0, soon))

    def _watch_memory(self) -> None:
        """Save what rests; keep the process below `--memory-limit`."""
        now = time.monotonic()
        if now >= self.core.write_back.next_save:
            self.core.write_back.save_idle()
        if now >= self._watch_due:
            self._watch_due = now + _WATCH_INTERVAL
            self.memory_error = self.core.budget.relieve_process()
            self.agents.delete_expired()

    def _note_bytes(self) -> None:
        self.reserved_bytes = self.core.budget.reserved_bytes
        self.ram_bytes = self.core.prefix_cache.pool.nbytes + self.reserved_bytes

    # -- schedule

    def _end_cancelled(self) -> None:
        for seq in [*self.core.scheduler.active, *self.core.scheduler.waiting]:
            if (
                seq.cancelled and seq.status is not Status.RESTORING
            ):  # a restore ends by itself, soon
                self._admission.leave(seq)

    def _end_prewarmed(self) -> None:
        for seq in list(self.core.scheduler.active):
            if seq.status is Status.DECODE and seq.request.params.max_tokens == 0:
                self._finish(seq, "length")

    def _schedule(self) -> Step | None:
        restorer = self.core.restorer
        since = max(restorer.reading_since, self._last_prefill)
        reading_ms = (time.perf_counter() - since) * 1e3 if restorer.incoming_bytes else None
        step = self.core.scheduler.schedule(reading_ms)
        if (
            step is not None
            and step.prefill is not None
            and self._admission.look_again(step.prefill)
        ):
            step = self.core.scheduler.schedule(reading_ms)
        return step

    # -- run

    def _decode(
        self, step: Step
    ) -> tuple[list[int], list[list[SealedBlock]], list[TokenLogprob | None]]:
        """Return for each decoding sequence the token sampled, the blocks sealed, and the token's
        log probability, if the sequence asks for it.
        """
        if not step.decode:
            return [], [], []
        runner, began = self.core.runner, time.perf_counter()
        caches = [seq.cache for seq in step.decode if seq.cache is not None]
        logits, fresh = runner.decode(caches, [seq.tokens[-1] for seq in step.decode])
        sampled = [
            seq.sampler(logits[i : i + 1, : self.core.vocab_size], seq.tokens, seq.prompt_len)
            for i, seq in enumerate(step.decode)
            if seq.sampler is not None
        ]
        asking, logprobs = self._logprobs(step, logits, sampled)
        runner.evaluate(sampled, fresh, logprobs)
        self.core.scheduler.pace.saw_decode((time.perf_counter() - began) * 1e3)
        agents = [seq.request.agent.agent_id for seq in step.decode]
        self.core.trace.span("decode", began, agents=agents, sealed=sum(map(len, fresh)))
        told: list[TokenLogprob | None] = [None] * len(sampled)
        if logprobs is not None:
            for i, logprob in zip(asking, logprobs.rows(), strict=True):
                num_top = step.decode[i].request.params.logprobs
                told[i] = replace(logprob, top=logprob.top[:num_top])
        return [cast(int, token.item()) for token in sampled], fresh, told

    def _logprobs(
        self, step: Step, logits: mx.array, sampled: list[mx.array]
    ) -> tuple[list[int], Logprobs | None]:
        """Return which rows of a step ask for log probabilities, and theirs, lazy."""
        wanted = [seq.request.params.logprobs for seq in step.decode]
        asking = [i for i, num_top in enumerate(wanted) if num_top is not None]
        if not asking:
            return [], None
        rows = logits[mx.array(asking), : self.core.vocab_size]
        tokens = mx.concatenate([sampled[i] for i in asking])
        return asking, log_probabilities(rows, tokens, max(wanted[i] or 0 for i in asking))

    def _prefill(self, step: Step) -> None:
        """After decode, so that whoever has just been restored need not wait for another one's
        chunk.
        """
        seq = step.prefill
        if seq is None:
            return
        assert seq.cache is not None
        at, began = seq.cache.length, time.perf_counter()
        fresh = self._prefill_chunk(seq, at, at + step.chunk)
        self._last_prefill = time.perf_counter()
        took_ms = (self._last_prefill - began) * 1e3
        seq.served_ms += took_ms
        self.core.scheduler.pace.saw_prefill(took_ms, step.chunk)
        self.core.trace.span("prefill", began, agent=seq.request.agent.agent_id, tokens=step.chunk)
        self._sealed(seq, fresh)
        if seq.request.on_progress is not None:
            seq.request.on_progress(seq.cache.length, seq.prompt_len)
        self._admission.prefilled_maybe(seq)

    def _prefill_chunk(self, seq: Sequence, start: int, end: int) -> list[SealedBlock]:
        """Return the blocks that filled up; tell the prompt's log probabilities if they are wanted."""
        runner = self.core.runner
        assert seq.cache is not None
        if not seq.num_to_score:
            return runner.prefill(seq.cache, seq.tokens[start:end])
        fresh, scored = runner.prefill_scored(
            seq.cache,
            seq.tokens[start:end],
            seq.tokens[start + 1 : end + 1],
            num_top=seq.request.params.prompt_logprobs or 0,
            vocab_size=self.core.vocab_size,
        )
        # after a preemption some may have been told before
        if news := scored[max(0, seq.num_scored - start) :]:
            seq.num_scored += len(news)
            seq.emit(TextDelta("", tuple(news)))
        return fresh

    # -- commit

    def _commit(
        self,
        step: Step,
        sampled: list[int],
        fresh: list[list[SealedBlock]],
        logprobs: list[TokenLogprob | None],
    ) -> None:
        for seq, token, blocks, logprob in zip(step.decode, sampled, fresh, logprobs, strict=True):
            self._sealed(seq, blocks)
            seq.tokens.append(token)
            now = time.perf_counter()
            if seq.num_generated == 1:
                seq.first_token = now
            else:
                self.metrics.token_after(now - seq.last_token)
            seq.last_token = now
            assert seq.output is not None
            text, stopped = seq.output.feed(token)
            full = (
                seq.num_generated >= seq.request.params.max_tokens
                or len(seq.tokens) >= self.core.budget.max_context
            )
            if full and not stopped:
                text += seq.output.finish()
            if text or logprob is not None:
                seq.emit(TextDelta(text, (logprob,) if logprob is not None else ()))
            if stopped or full:
                self._finish(seq, "stop" if stopped else "length")

    def _finish(self, seq: Sequence, reason: FinishReason) -> None:
        agent = self.core.prefix_cache.agent(seq.request.agent)
        agent.requests += 1
        agent.hit_tokens += seq.num_cached
        self._admission.leave(seq)
        self.metrics.finished(seq.stats())
        seq.finish(reason)

    def _sealed(self, seq: Sequence, blocks: list[SealedBlock]) -> None:
        """Enter the blocks that a step filled up into the tree, and queue them to be written."""
        if not blocks:
            return
        began = time.perf_counter()
        prefix_cache, size = self.core.prefix_cache, self.core.runner.spec.block_size
        scope = prefix_cache.scope(seq.request.agent)
        assert seq.cache is not None and seq.branch is not None
        for block in blocks:
            index = len(seq.nodes)
            parent = seq.nodes[-1].key if seq.nodes else ROOT
            tokens = seq.tokens[index * size : (index + 1) * size]
            node = prefix_cache.seal(
                scope, parent, tokens, seq.lineage, block, ephemeral=seq.branch.agent.ephemeral
            )
            seq.lineage = FRESH
            if node.data is not None and node.data is not block:
                seq.cache.adopt(index, node.data)
            prefix_cache.hold([node])
            seq.nodes.append(node)
            # the state at the end of a block is only known to be wanted once nothing follows: it
            # waits for the next
            path = seq.nodes[:-1] if self.core.runner.spec.resumes_at_snapshots else list(seq.nodes)
            if path and not seq.discard:
                self.core.write_back.save_block(seq.branch, path)
        prefix_cache.drop_unneeded(seq.nodes)
        self.core.trace.span("seal", began, agent=seq.request.agent.agent_id, blocks=len(blocks))

    # -- stop

    def _drained(self) -> bool:
        assert self._drain_deadline is not None
        scheduler = self.core.scheduler
        if time.monotonic() < self._drain_deadline:
            return not scheduler.active and not scheduler.waiting
        for seq in (*scheduler.active, *scheduler.waiting):
            if seq.status is not Status.RESTORING:
                self._admission.leave(seq)
                seq.fail(
                    ShuttingDown(
                        "the server is shutting down: the answer was cut after the grace time"
                    )
                )
        return not scheduler.active and not scheduler.waiting

    def _shut_down(self) -> None:
        """Save until all is on disk, or nothing more gets there."""
        before = -1
        for agent in self.core.prefix_cache.agents.values():
            self.core.write_back.note(agent, now=True)
        while self.core.write_back.save_idle(now=True):
            self.core.store.flush().result()
            self._run_posted()
            written = self.core.store.stats()["writes"]
            if written == before:
                log.error(
                    "not everything could be saved: %s",
                    self.core.store.background_error or "see above",
                )
                break
            before = written
        self._close()
        mx.clear_cache()

    def _close(self) -> None:
        self.core.store.close()
        self._run_posted()  # what was still being read for someone
        self._tasks.end(ShuttingDown("the server is shutting down"))
        self.core.trace.close()
