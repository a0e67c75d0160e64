"""Token-exact splice: a prompt keeps the ids of a cached branch whose text it begins with.

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
from dataclasses import dataclass, replace

import numpy as np

from ..tensors import common_prefix
from .token_bytes import TokenBytes


@dataclass(frozen=True)
class Spliced:
    """A prompt's ids after the splice."""

    tokens: list[int]
    kept: int  # of them, that are a branch's
    common_bytes: int  # of text, that the prompt shares with the branch that shares most


def splice(
    token_bytes: TokenBytes, prompt: Sequence[int], branches: Iterable[np.ndarray]
) -> Spliced:
    """Return the prompt's ids, its text's longest beginning that a branch has in that one's ids.

    `branches` are token ids.
    """
    plain = list(prompt)
    if not token_bytes.is_known:
        return Spliced(plain, 0, 0)
    text = _Text.of(token_bytes, np.asarray(plain, np.int64))
    best = Spliced(plain, 0, 0)
    best_end = common = 0  # bytes
    for branch in branches:
        theirs = _Text.of(token_bytes, branch)
        n = text.common(theirs)
        common = max(common, n)
        end = _last_common(text.ends, theirs.ends, n)
        if end > best_end:
            best_end = end
            kept = int(np.searchsorted(theirs.ends, end, "right"))
            rest = int(np.searchsorted(text.ends, end, "right"))
            best = Spliced([int(token) for token in branch[:kept]] + plain[rest:], kept, common)
    return replace(best, common_bytes=common)


@dataclass(frozen=True)
class _Text:
    """The text that token ids stand for."""

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
        """Count the bytes at the beginning that are the same, and special in both or in neither."""
        n = common_prefix(self.data, other.data)
        mine = self._special_until(n)
        theirs = other._special_until(n)
        same_ends = common_prefix(mine[:, 0], theirs[:, 0])
        same_ids = common_prefix(mine[:, 1], theirs[:, 1])
        same = min(len(mine), len(theirs), same_ends, same_ids)
        parted = [self._start(pairs[same]) for pairs in (mine, theirs) if same < len(pairs)]
        return min([n, *parted])

    def _special_until(self, n: int) -> np.ndarray:
        """Return ends and ids of the special tokens within the first n bytes, [k, 2]."""
        k = int(np.searchsorted(self.special, n, "right"))
        return np.stack([self.special[:k], self.special_ids[:k]], axis=1)

    def _start(self, special: np.ndarray) -> int:
        """Return where the token that ends there begins: at or before the end of the last one."""
        i = int(np.searchsorted(self.ends, special[0]))
        return int(self.ends[i - 1]) if i else 0


def _last_common(a: np.ndarray, b: np.ndarray, limit: int) -> int:
    """Return the last place, at most `limit`, at which tokens end in both; 0 if there is none."""
    a = a[: np.searchsorted(a, limit, "right")]
    b = b[: np.searchsorted(b, limit, "right")]
    both = a[np.isin(a, b)]  # intersect1d takes a hundred times as long
    return int(both[-1]) if len(both) else 0
