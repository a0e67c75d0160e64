"""Reads of blocks and tails on a few threads. Every byte is verified before anyone sees it."""

import threading
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from ...errors import CorruptSegment
from ...tensors import HostTensor
from ..records import FileRef
from .layout import Layout
from .sealed import read_sealed
from .segment import Segment
from .segment_file import read_file

# threads: with the file cache cold they overlap its reads, else their checksums and decryption
READERS = 4


def read_segment(
    path: Path, ref: FileRef, context: bytes, parts: Collection[str] | None = None
) -> Segment:
    """Return what a file holds, or these parts of it, verified, and decrypted where it has a key.

    Raises CorruptSegment.
    """
    if ref.key:
        return read_sealed(
            path, ref.nbytes, ref.checksum, key=ref.key, context=context, parts=parts
        )
    return read_file(path, ref.nbytes, ref.checksum, parts)


class Catalog:
    """The files that the manifest names, in memory.

    It is set by the writer after each commit, and read from any thread.
    """

    def __init__(self, blocks: dict[bytes, FileRef], tails: dict[str, FileRef]):
        self._lock = threading.Lock()
        self._blocks = blocks
        self._tails = tails
        self._block_bytes = sum(ref.nbytes for ref in blocks.values())

    def block(self, key: bytes) -> FileRef | None:
        with self._lock:
            return self._blocks.get(key)

    def tail(self, branch_id: str) -> FileRef | None:
        with self._lock:
            return self._tails.get(branch_id)

    def update(
        self, blocks: Mapping[bytes, FileRef | None], tails: Mapping[str, FileRef | None]
    ) -> None:
        """Enter files that have changed; None: the manifest doesn't name it any more."""
        with self._lock:
            for key, block in blocks.items():
                old = self._blocks.pop(key, None)
                self._block_bytes += (block.nbytes if block else 0) - (old.nbytes if old else 0)
                if block:
                    self._blocks[key] = block
            for branch_id, tail in tails.items():
                self._tails.pop(branch_id, None)
                if tail:
                    self._tails[branch_id] = tail

    def stats(self) -> dict[str, int]:
        with self._lock:
            tail_bytes = sum(ref.nbytes for ref in self._tails.values())
            return {
                "blocks": len(self._blocks),
                "block_bytes": self._block_bytes,
                "tail_bytes": tail_bytes,
            }


class Reader:
    """A pool of threads that read what the catalog names."""

    def __init__(self, layout: Layout, catalog: Catalog, threads: int = READERS):
        self._layout = layout
        self._catalog = catalog
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="agentmem-reader")

    def read_block(
        self, key: bytes, parts: Collection[str] | None = None
    ) -> Future[dict[str, HostTensor]]:
        return self._pool.submit(self._read_block, key, parts)

    def read_tail(self, branch_id: str) -> Future[Segment]:
        return self._pool.submit(self._read_tail, branch_id)

    def close(self) -> None:
        """Wait for the reads in flight, and end the threads."""
        self._pool.shutdown()

    def _read_block(self, key: bytes, parts: Collection[str] | None) -> dict[str, HostTensor]:
        tensors, _ = self._read(
            f"block {key.hex()}",
            b"block:" + key,
            find=lambda: self._catalog.block(key),
            path=lambda _: self._layout.block(key),
            parts=parts,
        )
        return tensors

    def _read_tail(self, branch_id: str) -> Segment:
        return self._read(
            f"tail of branch {branch_id}",
            b"tail",
            find=lambda: self._catalog.tail(branch_id),
            path=lambda ref: self._layout.tail(branch_id, ref.generation),
        )

    def _read(
        self,
        what: str,
        context: bytes,
        *,
        find: Callable[[], FileRef | None],
        path: Callable[[FileRef], Path],
        parts: Collection[str] | None = None,
    ) -> Segment:
        ref = find()
        while ref is not None:
            try:
                return read_segment(path(ref), ref, context, parts)
            except CorruptSegment:
                # a tail may have been replaced, or a block deleted, since `find`: that is no
                # corruption
                before, ref = ref, find()
                if ref is before:
                    raise
        raise CorruptSegment(f"{what} isn't in the store")
