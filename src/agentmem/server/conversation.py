"""Where a request stands in its agent's transcript: what was said before it, and the turn that it leaves."""

from dataclasses import dataclass
from typing import Any

from starlette.requests import Request

from ..engine.transcripts import Transcripts
from ..engine.turns import Kind, Messages, Turn, TurnTree, canonical, new_turn
from ..errors import NotFound, StoreFailed


class TranscriptNotFound(NotFound):
    code = "transcript_not_found"


@dataclass
class Conversation:
    turns: Transcripts
    namespace: str
    agent_id: str
    tree: TurnTree | None  # None: no turn is left
    new: Messages  # that the request sent
    parent: Turn | None = None
    resumed: bool = False  # the request goes on from `parent`; else it sent all that was said
    ephemeral: bool = False

    @property
    def messages(self) -> Messages:
        """All that the model is to see."""
        return [*self.tree.messages(self.parent), *self.new] if self.tree else self.new

    async def finish(self, kind: Kind, answer: Messages, turn_id: str | None = None, **more: Any) -> str | None:
        """Leave a turn; its id. None: nothing is to be left, or the agent was deleted, or the store can't be read."""
        if self.tree is None:
            return None
        try:
            tree = await self.turns.loaded(self.namespace, self.agent_id, self.tree)
        except StoreFailed:  # /health has it; the answer is there all the same
            return None
        parent, known = (self.parent, 0) if self.resumed else tree.longest_prefix(self.new)
        turn = new_turn(kind, parent, [*self.new[known:], *answer], turn_id, **more)
        kept = self.turns.add(self.namespace, self.agent_id, tree, [turn], ephemeral=self.ephemeral)
        return turn.id if kept else None


def begin(turns: Transcripts, namespace: str, agent_id: str, messages: Messages, *, keep: bool) -> Conversation:
    """Of a request that says all that was said before. `keep`: whether it leaves a turn."""
    return Conversation(turns, namespace, agent_id, turns.open(namespace, agent_id) if keep else None, messages)


async def resume(
    turns: Transcripts, namespace: str, agent_id: str, new: Messages, turn_id: str | None, *, retried: bool
) -> Conversation:
    """Of a request that goes on from a turn of the agent, by default its newest. Raises NotFound, StoreFailed.

    `retried`: the client may have sent the request before; if it left a turn then, that one is not gone on from.
    """
    tree = await turns.tree(namespace, agent_id)
    async with tree.appending:  # what is being appended is said before
        parent = tree.newest if turn_id is None else tree.turns.get(turn_id)
    if parent is None or parent.hidden:
        missing = f"Agent {agent_id[:200]!r} has no transcript to go on from"
        if turn_id is not None:
            missing = f"Agent {agent_id[:200]!r} has no turn {turn_id[:200]!r}"
        raise TranscriptNotFound(f"{missing}; send all messages.", param="agentmem.continue")
    if retried and turn_id is None and _starts_with(parent.items, new):
        parent = tree.turns[parent.parent] if parent.parent else None
    return Conversation(turns, namespace, agent_id, tree, new, parent, resumed=True)


def is_retried(request: Request) -> bool:
    """Whether the SDKs of OpenAI and Anthropic send it again, after an error or when no answer came."""
    count = request.headers.get("x-stainless-retry-count", "0")
    return count.isdigit() and int(count) > 0


def _starts_with(items: Messages, new: Messages) -> bool:
    return [canonical(item) for item in items[: len(new)]] == [canonical(item) for item in new]
