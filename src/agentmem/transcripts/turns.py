"""An agent's turns: what was said, request by request, as a tree of messages.

    system, user -> assistant       turn 1
      user -> assistant             turn 2, follows 1
      user' -> assistant            turn 3, follows 1 too: an edit, or another try
    system', user -> assistant      turn 4, follows nothing: a title call, say

A turn holds the messages that it added, in the shape of OpenAI's chat API. The newest path is that
of the turn that was added last.
"""

import asyncio
import json
import math
import time
import uuid
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any, Literal
from weakref import WeakKeyDictionary

from ..agent_key import AgentKey
from ..store.records import TurnRecord

MAX_OFF_PATH = 1000  # turns of one agent that are not on its newest path; the oldest go
Messages = list[dict[str, Any]]  # in the shape of OpenAI's chat API
# a cut says nothing: what follows it goes on from its parent
Kind = Literal["chat", "response", "context", "cut"]


@dataclass(frozen=True)
class Turn:
    id: str
    parent: str | None
    items: Messages  # not to be changed
    kind: Kind
    created: float  # Unix seconds
    key: str | None = None  # of a context: what a later one of the same key replaces
    about: dict[str, Any] = field(default_factory=dict)  # what else is to be told of a response
    hidden: bool = False  # deleted, but what follows it builds on its messages

    def record(self, agent: AgentKey) -> TurnRecord:
        """Return the turn as the store keeps it."""
        said = {
            "items": self.items,
            "kind": self.kind,
            "key": self.key,
            "about": self.about,
            "hidden": self.hidden,
        }
        told = {name: value for name, value in said.items() if value}
        text = json.dumps(told, ensure_ascii=False, separators=(",", ":"))
        content = text.encode(errors="surrogatepass")
        return TurnRecord(self.id, agent, self.parent, content, self.created)

    @classmethod
    def of(cls, record: TurnRecord) -> "Turn":
        """Return the turn that a record holds."""
        said = {"items": [], **json.loads(record.content)}
        return cls(record.id, record.parent, created=record.created, **said)


def new_turn(
    kind: Kind, parent: Turn | None, items: Messages, turn_id: str | None = None, **more: Any
) -> Turn:
    """Return a turn that follows `parent`; `more` are other fields of Turn."""
    turn_id = turn_id or f"{'resp' if kind == 'response' else 'turn'}_{uuid.uuid4().hex}"
    return Turn(turn_id, parent.id if parent else None, items, kind, time.time(), **more)


def copies(turns: Iterable[Turn], parent: Turn | None) -> list[Turn]:
    """Return the same turns, one after the other, after another parent.

    They are no responses: a response is known by its own id alone.
    """
    made: list[Turn] = []
    for turn in turns:
        about = {name: value for name, value in turn.about.items() if name != "response"}
        kind = "chat" if turn.kind == "response" else turn.kind
        parent = new_turn(kind, parent, turn.items, key=turn.key, about=about)
        made.append(parent)
    return made


