"""Second names of files, in exports/.

An agent can be read at leisure by them, whatever happens to it meanwhile.
"""

from dataclasses import dataclass, field
from pathlib import Path

from ...errors import NotFound
from ..files import segment
from ..records import Linked
from ..upkeep.quota import Quota
from .batch import Batch, Job


@dataclass(eq=False)
class LinkFiles(Job):
    """Give files a second name in a directory of their own: all of them, or none."""

    alone = True
    directory: Path
    blocks: list[bytes]
    branches: list[str]  # whose tails
    linked: Linked = field(default_factory=dict, init=False)

    def stage(self, batch: Batch) -> None:
        found = self._find(batch)
        if len(found) < self._wanted:
            return
        try:
            segment.make_private_dir(self.directory)
            for path, _ in found.values():
                (self.directory / path.name).hardlink_to(path)
        except OSError as e:
            remove_links(self.directory, batch.quota)
            if isinstance(e, FileNotFoundError):  # lost: a read will notice
                return
            raise
        batch.quota.recount(self.directory.parent, self.directory)
        self.linked = {
            name: (self.directory / path.name, ref) for name, (path, ref) in found.items()
        }

    @property
    def _wanted(self) -> int:
        return len({*self.blocks, *self.branches})

    def _find(self, batch: Batch) -> Linked:
        found: Linked = {}
        for key in self.blocks:
            if ref := batch.manifest.block_file(key):
                found[key] = batch.layout.block(key), ref
        for branch_id in self.branches:
            if ref := batch.manifest.tail_file(branch_id):
                found[branch_id] = batch.layout.tail(branch_id, ref.generation), ref
        return found

    def record(self, batch: Batch) -> Linked:
        if len(self.linked) < self._wanted:
            raise NotFound("not all of its blocks and tails are on disk any more")
        return self.linked


@dataclass(eq=False)
class Unlink(Job):
    """End what LinkFiles began."""

    directories: set[Path]

    def stage(self, batch: Batch) -> None:
        for directory in self.directories:
            remove_links(directory, batch.quota)


def remove_links(directory: Path, quota: Quota) -> None:
    """Remove a directory of second names."""
    if directory.is_dir():
        for path in directory.iterdir():
            quota.shrank(segment.remove_file(path) or 0)
        directory.rmdir()
    quota.recount(directory.parent, directory)
