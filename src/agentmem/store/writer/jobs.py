"""Jobs on what is stored: note its use, rename, delete, put aside."""

from dataclasses import dataclass, field
from pathlib import Path

from ...agent_key import AgentKey
from ..files.quarantine import empty_quarantine, trim_quarantine
from ..records import AgentRecord
from .batch import Batch, Job, require_unicode


@dataclass(eq=False)
class Touch(Job):
    """Note what was used, and what was changed of an agent.

    An agent that holds nothing yet is entered.
    """

    agent: AgentRecord
    branch_id: str | None = None

    def __post_init__(self) -> None:
        require_unicode(self.agent.key)

    def record(self, batch: Batch) -> None:
        batch.manifest.agents.put(self.agent)
        if self.branch_id is not None:
            batch.manifest.touch_branch(self.branch_id, self.agent.last_used)


@dataclass(eq=False)
class MoveAgent(Job):
    """Put an agent under another name, all of it at once."""

    alone = True
    source: AgentKey
    target: AgentKey

    def __post_init__(self) -> None:
        require_unicode(self.source)
        require_unicode(self.target)

    def record(self, batch: Batch) -> None:
        batch.manifest.move_agent(self.source, self.target)


@dataclass(eq=False)
class DeleteBranch(Job):
    """Delete a branch with the blocks that no other one reaches."""

    alone = True
    branch_id: str

    def record(self, batch: Batch) -> None:
        batch.manifest.delete_branch(self.branch_id)
        batch.branches.add(self.branch_id)
        batch.delete_unreachable()


@dataclass(eq=False)
class DeleteAgent(Job):
    """Delete an agent with all that only it holds, off the disk."""

    alone = True
    agent: AgentKey

    def __post_init__(self) -> None:
        require_unicode(self.agent)

    def record(self, batch: Batch) -> bool:
        branches = batch.manifest.delete_agent(self.agent)
        batch.branches.update(branches or ())
        batch.delete_unreachable()
        return branches is not None

    def committed(self, batch: Batch) -> None:
        batch.manifest.truncate_wal()
        batch.quota.shrank(empty_quarantine(batch.layout))  # whose they were is not known any more
        batch.dirs.add(batch.layout.quarantine)


@dataclass(eq=False)
class CollectGarbage(Job):
    """Delete what no branch reaches, and what is in quarantine."""

    alone = True

    def record(self, batch: Batch) -> None:
        batch.delete_unreachable()

    def committed(self, batch: Batch) -> None:
        batch.quota.shrank(empty_quarantine(batch.layout))
        batch.manifest.truncate_wal()
        batch.quota.count_manifest()


@dataclass(eq=False)
class QuarantineBlock(Job):
    """Put a block's file aside, and end every branch through it before it."""

    alone = True
    key: bytes

    def record(self, batch: Batch) -> None:
        if not batch.manifest.has_block(self.key):
            return
        parent = batch.manifest.parent(self.key)
        branches = batch.manifest.branches_through(self.key)
        for branch_id in branches:
            batch.manifest.cut_branch(branch_id, parent)
        batch.branches.update(branches)
        batch.blocks.add(self.key)
        batch.delete_unreachable()

    def committed(self, batch: Batch) -> None:
        if self.key in batch.blocks:
            batch.move_to_quarantine(batch.layout.block(self.key))
            batch.quota.shrank(trim_quarantine(batch.layout))


@dataclass(eq=False)
class QuarantineTail(Job):
    """Put a tail's file aside."""

    alone = True
    branch_id: str
    path: Path | None = field(default=None, init=False)

    def record(self, batch: Batch) -> None:
        if tail := batch.manifest.tail_file(self.branch_id):
            self.path = batch.layout.tail(self.branch_id, tail.generation)
        batch.manifest.clear_tail(self.branch_id)
        batch.branches.add(self.branch_id)

    def committed(self, batch: Batch) -> None:
        if self.path:
            batch.move_to_quarantine(self.path)
            batch.quota.shrank(trim_quarantine(batch.layout))