class TurnTree:
    """The turns of one agent.

    It belongs to the event loop; but `deleted` changes under the registry's lock.
    """

    def __init__(self, agent: AgentKey) -> None:
        self.agent = agent
        self.turns: dict[str, Turn] = {}  # in the order in which they came
        self._children: dict[str | None, list[str]] = {None: []}
        self._said: dict[str, list[str]] = {}  # canonical messages, by turn
        self.nbytes = 0  # about, of the text
        self.deleted = False  # with its agent: nothing is added any more
        self.in_ram_only = False
        # what the store has of it, until that is loaded
        self.reading: Future[list[TurnRecord]] | None = None
        # conversations of requests that run: the turns that theirs will follow
        self.continued = WeakKeyDictionary[Any, str]()
        # held while something is told without being asked: one thing after the other
        self.appending = asyncio.Lock()

    @property
    def newest(self) -> Turn | None:
        """The turn that was added last, where the newest path ends."""
        return next((turn for turn in reversed(self.turns.values()) if not turn.hidden), None)

    def load(self, turns: Iterable[Turn]) -> None:
        """Add turns, which come after their parents.

        One whose parent is lost would tell half of it, and is left out.
        """
        for turn in turns:
            if turn.parent is None or turn.parent in self.turns:
                self.add(turn)

    def add(self, turn: Turn) -> None:
        assert turn.parent is None or turn.parent in self.turns, turn.parent
        if turn.id not in self.turns:
            self._children[turn.parent].append(turn.id)
            self._children[turn.id] = []
            self._said[turn.id] = [canonical(message) for message in turn.items]
            self.nbytes += _size(self._said[turn.id])
        self.turns[turn.id] = turn

    def remove(self, turn_id: str) -> list[str]:
        """Remove a turn and its hidden ancestors, as far as nothing else follows them.

        Returns the ids of what is gone.
        """
        gone: list[str] = []
        turn: Turn | None = self.turns[turn_id]
        while turn is not None and not self._children[turn.id] and (turn.hidden or not gone):
            del self.turns[turn.id], self._children[turn.id]
            self.nbytes -= _size(self._said.pop(turn.id))
            self._children[turn.parent].remove(turn.id)
            gone.append(turn.id)
            turn = self.turns[turn.parent] if turn.parent else None
        return gone

    def is_leaf(self, turn_id: str) -> bool:
        return not self._children[turn_id]

    def is_free(self, turn_id: str) -> bool:
        """Return whether nothing follows the turn, nor will when a request ends that runs."""
        return self.is_leaf(turn_id) and turn_id not in self.continued.values()

    def path(self, turn: Turn | None) -> list[Turn]:
        """Return the turns from the first one to this."""
        path = []
        while turn is not None:
            path.append(turn)
            turn = self.turns[turn.parent] if turn.parent else None
        return path[::-1]

    def messages(self, turn: Turn | None) -> Messages:
        """Return all that was said up to the end of this turn."""
        return [message for step in self.path(turn) for message in step.items]

    def longest_prefix(self, messages: Sequence[dict[str, Any]]) -> tuple[Turn | None, int]:
        """Return the turn whose messages, from the root on, begin `messages`, and their number.

        Of several turns it is the one with the most messages; (None, 0) where there is none.
        """
        wanted = [canonical(message) for message in messages]
        best: tuple[Turn | None, int] = (None, 0)
        open_turns = [(child, 0) for child in self._children[None]]
        while open_turns:
            turn_id, start = open_turns.pop()
            said = self._said[turn_id]
            if wanted[start : start + len(said)] != said:
                continue
            end = start + len(said)
            if end >= best[1]:
                best = self.turns[turn_id], end
            open_turns += [(child, end) for child in self._children[turn_id]]
        return best

    def surplus(self, max_bytes: float = math.inf) -> list[str]:
        """Remove what is too much off the newest path, oldest leaves first; return its ids."""
        gone: list[str] = []
        on_path = {turn.id for turn in self.path(self.newest)}
        most = max_bytes + sum(_size(self._said[turn_id]) for turn_id in on_path)
        while len(self.turns) > len(on_path) and (
            len(self.turns) > len(on_path) + MAX_OFF_PATH or self.nbytes > most
        ):
            oldest = next(t for t in self.turns if t not in on_path and self.is_leaf(t))
            gone += self.remove(oldest)
        return gone

    def hide(self, turn_id: str) -> Turn:
        """Mark a turn as deleted which others build on; return it."""
        turn = replace(self.turns[turn_id], hidden=True)
        self.turns[turn_id] = turn
        return turn


def canonical(message: dict[str, Any]) -> str:
    """Return a text that is equal for messages that say the same.

    Clients drop reasoning, trim answers, and send text as parts.
    """
    role = "system" if message["role"] == "developer" else message["role"]
    text = content_text(message.get("content"))
    calls = [_call(call) for call in message.get("tool_calls") or ()]
    said = [role, text.strip() if role == "assistant" else text, calls, message.get("tool_call_id")]
    return json.dumps([*said, message.get("name")])


def content_text(content: Any) -> str:
    """Return the text of a content: a string, parts with text, or nothing.

    What is none of these is refused elsewhere.
    """
    if isinstance(content, list):
        return "".join(str(part.get("text") or "") for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""


def _call(call: dict[str, Any]) -> list[Any]:
    function = call.get("function") or {}
    arguments = function.get("arguments")
    try:
        parsed = json.loads(arguments) if isinstance(arguments, str) else arguments
        arguments = json.dumps(parsed, sort_keys=True)
    except (ValueError, RecursionError):
        arguments = str(arguments)
    return [call.get("id"), function.get("name"), arguments]


def _size(said: list[str]) -> int:
    return 300 + sum(2 * len(text) + 200 for text in said)
