"""Stepper: one step of the engine after the other, over the sequences that run."""

import time
from dataclasses import dataclass, field, replace
from typing import cast

import mlx.core as mx

from ..errors import AgentMemError
from ..kvcache.block import SealedBlock
from ..prefix_cache.cache import PrefixCache
from ..prefix_cache.lineage import FRESH, ROOT
from ..prefix_cache.restore import Restorer
from ..prefix_cache.write_back import WriteBack
from .admission import Admission
from .api import FinishReason, TextDelta, TokenLogprob
from .constraint import allowed_tokens
from .logprobs import Logprobs, log_probabilities
from .metrics import Metrics
from .model_runner import ModelRunner
from .scheduler import Scheduler, Step
from .sequence import Sequence, Status
from .trace import Trace


@dataclass(frozen=True)
class Decoded:
    """What a step brought each sequence that decodes, in the order of `Step.decode`."""

    tokens: list[int] = field(default_factory=list)  # sampled
    sealed: list[list[SealedBlock]] = field(default_factory=list)  # blocks that filled up
    # of the token, where it is asked for
    logprobs: list[TokenLogprob | None] = field(default_factory=list)


class Stepper:
    """Schedules, runs and commits. Engine thread only."""

    def __init__(
        self,
        *,
        runner: ModelRunner,
        scheduler: Scheduler,
        admission: Admission,
        prefix_cache: PrefixCache,
        restorer: Restorer,
        write_back: WriteBack,
        metrics: Metrics,
        trace: Trace,
        max_context: int,
        vocab_size: int,
    ):
        """`max_context`: tokens of prompt and answer; `vocab_size`: ids that may be sampled."""
        self._runner = runner
        self._scheduler = scheduler
        self._admission = admission
        self._prefix_cache = prefix_cache
        self._restorer = restorer
        self._write_back = write_back
        self._metrics = metrics
        self._trace = trace
        self._max_context = max_context
        self._vocab_size = vocab_size
        self._last_prefill = 0.0  # time.perf_counter()

    def step(self) -> None:
        """Decode a token for each running sequence, then prefill a chunk of another's prompt.

        Decode comes first, so that whoever has just been restored need not wait for a chunk.
        """
        step = self._schedule()
        if step is not None:
            self._commit(step, self._decode(step))
            self._prefill(step)

    def end_prewarmed(self) -> None:
        """Finish what was prefilled and asks for no token."""
        for seq in list(self._scheduler.active):
            if seq.status is Status.DECODE and seq.request.params.max_tokens == 0:
                self._finish(seq, "length")

    def _schedule(self) -> Step | None:
        """Return the next step. A prefill that begins looks for newly sealed blocks first."""
        restorer = self._restorer
        since = max(restorer.reading_since, self._last_prefill)
        reading_ms = (time.perf_counter() - since) * 1e3 if restorer.incoming_bytes else None
        step = self._scheduler.schedule(reading_ms)
        if (
            step is not None
            and step.prefill is not None
            and self._admission.look_again(step.prefill)
        ):
            self.end_prewarmed()  # its whole prompt may be in the cache now
            step = self._scheduler.schedule(reading_ms)
        return step

    def _decode(self, step: Step) -> Decoded:
        """Run one token of each decoding sequence, and sample the next."""
        if not step.decode:
            return Decoded()
        runner = self._runner
        began = time.perf_counter()
        caches = [seq.cache for seq in step.decode if seq.cache is not None]
        logits, fresh = runner.decode(caches, [seq.tokens[-1] for seq in step.decode])
        allowed = self._allowed(step, logits)
        sampled = [
            self._sample(seq, logits[i : i + 1, : self._vocab_size], allowed.get(i))
            for i, seq in enumerate(step.decode)
        ]
        asking, logprobs = self._logprobs(step, logits, sampled)
        runner.evaluate(sampled, fresh, logprobs)
        self._scheduler.pace.saw_decode((time.perf_counter() - began) * 1e3)
        agents = [seq.request.agent.agent_id for seq in step.decode]
        self._trace.span("decode", began, agents=agents, sealed=sum(map(len, fresh)))
        told: list[TokenLogprob | None] = [None] * len(sampled)
        if logprobs is not None:
            for i, logprob in zip(asking, logprobs.rows(), strict=True):
                num_top = step.decode[i].request.params.logprobs
                told[i] = replace(logprob, top=logprob.top[:num_top])
        return Decoded([cast(int, token.item()) for token in sampled], fresh, told)

    def _allowed(self, step: Step, logits: mx.array) -> dict[int, mx.array]:
        """Return the tokens that may come next, bool [1, vocab], of rows held to a grammar, lazy.

        The pass runs while their masks are waited for.
        """
        rows = {
            i: seq.constraint for i, seq in enumerate(step.decode) if seq.constraint is not None
        }
        if not rows:
            return {}
        mx.async_eval(logits)  # type: ignore[no-untyped-call]
        allowed = allowed_tokens([held.mask() for held in rows.values()], self._vocab_size)
        return {i: allowed[n : n + 1] for n, i in enumerate(rows)}

    def _sample(self, seq: Sequence, logits: mx.array, allowed: mx.array | None) -> mx.array:
        """Return a sequence's next token [1] by its logits [1, vocab], lazy."""
        assert seq.sampler is not None
        if allowed is not None:  # before bias and penalties: nothing lifts what may not come
            logits = mx.where(allowed, logits, -mx.inf)
        return seq.sampler(logits, seq.tokens, seq.prompt_len)

    def _logprobs(
        self, step: Step, logits: mx.array, sampled: list[mx.array]
    ) -> tuple[list[int], Logprobs | None]:
        """Return which rows of a step ask for log probabilities, and theirs, lazy."""
        wanted = [seq.request.params.logprobs for seq in step.decode]
        asking = [i for i, num_top in enumerate(wanted) if num_top is not None]
        if not asking:
            return [], None
        rows = logits[mx.array(asking), : self._vocab_size]
        tokens = mx.concatenate([sampled[i] for i in asking])
        return asking, log_probabilities(rows, tokens, max(wanted[i] or 0 for i in asking))

    def _prefill(self, step: Step) -> None:
        """Run a chunk of a prompt."""
        seq = step.prefill
        if seq is None:
            return
        assert seq.cache is not None
        at = seq.cache.length
        began = time.perf_counter()
        fresh = self._prefill_chunk(seq, at, at + step.chunk)
        self._last_prefill = time.perf_counter()
        took_ms = (self._last_prefill - began) * 1e3
        seq.served_ms += took_ms
        self._scheduler.pace.saw_prefill(took_ms, step.chunk)
        self._metrics.prefilled(step.chunk)
        self._trace.span("prefill", began, agent=seq.request.agent.agent_id, tokens=step.chunk)
        self._sealed(seq, fresh)
        if seq.request.on_progress is not None:
            seq.request.on_progress(seq.cache.length, seq.prompt_len)
        self._admission.prefilled_maybe(seq)

    def _prefill_chunk(self, seq: Sequence, start: int, end: int) -> list[SealedBlock]:
        """Return the blocks that filled up; tell the prompt's log probabilities if asked for."""
        runner = self._runner
        assert seq.cache is not None
        if not seq.num_to_score:
            return runner.prefill(seq.cache, seq.tokens[start:end])
        fresh, scored = runner.prefill_scored(
            seq.cache,
            seq.tokens[start:end],
            seq.tokens[start + 1 : end + 1],
            num_top=seq.request.params.prompt_logprobs or 0,
            vocab_size=self._vocab_size,
        )
        # after a preemption some may have been told before
        if news := scored[max(0, seq.num_scored - start) :]:
            seq.num_scored += len(news)
            for one in (seq, *seq.forks):
                one.emit(TextDelta("", tuple(news)))
        return fresh

    def _commit(self, step: Step, decoded: Decoded) -> None:
        """Append each token to its sequence, tell its text, and finish what is at its end."""
        rows = zip(step.decode, decoded.tokens, decoded.sealed, decoded.logprobs, strict=True)
        for seq, token, blocks, logprob in rows:
            self._sealed(seq, blocks)
            seq.tokens.append(token)
            now = time.perf_counter()
            if seq.num_generated == 1:
                seq.first_token = now
            else:
                self._metrics.token_after(now - seq.last_token)
            seq.last_token = now
            assert seq.output is not None
            text, stopped = seq.output.feed(token)
            if seq.constraint is not None:
                if not stopped:
                    seq.constraint.accept(token)
                if seq.constraint.error is not None:
                    self._fail(seq, seq.constraint.error)
                    continue
                if not stopped and seq.constraint.is_complete:
                    text += seq.output.finish()
                    stopped = True
            full = (
                seq.num_generated >= seq.request.params.max_tokens
                or len(seq.tokens) >= self._max_context
            )
            if full and not stopped:
                text += seq.output.finish()
            if text or logprob is not None:
                told = (logprob,) if logprob is not None else ()
                seq.emit(TextDelta(text, told, num_tokens=seq.num_generated))
            if stopped or full:
                self._finish(seq, "stop" if stopped else "length")

    def _finish(self, seq: Sequence, reason: FinishReason) -> None:
        """End a sequence; what it computed becomes its agent's."""
        agent = self._prefix_cache.agent(seq.request.agent)
        if not seq.forked:
            agent.requests += 1
            agent.hit_tokens += seq.num_cached
            self._metrics.finished(seq.stats())
        self._metrics.answered(seq.num_generated)
        self._admission.leave(seq)
        seq.finish(reason)

    def _fail(self, seq: Sequence, error: AgentMemError) -> None:
        """End a sequence by an error of its own; what it computed before becomes its agent's."""
        self._metrics.failed_grammars += 1
        self._admission.leave(seq)
        seq.fail(error)

    def _sealed(self, seq: Sequence, sealed: list[SealedBlock]) -> None:
        """Enter the blocks that a step filled up into the tree, and queue them to be written."""
        if not sealed:
            return
        began = time.perf_counter()
        prefix_cache = self._prefix_cache
        size = self._runner.spec.block_size
        scope = prefix_cache.scope(seq.request.agent)
        assert seq.cache is not None and seq.branch is not None
        for data in sealed:
            index = len(seq.blocks)
            parent = seq.blocks[-1].key if seq.blocks else ROOT
            tokens = seq.tokens[index * size : (index + 1) * size]
            block = prefix_cache.seal(
                scope=scope,
                parent=parent,
                tokens=tokens,
                lineage=seq.lineage,
                data=data,
                ephemeral=seq.branch.agent.ephemeral,
            )
            seq.lineage = FRESH
            if block.data is not None and block.data is not data:
                seq.cache.adopt(index, block.data)
            prefix_cache.hold([block])
            seq.blocks.append(block)
            # the state at the end of a block is only known to be wanted once nothing follows: it
            # waits for the next
            path = seq.blocks[:-1] if self._runner.spec.resumes_at_snapshots else list(seq.blocks)
            if path and not seq.discard:
                self._write_back.save_block(seq.branch, path)
        prefix_cache.drop_unneeded(seq.blocks)
        self._trace.span("seal", began, agent=seq.request.agent.agent_id, blocks=len(sealed))
