"""ModelRunner: every forward pass, prefill of one sequence and decode of a batch."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from ..errors import ModelError
from ..kvcache.attention import TOLERANCE, install_seam, relative_error, verify_seam
from ..kvcache.backend import AttentionBackend, attention_backend
from ..kvcache.batch import BatchQuantizedKVCache
from ..kvcache.block import SealedBlock, Snapshot
from ..kvcache.calibrate import key_centres
from ..kvcache.layers.opaque import OpaqueCache
from ..kvcache.quantize import CacheSpace
from ..kvcache.sequence import SequenceCache
from ..kvcache.spec import KVBits, KVCacheSpec
from ..kvcache.trace import MODEL_ERRORS, all_model_attends, opaque_spec, read_spec
from .api import TokenLogprob
from .logprobs import Logprobs, log_probabilities

Cache = SequenceCache | OpaqueCache
_LOGITS_BYTES = 64 << 20  # of one pass whose logits are all wanted, in float32


class ModelRunner:
    """A loaded model behind the attention seam, and the caches it runs over. Engine thread only."""

    def __init__(
        self,
        model: Any,
        *,
        kv_bits: KVBits = "4",
        block_size: int = 256,
        state_interval: int | None = None,
        backend: AttentionBackend | None = None,
    ):
        """Install the seam, read the spec and check its numbers against mlx-lm's.

        Where they part, `spec.opaque` says why. `backend`: the way of attention; None: the one for
        MLX's default device.
        """
        self._backend = backend or attention_backend()
        self.model = model
        install_seam(model)
        self.on_codes = False
        self.vocab_size: int = model(mx.array([[0]])).shape[-1]
        self.spec, self.batchable = self._understood(
            read_spec(model, kv_bits=kv_bits, block_size=block_size, state_interval=state_interval)
        )
        self.plain_spec = replace(self.spec, kv_bits="16")
        self._space = CacheSpace(self.spec)

    def _understood(self, spec: KVCacheSpec) -> tuple[KVCacheSpec, bool]:
        """Return the spec that gives mlx-lm's logits, and whether a batch does too."""
        reason = ""
        candidates = [spec, all_model_attends(spec)]
        for candidate in [c for c in candidates if c is not None and c.opaque is None]:
            plain = replace(candidate, kv_bits="16")
            try:
                verify_seam(self.model, self._forwarder(plain), self.vocab_size)
                return candidate, self._batches(plain)
            except ModelError as e:
                reason = reason or str(e)
            except MODEL_ERRORS as e:
                error = f"{type(e).__name__}: {e}"
                why = f"its code does not work with caches other than its own ({error})"
                reason = reason or why
        return (
            spec if spec.opaque else opaque_spec(self.model, reason, spec.kv_bits, spec.block_size)
        ), False

    def _forwarder(self, plain: KVCacheSpec) -> Callable[[mx.array], mx.array]:
        cache = SequenceCache(plain, CacheSpace(plain), backend=self._backend)
        return lambda tokens: self._forward(plain, tokens, [cache])[0]

    def _batches(self, plain: KVCacheSpec) -> bool:
        """Tell whether the model takes a batch of sequences of unequal length."""
        space = CacheSpace(plain)
        tokens = mx.array([[(7919 * i + 13) % self.vocab_size for i in range(12)]])

        def prefilled() -> list[SequenceCache]:
            caches = [SequenceCache(plain, space, backend=self._backend) for _ in range(2)]
            for cache, n in zip(caches, (11, 5), strict=True):
                self._forward(plain, tokens[:, :n], [cache])
            return caches

        alone = [self._pass(plain, tokens[:, 11:], [cache])[0] for cache in prefilled()]
        try:
            together, _ = self._pass(plain, mx.concatenate([tokens[:, 11:]] * 2), prefilled())
            return relative_error(together, mx.concatenate(alone)) < TOLERANCE
        except MODEL_ERRORS:
            return False

    def calibrate(self, tokens: list[int]) -> list[mx.array]:
        """Return the key centres of this model, one array a layer, see kvcache/calibrate.py."""
        plain = self.plain_spec
        empty = SequenceCache(plain, CacheSpace(plain), backend=self._backend)
        return key_centres(plain, empty, lambda t, cache: self._forward(plain, t, [cache]), tokens)

    def use_centres(self, centres: list[mx.array], space: type[CacheSpace] = CacheSpace) -> None:
        """Quantize keys around `centres` from now on."""
        self._space = space(self.spec, centres)

    def new_cache(
        self,
        snapshot: Snapshot | None = None,
        capacity: int = 0,
        checkpoint_at: int | None = None,
        last_state: int = 0,
    ) -> Cache:
        """Make a cache for one sequence, see SequenceCache."""
        if self.spec.opaque is not None:
            return OpaqueCache(make_prompt_cache(self.model))
        return SequenceCache(
            self.spec,
            self._space,
            snapshot,
            capacity=capacity,
            on_codes=self.on_codes,
            checkpoint_at=checkpoint_at,
            last_state=last_state,
            backend=self._backend,
        )

    def forward(
        self, tokens: mx.array, caches: Sequence[Cache]
    ) -> tuple[mx.array, list[list[SealedBlock]]]:
        """Run tokens [B, L] through the model.

        Returns logits [B, L, vocab] and each sequence's blocks that filled up, both lazy.
        """
        return self._forward(self.spec, tokens, caches)

    def _forward(
        self, spec: KVCacheSpec, tokens: mx.array, caches: Sequence[Cache]
    ) -> tuple[mx.array, list[list[SealedBlock]]]:
        if len(caches) > 1 and not (self.batchable and all(c.batchable for c in caches)):
            each = [
                self._forward(spec, tokens[b : b + 1], [cache]) for b, cache in enumerate(caches)
            ]
            return mx.concatenate([logits for logits, _ in each]), [fresh for _, [fresh] in each]
        if tokens.shape[1] <= min(cache.pass_limit for cache in caches):
            return self._pass(spec, tokens, caches)
        parts = []
        fresh = []
        while tokens.shape[1]:
            n = caches[0].pass_limit
            logits, [blocks] = self._pass(spec, tokens[:, :n], caches)
            parts.append(logits)
            fresh += blocks
            tokens = tokens[:, n:]
        return mx.concatenate(parts, axis=1), [fresh]

    def _pass(
        self, spec: KVCacheSpec, tokens: mx.array, caches: Sequence[Cache]
    ) -> tuple[mx.array, list[list[SealedBlock]]]:
        [*ours] = [cache for cache in caches if isinstance(cache, SequenceCache)]
        if not ours:
            [opaque] = caches
            assert isinstance(opaque, OpaqueCache)
            logits = self.model(tokens, cache=opaque.caches)
            return logits, [opaque.advance(tokens.shape[1])]
        batch = BatchQuantizedKVCache(spec, ours)
        logits = self.model(tokens, cache=batch.layers)
        return logits, batch.advance(tokens.shape[1])

    def prefill(self, cache: Cache, tokens: Sequence[int]) -> list[SealedBlock]:
        """Append `tokens`, evaluated; no logits are computed. Returns the blocks that filled up."""
        _, [fresh] = self.forward(mx.array([list(tokens)]), [cache])
        mx.eval(cache.arrays(), [block.arrays for block in fresh])
        return fresh

    def prefill_scored(
        self,
        cache: Cache,
        tokens: Sequence[int],
        following: Sequence[int],
        *,
        num_top: int,
        vocab_size: int,
    ) -> tuple[list[SealedBlock], list[TokenLogprob]]:
        """Append `tokens` as `prefill` does, and return the log probabilities of what follows.

        `following`: a token for each of them; `vocab_size`: ids that count. A pass is over few
        tokens, since logits are large.
        """
        step = max(1, _LOGITS_BYTES // (4 * self.vocab_size))
        sealed: list[SealedBlock] = []
        scored: list[TokenLogprob] = []
        for at in range(0, len(tokens), step):
            logits, [fresh] = self.forward(mx.array([list(tokens[at : at + step])]), [cache])
            wanted = mx.array(list(following[at : at + step]))
            logprobs = log_probabilities(logits[0, :, :vocab_size], wanted, num_top)
            mx.eval(cache.arrays(), [block.arrays for block in fresh], logprobs.arrays)
            sealed += fresh
            scored += logprobs.rows()
        return sealed, scored

    def decode(
        self, caches: Sequence[Cache], tokens: Sequence[int]
    ) -> tuple[mx.array, list[list[SealedBlock]]]:
        """Run one token of each sequence through the model.

        Returns logits [B, vocab] and each sequence's blocks that filled up, both lazy: `evaluate`
        evaluates them.
        """
        logits, fresh = self.forward(mx.array(list(tokens))[:, None], caches)
        return logits[:, -1], fresh

    @staticmethod
    def evaluate(
        sampled: list[mx.array], fresh: list[list[SealedBlock]], logprobs: Logprobs | None = None
    ) -> None:
        """Evaluate a decode step: the sampled tokens, what was sealed, and log probabilities."""
        more = logprobs.arrays if logprobs is not None else []
        mx.eval(sampled, [block.arrays for blocks in fresh for block in blocks], more)

    def choose_attention(self, num_tokens: int = 2048) -> dict[str, float]:
        """Time a decode step on codes and on their dequantized copy; use the faster.

        The step is over `num_tokens` sealed tokens. Returns {"dequantized": ms, "codes": ms}. One
        block, repeated, will do: time does not depend on values.
        """
        if self.spec.bits is None:
            return {}
        times = {}
        snapshot = self._repeated_block(max(1, num_tokens // self.spec.block_size))
        for name, on_codes in (("dequantized", False), ("codes", True)):
            cache = SequenceCache(
                self.spec, self._space, snapshot, on_codes=on_codes, backend=self._backend
            )
            runs = []
            for _ in range(5):
                began = time.perf_counter()
                logits, fresh = self.decode([cache], [0])
                self.evaluate([logits], fresh)
                runs.append((time.perf_counter() - began) * 1e3)
            times[name] = sorted(runs[1:])[1]
        self.on_codes = times["codes"] < times["dequantized"]
        return times

    def _repeated_block(self, count: int) -> Snapshot:
        """Return a snapshot of `count` blocks, all but the first one the same."""
        cache = SequenceCache(self.spec, self._space, backend=self._backend)
        [first] = self.prefill(cache, [0] * self.spec.block_size)
        later = SealedBlock(
            {name: a for name, a in first.arrays.items() if not name.endswith("sinks")}
        )
        return Snapshot((first, *[later] * (count - 1)))
