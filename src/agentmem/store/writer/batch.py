"""A batch of the writer: jobs that write their files, then change rows in one transaction."""

from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...agent_key import AgentKey
from ...errors import InvalidRequest
from ...tensors import HostTensor
from ..files import crypto, segment
from ..files.layout import Layout
from ..files.sealed import encode_sealed
from ..manifest.manifest import Manifest
from ..records import BlockRecord, BranchHead, FileRef
from ..upkeep.quota import Quota


@dataclass
class Batch:
    """Jobs that share one transaction, and what they touch."""

    layout: Layout
    manifest: Manifest
    quota: Quota
    generations: Iterator[int]
    # files that no row names yet
    new_blocks: dict[bytes, BlockRecord] = field(default_factory=dict)
    new_keys: dict[bytes, bytes] = field(default_factory=dict)  # of those, if they are encrypted
    blocks: set[bytes] = field(default_factory=set)  # whose row or file may have changed
    branches: set[str] = field(default_factory=set)  # whose tail may have changed
    tail_files: set[tuple[str, int]] = field(default_factory=set)  # written: branch, generation
    dirs: set[Path] = field(default_factory=set)
    writes: int = 0
    bytes_written: int = 0
    quarantined: int = 0

    def write(
        self,
        path: Path,
        tensors: Mapping[str, HostTensor],
        metadata: Mapping[str, str],
        context: bytes,
    ) -> FileRef:
        """Write a file, which is durable once its directory (in `dirs`) is synced."""
        key = crypto.new_key() if self.manifest.keys else None
        data = (
            encode_sealed(tensors, metadata, key, context)
            if key
            else segment.encode(tensors, metadata)
        )
        segment.make_private_dir(path.parent)
        self.dirs.add(path.parent)
        self.quota.grew(segment.write_file(path, data))
        self.quota.recount(path.parent)
        self.writes += 1
        self.bytes_written += len(data)
        header = segment.parse_header(data, len(data))
        parts = {part: n for part, n in header.part_bytes.items() if not part.startswith(":")}
        return FileRef(len(data), segment.checksum(data[: header.nbytes]), key=key, parts=parts)

    def delete_unreachable(self) -> None:
        """Delete the rows of blocks that no branch reaches."""
        self.blocks.update(self.manifest.delete_unreachable())

    def move_to_quarantine(self, path: Path) -> None:
        """Put a file aside, if it is there."""
        self.quarantined += 1
        self.dirs.add(self.layout.quarantine)
        aside = self.layout.quarantine / path.name
        self.quota.shrank(segment.remove_file(aside) or 0)  # an earlier one of the same key
        try:
            path.replace(aside)
        except FileNotFoundError:  # lost, not corrupt: there is nothing to keep
            return


def require_unicode(agent: AgentKey) -> None:
    """Raise InvalidRequest for what SQLite would refuse, on the writer's thread."""
    try:
        "".join(agent).encode()
    except UnicodeEncodeError:
        message = f"agent id {agent.agent_id!r} isn't valid Unicode"
        raise InvalidRequest(message, param="agent_id") from None


@dataclass(eq=False)
class Job:
    """A change of the store, or a look at it, in the order asked for."""

    # True: has a batch of its own, because a job after it must not rely on files that it deletes
    alone = False
    future: Future[Any] = field(default_factory=Future, init=False)
    result: Any = field(default=None, init=False)
    error: Exception | None = field(default=None, init=False)

    @property
    def nbytes(self) -> int:
        """Return the bytes of the tensors that are held until it is done."""
        return 0

    @property
    def branch_head(self) -> BranchHead | None:
        """Return the branch that it changes, as that will be; None: it changes none."""
        return None

    @property
    def builds_on(self) -> set[bytes]:
        """Return the blocks that must stay in the store until it is done."""
        return set()

    def file_bytes(self, batch: Batch) -> int:
        """Return the most bytes that its file may have; 0: it writes none."""
        return 0

    def stage(self, batch: Batch) -> None:
        """Write files. Raises OSError or NotFound, which fail this job only."""

    def record(self, batch: Batch) -> Any:
        """Change rows; return what the future resolves with.

        Raises NotFound or CorruptSegment, which fails this job only.
        """

    def committed(self, batch: Batch) -> None:
        """Do further work on files, where the job is alone."""


@dataclass(eq=False)
class Flush(Job):
    """Do nothing: it is done when everything before it is."""
