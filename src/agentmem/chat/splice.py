"""Token-exact splice: where a prompt's text starts with that of a cached branch, the branch's own
ids are kept.

Tokenizing the same text again can give other ids: a model does not write what its tokenizer would
make of the text, a seam between two messages merges differently, an answer that was cut ends within
a word. So the branch's ids are kept up to the last place, before the texts part, at which both
token sequences have a boundary; from there on they are the prompt's. The result always stands for
the prompt's text. A special token matches the same special token alone, never text that reads like
its name.

    branch   <|user|> Hel lo <|assistant|> Wor ld
    prompt   <|user|> Hello <|assistant|> World <|user|> And you?
    spliced  <|user|> Hel lo <|assistant|> Wor ld | <|user|> And you?
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ..tensors import common_prefix
from .token_bytes import TokenBytes


@dataclass(frozen=True)
class Spliced:
    tokens: list[int]
    kept: int  # of them, that are a branch's
    common_bytes: int  # of text, that the prompt shares with the branch that shares most


def splice(
    token_bytes: TokenBytes, prompt: Sequence[int], branches: Iterable[np.ndarray]
) -> Spliced:
    """The prompt's ids, with the longest beginning of its text that a branch (token ids) has as
    that branch's ids.
    """
    plain = list(prompt)
    if not token_bytes.is_known:
        return Spliced(plain, 0, 0)
    text = _Text.of(token_bytes, np.asarray(plain, np.int64))
    best, kept, rest, common = 0, 0, 0, 0
    chosen: np.ndarray | None = None
    for branch in branches:
        theirs = _Text.of(token_bytes, branch)
        n = text.common(theirs)
        common = max(common, n)
        at = _last_common(text.ends, theirs.ends, n)
        if at > best:
            best, chosen = at, branch
            kept, rest = (
                int(np.searchsorted(ends, at, "right")) for ends in (theirs.ends, text.ends)
            )
    if chosen is None:
        return Spliced(plain, 0, common)
    return Spliced([int(t) for t in chosen[:kept]] + plain[rest:], kept, common)


@dataclass(frozen=True)
class _Text:
    """What ids stand for."""

    data: np.ndarray  # uint8
    ends: np.ndarray  # int64: where each token's bytes end
    special: np.ndarray  # int64: where the bytes of special tokens end
    special_ids: np.ndarray

    @staticmethod
    def of(token_bytes: TokenBytes, tokens: np.ndarray) -> "_Text":
        data, ends = token_bytes.of_tokens(tokens)
        is_special = np.isin(tokens, token_bytes.atomic_ids)
        return _Text(
            np.frombuffer(data, np.uint8),
            ends,
            ends[is_special],
            tokens[is_special].astype(np.int64),
        )

    def common(self, other: "_Text") -> int:
        """Bytes at the beginning that are the same, and special in both or in neither."""
        n = common_prefix(self.data, other.data)
        mine, theirs = (self._special_until(n), other._special_until(n))
        same = min(
            len(mine),
            len(theirs),
            common_prefix(mine[:, 0], theirs[:, 0]),
            common_prefix(mine[:, 1], theirs[:, 1]),
        )
        parted = [self._start(pairs[same]) for pairs in (mine, theirs) if same < len(pairs)]
        return min([n, *parted])

    def _special_until(self, n: int) -> np.ndarray:
        """Ends and ids of special tokens within the first n bytes, [k, 2]."""
        k = int(np.searchsorted(self.special, n, "right"))
        return np.stack([self.special[:k], self.special_ids[:k]], axis=1)

    def _start(self, special: np.ndarray) -> int:
        """Where the token that ends there begins: no later than where the one before it ends."""
        i = int(np.searchsorted(self.ends, special[0]))
        return int(self.ends[i - 1]) if i else 0


def _last_common(a: np.ndarray, b: np.ndarray, limit: int) -> int:
    """The last place, at most `limit`, at which tokens end in both; 0 if there is none."""
    a, b = (ends[: np.searchsorted(ends, limit, "right")] for ends in (a, b))
    both = a[np.isin(a, b)]  # intersect1d takes a hundred times as long
    return int(both[-1]) if len(both) else 0
