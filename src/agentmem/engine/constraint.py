"""Constraint: the tokens that may come next in an answer that is held to a grammar."""

from collections.abc import Sequence
from concurrent.futures import Executor, Future

import mlx.core as mx
import numpy as np
from llguidance import LLMatcher

from ..errors import AgentMemError, InvalidRequest

_BITS = 32  # tokens in a word of a mask


class Constraint:
    """What one answer is held to: its place in the grammar, and the mask of the next token there.

    A mask is computed on a thread of its own as soon as the token before is known. Used by the
    engine thread only, which so waits for it after the model's pass has been started.
    """

    def __init__(self, matcher: LLMatcher, vocab_size: int, threads: Executor):
        """`matcher` stands at the beginning of the grammar; `vocab_size`: ids that are sampled."""
        self._matcher = matcher.deep_copy()
        self._num_words = -(-vocab_size // _BITS)
        self._threads = threads
        self._mask = self._begin_mask()
        self.is_complete = False  # the answer is whole, and nothing can follow
        self.error: AgentMemError | None = None  # why the answer can't go on

    def _begin_mask(self) -> Future[bytes]:
        return self._threads.submit(self._matcher.compute_bitmask)

    def mask(self) -> np.ndarray:
        """Return which tokens may come next, a bit for each, uint32 [ceil(vocab_size / 32)].

        They are all of them, and `error` is set, where the grammar can't say.
        """
        words = np.frombuffer(self._mask.result(), dtype="<u4")[: self._num_words]
        padded = np.zeros(self._num_words, np.uint32)
        padded[: len(words)] = words
        if self._matcher.is_error() or not padded.any():
            self._fail("no token of this model goes on with it")
            padded[:] = 0xFFFFFFFF
        return padded

    def accept(self, token: int) -> None:
        """Go on after a token; sets `error` where the grammar does not know it."""
        if self.error is not None:
            return
        if not self._matcher.consume_token(token):
            self._fail(f"token {token} does not go on with it")
            return
        self.is_complete = self._matcher.is_stopped()
        if not self.is_complete:  # from here on the matcher is the other thread's
            self._mask = self._begin_mask()

    def _fail(self, otherwise: str) -> None:
        why = " ".join(self._matcher.get_error().removesuffix("<non-verbose/>").split())[:300]
        message = f"The answer can't go on under its grammar: {why or otherwise}"
        self.error = InvalidRequest(message, code="grammar_failed")


def allowed_tokens(masks: Sequence[np.ndarray], vocab_size: int) -> mx.array:
    """Return masks as bool [n, vocab], lazy. What goes to the device are the bits.

    Example, with words of 4 bits and 6 tokens: of [0b1001, 0b10] tokens 0, 3 and 5 are allowed.
    """
    words = mx.array(np.stack(masks))
    bits = (words[:, :, None] >> mx.arange(_BITS, dtype=mx.uint32)) & 1
    return bits.reshape(len(masks), -1)[:, :vocab_size].astype(mx.bool_)
