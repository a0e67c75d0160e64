"""Sampler: mlx-lm's samplers and processors, with random numbers of each sequence's own."""

import os

import mlx.core as mx
from mlx_lm.sample_utils import make_logits_processors, make_sampler

from .api import SamplingParams

_ALL_TOKENS = 1 << 30  # context size of a penalty that looks at the whole answer


def _top_k(params: SamplingParams, vocab_size: int) -> int:
    """Return from how many of the likeliest tokens is chosen; 0: from all."""
    if params.top_p == 0:  # the smallest nucleus, which mlx-lm takes for none
        return 1
    return params.top_k if params.top_k < vocab_size else 0


class Sampler:
    """One sequence's way from logits to the next token.

    The random numbers of its nth token depend on its seed and n, never on batchmates.
    """

    def __init__(self, params: SamplingParams, vocab_size: int):
        self._seed = int.from_bytes(os.urandom(8), "little") if params.seed is None else params.seed
        self._greedy = params.temperature == 0
        self._sample = make_sampler(
            temp=params.temperature,
            top_p=params.top_p,
            min_p=params.min_p,
            top_k=_top_k(params, vocab_size),
        )
        self._processors = make_logits_processors(
            logit_bias={token: bias for token, bias in params.logit_bias if token < vocab_size}
            or None,
            repetition_penalty=None
            if params.repetition_penalty == 1
            else params.repetition_penalty,
            repetition_context_size=params.repetition_context_size,
        )
        self._answer_processors = make_logits_processors(
            presence_penalty=params.presence_penalty or None,
            presence_context_size=_ALL_TOKENS,
            frequency_penalty=params.frequency_penalty or None,
            frequency_context_size=_ALL_TOKENS,
        )

    def __call__(self, logits: mx.array, tokens: list[int], prompt_len: int) -> mx.array:
        """Return one token [1] for logits [1, vocab], lazy. `tokens`: prompt and answer so far."""
        for process in self._processors:
            logits = process(tokens, logits)
        if self._answer_processors and len(tokens) > prompt_len:
            answer = mx.array(tokens[prompt_len:])
            for process in self._answer_processors:
                logits = process(answer, logits)
        if self._greedy:
            return mx.argmax(logits, axis=-1)
        mx.random.seed((self._seed + (len(tokens) - prompt_len) * 0x9E3779B97F4A7C15) % 2**64)
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        token: mx.array = self._sample(logprobs)
        return token
