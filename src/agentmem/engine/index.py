"""What the store holds, entered among the agents; and what it lost or is told to forget."""

import math
from collections.abc import Iterable
from concurrent.futures import Future

from ..errors import AgentMemError, StoreFailed
from ..store.agent_store import AgentStore
from ..store.records import BlockRecord, BranchRecord
from ..store.trim import Trimmed
from .agent import Agent, Branch
from .block_pool import Node, OpenBlock
from .contexts import ROOT, Contexts
from .transcripts import Transcripts


def load_index(contexts: Contexts, store: AgentStore) -> None:
    """Enter what the store's manifest names: every agent warm."""
    index = store.index()
    for a in index.agents:
        contexts.agents[a.namespace, a.name] = Agent(
            *(a.namespace, a.name, a.created, a.last_used), pinned=a.pinned, ttl=a.ttl,
            requests=a.requests, hit_tokens=a.hit_tokens,
        )  # fmt: skip
    enter(contexts, index.branches, index.blocks)


def enter(contexts: Contexts, branches: Iterable[BranchRecord], blocks: Iterable[BlockRecord]) -> None:
    """Add branches that are on disk, each to its agent; `blocks` are all that they are made of."""
    records = {r.key: r for r in blocks}
    for b in branches:
        agent = contexts.agent(b.namespace, b.agent)
        agent = contexts.agents.setdefault((b.namespace, b.agent), agent)
        branch = Branch(b.id, agent, last_used=b.last_used, disk_head=b.head)
        key = b.head
        while key:
            record = records[key]
            node = contexts.nodes.get(key) or Node(
                key, record.parent or ROOT, record.tokens, disk_bytes=record.nbytes, disk_parts=record.parts
            )
            contexts.nodes[key] = node
            branch.nodes.append(node)
            key = record.parent
        branch.nodes.reverse()
        contexts.hold(branch.nodes)
        if b.tail is not None:
            branch.tail = OpenBlock(b.tail.tokens, disk_bytes=b.tail.nbytes, disk_parts=b.tail.parts)
        branch.agent.branches[branch.id] = branch


def forget(contexts: Contexts, gone: Trimmed) -> None:
    """A full store let go of what was not used for longest: it stays only where it is in RAM."""
    blocks, tails = set(gone.blocks), set(gone.tails)
    for node in [contexts.nodes[key] for key in blocks if key in contexts.nodes]:
        node.not_on_disk()
        if node.data is None:
            contexts.cut_at(node)
    for branch in list(contexts.branches()):
        if branch.id in tails:
            branch.tail.not_on_disk()
            if branch.tail.data is None:
                contexts.set_tail(branch, OpenBlock())
        if branch.disk_head in blocks or branch.id in tails:
            branch.disk_head = None if branch.disk_head in blocks else branch.disk_head
            branch.save_at = branch.save_at or math.inf  # when it leaves RAM, not before
        if not len(branch) and not branch.in_use:
            contexts.drop_branch(branch)
    for agent in [a for a in contexts.agents.values() if not a.branches]:
        contexts.drop_agent(agent)


def delete_agent(
    contexts: Contexts, store: AgentStore, turns: Transcripts, namespace: str, name: str, done: "Future[bool]"
) -> None:
    """Forget the agent; `done` gets whether there was one, once its bytes are off the disk."""
    agent = contexts.agents.get((namespace, name))
    if agent is not None:
        nodes = [n for b in agent.branches.values() for n in b.nodes]
        contexts.drop_agent(agent)
        kept = {id(n) for b in contexts.branches() if not b.agent.ephemeral for n in b.nodes}
        unwritten = {id(n) for b in contexts.branches() if b.agent.ephemeral for n in b.nodes}
        for node in nodes:  # what only a running sequence or an ephemeral agent still holds goes from disk
            if id(node) not in kept:
                node.not_on_disk()
                node.expendable = node.expendable or id(node) in unwritten
                if node.data is None and id(node) in unwritten:
                    contexts.lose(node)

    def deleted(stored: "Future[bool]") -> None:
        error = stored.exception()
        if error is not None:
            failed = StoreFailed(f"The agent's bytes may still be on disk: {error}; delete it again")
            done.set_exception(error if isinstance(error, AgentMemError) else failed)
        else:
            done.set_result(stored.result() or agent is not None)

    turns.forget(namespace, name, lambda: store.delete_agent(namespace, name)).add_done_callback(deleted)
