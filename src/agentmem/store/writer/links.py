"""Second names of files, in exports/, so that an agent can be read at leisure whatever happens to
it meanwhile.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from ...errors import NotFound
from ..files import segment
from ..records import FileRef
from ..upkeep.quota import Quota
from .batch import Batch, Job

Linked = dict[bytes | str, tuple[Path, FileRef]]  # by block and branch


@dataclass(eq=False)
class LinkFiles(Job):
    """Give files a second name in a directory of their own: all of them, or none."""

    alone = True
    directory: Path
    blocks: list[bytes]
    branches: list[str]  # whose tails

    def stage(self, batch: Batch) -> None:
        self.result = {}
        found = self._find(batch)
        if len(found) < self._wanted:
            return
        try:
            segment.make_private_dir(self.directory)
            for path, _ in found.values():
                (self.directory / path.name).hardlink_to(path)
        except OSError as e:
            remove_links(self.directory, batch.room)
            if isinstance(e, FileNotFoundError):  # lost: a read will notice
                return
            raise
        batch.room.recount(self.directory.parent, self.directory)
        self.result = {
            name: (self.directory / path.name, ref) for name, (path, ref) in found.items()
        }

    @property
    def _wanted(self) -> int:
        return len({*self.blocks, *self.branches})

    def _find(self, batch: Batch) -> Linked:
        found: Linked = {}
        for key in self.blocks:
            if ref := batch.manifest.block_file(key):
                file_key = batch.keys.block_key(key) if batch.keys else None
                found[key] = batch.layout.block(key), replace(ref, key=file_key)
        for branch_id in self.branches:
            if ref := batch.manifest.tail_file(branch_id):
                file_key = batch.keys.tail_key(branch_id) if batch.keys else None
                found[branch_id] = (
                    batch.layout.tail(branch_id, ref.generation),
                    replace(ref, key=file_key),
                )
        return found

    def record(self, batch: Batch) -> Linked:
        if len(self.result) < self._wanted:
            raise NotFound("not all of its blocks and tails are on disk any more")
        return self.result


@dataclass(eq=False)
class Unlink(Job):
    """End what LinkFiles began."""

    directories: set[Path]

    def stage(self, batch: Batch) -> None:
        for directory in self.directories:
            remove_links(directory, batch.room)


def remove_links(directory: Path, room: Quota) -> None:
    if directory.is_dir():
        for path in directory.iterdir():
            room.shrank(segment.remove_file(path) or 0)
        directory.rmdir()
    room.recount(directory.parent, directory)
