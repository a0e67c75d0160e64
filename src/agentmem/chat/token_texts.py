"""The text of each token, one after the other, and where it begins in the whole.

Worked example, with a tokenizer of bytes: of "aé" the tokens are "a", "bytes:\\xc3" and
"bytes:\\xa9", which begin at 0, 1 and 1: the last two are one character together.
"""

import codecs
from collections.abc import Sequence
from typing import Any

import numpy as np

from .token_bytes import TokenBytes


class TokenTexts:
    """Follows one text token by token."""

    def __init__(self, tokenizer: Any, token_bytes: TokenBytes, after: int | None = None):
        """`tokenizer` is an mlx_lm TokenizerWrapper; `after`: the token before the text, if any."""
        self._tokenizer = tokenizer
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._last = after
        self.offset = 0  # characters of the text so far

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
        data = self._bytes([token])
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def add(self, token: int) -> None:
        """Go on by one token."""
        if self._token_bytes.is_known:
            self.offset += len(self._decoder.decode(self._bytes([token])))
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
