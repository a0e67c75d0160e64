"""The text of each token, one after the other, and where it begins in the whole.

Worked example, with a tokenizer of bytes: of "aé" the tokens are "a", "bytes:\\xc3" and
"bytes:\\xa9", which begin at 0, 1 and 1: the last two are one character together.
"""

import codecs
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from .token_bytes import TokenBytes

T = TypeVar("T")
InThread = Callable[[Callable[[], Any]], Awaitable[Any]]


class TokenTexts:
    """Follows one text token by token."""

    def __init__(
        self,
        tokenizer: Any,
        token_bytes: TokenBytes,
        in_thread: InThread,
        after: int | None = None,
        *,
        drops_blank: bool = False,
    ):
        """`tokenizer` is an mlx_lm TokenizerWrapper; `after`: the token before the text, if any.

        `in_thread` runs what takes long in the tokenizer's thread. `drops_blank`: an answer's text
        begins without the blank with which its first token does.
        """
        self.drops_blank = drops_blank
        self._tokenizer = tokenizer
        self._in_thread = in_thread
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._last = after
        self.offset = 0  # characters of the text so far

    async def work_out(self, work: Callable[[], T]) -> T:
        """Return what comes of `work`, which asks for texts of many tokens.

        Where they must be decoded, that is done in the tokenizer's thread.
        """
        if self._token_bytes.is_known:
            return work()
        found: T = await self._in_thread(work)
        return found

    def whole(self, tokens: Sequence[int]) -> str:
        """Return the text of a prompt's tokens, from its beginning on."""
        if self._token_bytes.is_known:
            return self._bytes(tokens).decode(errors="replace")
        text: str = self._tokenizer.decode(list(tokens))
        return text

    def text(self, token: int) -> str:
        """Return what the token would add; bytes that are no whole character by their names."""
        if not self._token_bytes.is_known:
            return self._by_decoding(token)
        return self._token_bytes.text(token)

    def bytes_of(self, token: int) -> list[int]:
        """Return the bytes of what the token would add."""
        if not self._token_bytes.is_known:
            return list(self._by_decoding(token).encode())
        return list(self._token_bytes.of_token(token))

    def add(self, token: int) -> None:
        """Go on by one token."""
        if self._token_bytes.is_known:
            self.offset += len(self._decoder.decode(self._token_bytes.of_token(token)))
        else:
            self.offset += len(self._by_decoding(token))
        self._last = token

    def _bytes(self, tokens: Sequence[int]) -> bytes:
        return self._token_bytes.of_tokens(np.array(tokens, np.int64))[0]

    def _by_decoding(self, token: int) -> str:
        """Return what a tokenizer adds that decodes a token by what stands before it."""
        before = [] if self._last is None else [self._last]
        known: str = self._tokenizer.decode(before)
        whole: str = self._tokenizer.decode([*before, token])
        return whole[len(known) :]
