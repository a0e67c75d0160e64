"""Every forward pass: prefill of one sequence, decode of a batch. Engine thread only."""

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx

from ..kvcache.attention import install_seam, verify_seam
from ..kvcache.block import SealedBlock, Snapshot
from ..kvcache.cache import BatchQuantizedKVCache, SequenceCache
from ..kvcache.calibrate import key_centres
from ..kvcache.quantize import CacheSpace
from ..kvcache.spec import KVBits, read_spec


class ModelRunner:
    """A loaded model behind the attention seam, and the caches it runs over."""

    def __init__(self, model: Any, *, kv_bits: KVBits = "4", block_size: int = 256):
        """Install the seam, read the spec and check the seam's numbers. Raises ModelError."""
        self.model = model
        install_seam(model)
        self.spec = read_spec(model, kv_bits=kv_bits, block_size=block_size)
        self.plain_spec = replace(self.spec, kv_bits="16")
        self._space = CacheSpace(self.spec)
        self.on_codes = False
        self.vocab_size: int = model(mx.array([[0]])).shape[-1]
        cache = SequenceCache(self.plain_spec, CacheSpace(self.plain_spec))
        verify_seam(model, lambda tokens: self.forward(tokens, [cache])[0], self.vocab_size)

    def calibrate(self, tokens: list[int]) -> list[mx.array]:
        """Key centres of this model, see kvcache/calibrate.py."""
        return key_centres(self.plain_spec, lambda t, cache: self.forward(t, [cache]), tokens)

    def use_centres(self, centres: list[mx.array]) -> None:
        self._space = CacheSpace(self.spec, centres)

    def new_cache(self, snapshot: Snapshot | None = None, capacity: int = 0) -> SequenceCache:
        return SequenceCache(self.spec, self._space, snapshot, capacity=capacity, on_codes=self.on_codes)

    def forward(self, tokens: mx.array, caches: Sequence[SequenceCache]) -> tuple[mx.array, list[list[SealedBlock]]]:
        """tokens [B, L] through the model; (logits [B, L, vocab], blocks that filled up), both lazy."""
        batch = BatchQuantizedKVCache(caches)
        logits = self.model(tokens, cache=batch.layers)
        return logits, batch.advance(tokens.shape[1])

    def prefill(self, cache: SequenceCache, tokens: Sequence[int]) -> list[SealedBlock]:
        """Append `tokens`, evaluated; no logits are computed. Returns the blocks that filled up."""
        _, [fresh] = self.forward(mx.array([list(tokens)]), [cache])
        mx.eval(cache.arrays(), [block.arrays for block in fresh])
        return fresh

    def decode(
        self, caches: Sequence[SequenceCache], tokens: Sequence[int]
    ) -> tuple[mx.array, list[list[SealedBlock]]]:
        """One token for each sequence: (logits [B, vocab], blocks that filled up), lazy: `settle` evaluates."""
        logits, fresh = self.forward(mx.array(list(tokens))[:, None], caches)
        return logits[:, -1], fresh

    @staticmethod
    def settle(sampled: list[mx.array], fresh: list[list[SealedBlock]]) -> None:
        """Evaluate a decode step: the sampled tokens and what was sealed."""
        mx.eval(sampled, [block.arrays for blocks in fresh for block in blocks])

    def choose_attention(self, num_tokens: int = 2048) -> dict[str, float]:
        """Time a decode step over `num_tokens` sealed tokens on codes and on their dequantized copy; use the faster.

        Returns {"dequantized": ms, "codes": ms}. One block, repeated, will do: time does not depend on values.
        """
        if self.spec.bits is None:
            return {}
        times = {}
        snapshot = self._repeated_block(max(1, num_tokens // self.spec.block_size))
        for name, on_codes in (("dequantized", False), ("codes", True)):
            cache = SequenceCache(self.spec, self._space, snapshot, on_codes=on_codes)
            runs = []
            for _ in range(5):
                began = time.perf_counter()
                logits, fresh = self.decode([cache], [0])
                self.settle([logits], fresh)
                runs.append((time.perf_counter() - began) * 1e3)
            times[name] = sorted(runs[1:])[1]
        self.on_codes = times["codes"] < times["dequantized"]
        return times

    def _repeated_block(self, count: int) -> Snapshot:
        [first] = self.prefill(SequenceCache(self.spec, self._space), [0] * self.spec.block_size)
        later = SealedBlock({name: a for name, a in first.arrays.items() if not name.endswith("sinks")})
        return Snapshot((first, *[later] * (count - 1)))
