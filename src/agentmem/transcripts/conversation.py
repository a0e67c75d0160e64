"""A request's place in its agent's transcript: what was said before it, and the turn it leaves."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..agent_key import AgentKey
from ..errors import NotFound, StoreFailed
from .registry import TranscriptRegistry
from .turns import Kind, Messages, Turn, TurnTree, canonical, content_text, copies, new_turn


class TranscriptNotFound(NotFound):
    code = "transcript_not_found"


@dataclass(eq=False)
class Conversation:
    """What one request goes on from, what it says, and what becomes of it."""

    turns: TranscriptRegistry
    agent: AgentKey
    tree: TurnTree | None  # None: nothing was said before, and no turn is left
    new: Messages  # that the request sent
    parent: Turn | None = None
    resumed: bool = False  # the request goes on from `parent`; else it sent all that was said
    from_newest: bool = False  # which was the newest turn
    keep: bool = True  # leave a turn
    ephemeral: bool = False
    continues: bool = False  # the answer goes on with the last of `new`, the assistant's
    tools: list[dict[str, Any]] = field(default_factory=list)
    # that a prompt does not begin with; messages tell of them
    deferred_tools: list[dict[str, Any]] = field(default_factory=list)
    # a system message before all that was said, of this request alone
    instructions: str | None = None

    @property
    def messages(self) -> Messages:
        """All that the model is to see."""
        before = self.tree.messages(self.parent) if self.tree else []
        return [*system(self.instructions), *before, *self.new]

    @property
    def callable_tools(self) -> list[dict[str, Any]]:
        """All tools that an answer may call."""
        return [*self.tools, *self.deferred_tools]

    async def finish(
        self, kind: Kind, answer: Messages, turn_id: str | None = None, **more: Any
    ) -> str | None:
        """Leave a turn with the answer, and return its id; `more` is kept in the turn's `about`.

        None: nothing is to be left, or the agent was deleted, or the store can't be read.
        """
        if self.tree is None or not self.keep:
            return None
        try:
            tree = await self.turns.loaded(self.tree)
        except StoreFailed:  # /health has it; the answer is there all the same
            return None
        parent = self.parent
        new = self.new
        if self.continues:
            *new, begun = new
            answer = [_continued(begun, answer[0]), *answer[1:]]
        if not self.resumed:
            parent, num_known = tree.longest_prefix(new)
            new = new[num_known:]
        about = {"instructions": self.instructions or None, "tools": self.tools or None, **more}
        items = [*new, *answer]
        turn = new_turn(kind, parent, items, turn_id, about=_news(tree, parent, about))
        told = self._told_meanwhile(tree)
        kept = self.turns.add(tree, [turn, *copies(told, turn)], ephemeral=self.ephemeral)
        self.turns.drop(tree, told[::-1])
        return turn.id if kept else None

    def _told_meanwhile(self, tree: TurnTree) -> list[Turn]:
        """Return what was appended while the answer was written, which comes after it."""
        if not self.from_newest or self.parent is None:
            return []
        path = tree.path(tree.newest)
        ids = [turn.id for turn in path]
        if self.parent.id not in ids:
            return []
        told = path[ids.index(self.parent.id) + 1 :]
        return told if all(turn.kind == "context" for turn in told) else []


def is_prefill(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether an answer goes on with the last message, which the assistant has begun."""
    last = messages[-1] if messages else {}
    begun = content_text(last.get("content")) and not last.get("tool_calls")
    return last.get("role") == "assistant" and bool(begun)


def _continued(begun: dict[str, Any], rest: dict[str, Any]) -> dict[str, Any]:
    """Return the message that `begun` and the answer which went on with it are together."""
    message = {**rest, "content": content_text(begun["content"]) + (rest["content"] or "")}
    thoughts = [part.get("reasoning_content") or "" for part in (begun, rest)]
    if any(thoughts):
        message["reasoning_content"] = "".join(thoughts)
    return message


def system(instructions: str | None) -> Messages:
    """Return the system message that instructions are to a model, if there are any."""
    return [{"role": "system", "content": instructions}] if instructions else []


def inherited(tree: TurnTree, turn: Turn | None, name: str) -> Any:
    """Return what the nearest turn up the path from `turn` tells about itself, else None."""
    for step in reversed(tree.path(turn)):
        if name in step.about:
            return step.about[name]
    return None


def _news(tree: TurnTree, parent: Turn | None, about: dict[str, Any]) -> dict[str, Any]:
    """Return `about` without tools and instructions that are the parent's: they are long."""
    same = [
        name
        for name in ("instructions", "tools")
        if (inherited(tree, parent, name) or None) == (about[name] or None)
    ]
    return {name: value for name, value in about.items() if name not in same}


def begin(
    turns: TranscriptRegistry, agent: AgentKey, messages: Messages, *, keep: bool
) -> Conversation:
    """Return that of a request that says all that was said before. `keep`: it leaves a turn."""
    return Conversation(turns, agent, turns.open(agent) if keep else None, messages)


async def resume(
    turns: TranscriptRegistry,
    agent: AgentKey,
    new: Messages,
    turn_id: str | None,
    *,
    retried: bool,
) -> Conversation:
    """Return that of a request that goes on from a turn of the agent, by default its newest.

    `retried`: the client may have sent the request before; if it left a turn then, that one is not
    gone on from. Raises NotFound and StoreFailed.
    """
    tree = await turns.tree(agent)
    async with tree.appending:  # what is being appended is said before
        parent = tree.newest if turn_id is None else tree.turns.get(turn_id)
    if parent is None or parent.hidden:
        missing = f"Agent {agent.agent_id[:200]!r} has no transcript to go on from"
        if turn_id is not None:
            missing = f"Agent {agent.agent_id[:200]!r} has no turn {turn_id[:200]!r}"
        raise TranscriptNotFound(f"{missing}; send all messages.", param="agentmem.continue")
    if retried and turn_id is None and parent.kind != "context" and _starts_with(parent.items, new):
        parent = tree.turns[parent.parent] if parent.parent else None
    tools = inherited(tree, parent, "tools") or []
    conversation = Conversation(turns, agent, tree, new, parent, resumed=True, tools=tools)
    conversation.from_newest = turn_id is None
    if parent is not None:
        tree.continued[conversation] = parent.id
    return conversation


def _starts_with(items: Messages, new: Messages) -> bool:
    return [canonical(item) for item in items[: len(new)]] == [canonical(item) for item in new]
