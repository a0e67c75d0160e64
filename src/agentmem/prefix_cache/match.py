"""Match: the longest prefix of a request's tokens that is cached, and can be gone on from."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..kvcache.spec import KVCacheSpec
from .agent import Branch
from .block_pool import CachedBlock, CachedTail, Entry
from .resume import Missing, missing, resumable


@dataclass(frozen=True)
class Match:
    """The longest reusable prefix: whole blocks, then part of one more block or of a tail."""

    spec: KVCacheSpec
    blocks: tuple[CachedBlock, ...] = ()
    length: int = 0
    source: Branch | None = None  # None: shared blocks only
    # a sealed block of which the first tokens are kept, as codes
    cut_block: CachedBlock | None = None
    tail: CachedTail | None = None  # of which the first tokens are kept
    extends: bool = False  # all of `source` is matched: the request continues it

    @property
    def open_len(self) -> int:
        """Return the number of matched tokens after the whole blocks."""
        return self.length - len(self.blocks) * self.spec.block_size

    @property
    def all_blocks(self) -> tuple[CachedBlock, ...]:
        """Return the whole blocks, and the one that is cut."""
        return self.blocks + ((self.cut_block,) if self.cut_block else ())

    def entries(self) -> Iterator[Entry]:
        """Yield the blocks and the tail that matched."""
        yield from self.all_blocks
        if self.tail is not None:
            yield self.tail

    @property
    def missing(self) -> list[Missing]:
        """Return what has to be read from disk."""
        return missing(self.spec, self.all_blocks, self.tail, self.length)

    @property
    def missing_bytes(self) -> int:
        """Return the bytes on disk of what has to be read."""
        return sum(what.nbytes for what in self.missing)


def matched(
    spec: KVCacheSpec,
    blocks: Sequence[CachedBlock],
    tail: CachedTail | None,
    n: int,
    source: Branch | None,
) -> Match:
    """Return the first `n` tokens of `blocks` and `tail`, or as many as can be gone on from."""
    n = resumable(spec, blocks, tail, n)
    whole = min(n // spec.block_size, len(blocks))
    inside = n > whole * spec.block_size
    sealed = whole < len(blocks)
    return Match(
        spec,
        blocks=tuple(blocks[:whole]),
        length=n,
        source=source,
        cut_block=blocks[whole] if inside and sealed else None,
        tail=tail if inside and not sealed else None,
        extends=source is not None and n == len(source),
    )


def preference(match: Match) -> tuple[int, bool, bool, str]:
    """Return what matches are sorted by, the best last.

    The longest one is best; then, by what a restart does not change, what is whole comes before
    what must be cut.
    """
    assert match.source is not None
    return match.length, match.cut_block is None, match.extends, match.source.id
