"""What leaves a full store: the least recently used leaves of the tree of blocks, and tails.

    root - a - b - c      branch 1, used yesterday, with a tail
           a - d - e      branch 2, used today

Branch 1's tail goes first, then c, then b. Its block a stays until branch 2's e and d are gone.
What a pinned agent holds, or what a write in progress builds on, never goes.
"""

import heapq
import math
from collections import Counter, defaultdict
from collections.abc import Collection
from dataclasses import dataclass, field

from ..manifest.manifest import Manifest
from .quota import rounded


@dataclass
class Trimmed:
    """The blocks and tails that were let go."""

    blocks: list[bytes] = field(default_factory=list)
    tails: list[str] = field(default_factory=list)  # branches that lost theirs
    nbytes: int = 0
    newer: bool = False  # more could have gone, but was used later


def trim(
    manifest: Manifest,
    nbytes: int,
    branches: Collection[str] = (),
    blocks: Collection[bytes] = (),
    before: float = math.inf,
) -> Trimmed:
    """Delete rows until their files make `nbytes` room, or nothing may go any more.

    It is called inside a transaction. `branches`, `blocks`: which stay, with all that they are
    built on; `before`: what was used later stays, too.
    """
    tree = _Tree(manifest, branches, blocks)
    while tree.gone.nbytes < nbytes and tree.oldest is not None:
        if tree.oldest > before:
            tree.gone.newer = True
            break
        tree.drop_oldest()
    manifest.delete_empty_branches()
    return tree.gone


class _Tree:
    """The blocks and tails of a manifest, from which the oldest leaves are dropped."""

    def __init__(self, manifest: Manifest, branches: Collection[str], blocks: Collection[bytes]):
        self._manifest = manifest
        self._parents = manifest.parents()
        self._files = manifest.block_files()
        self._children = Counter(self._parents.values())
        self._kept = set(blocks)
        # of a block, by branches in it
        self._last_used: defaultdict[bytes, float] = defaultdict(lambda: -math.inf)
        self._with_tail: dict[str, int] = {}
        # when used last; a block, or b"" and a branch with a tail
        self._leaves: list[tuple[float, bytes, str]] = []
        self.gone = Trimmed()
        for held in manifest.holdings():
            last_used = math.inf if held.pinned or held.branch_id in branches else held.last_used
            if held.head is not None:
                self._last_used[held.head] = max(self._last_used[held.head], last_used)
            if held.tail_bytes and last_used < math.inf:
                self._with_tail[held.branch_id] = held.tail_bytes
                self._leaves.append((last_used, b"", held.branch_id))
        heapq.heapify(self._leaves)
        for key in self._parents:
            self._offer(key)

    @property
    def oldest(self) -> float | None:
        """Return when what goes next was used; None: nothing may go."""
        return self._leaves[0][0] if self._leaves else None

    def drop_oldest(self) -> None:
        last_used, key, branch_id = heapq.heappop(self._leaves)
        if not key:
            self._manifest.clear_tail(branch_id)
            self.gone.tails.append(branch_id)
            self.gone.nbytes += rounded(self._with_tail[branch_id])
            return
        parent = self._parents[key]
        self._manifest.delete_block(key)
        self.gone.blocks.append(key)
        self.gone.nbytes += rounded(self._files[key].nbytes)
        if parent is not None:
            self._children[parent] -= 1
            self._last_used[parent] = max(self._last_used[parent], last_used)
            self._offer(parent)

    def _offer(self, key: bytes) -> None:
        """Enter the block among what may go, if nothing is built on it."""
        if not self._children[key] and key not in self._kept and self._last_used[key] < math.inf:
            heapq.heappush(self._leaves, (self._last_used[key], key, ""))
