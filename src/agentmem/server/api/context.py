"""/v1/agents/{id}/context and /transcript.

The first tells an agent something without asking it; the second shows all that was said.
"""

from dataclasses import dataclass
from typing import Any, Literal

from fastapi import FastAPI, Request
from pydantic import Field, model_validator
from starlette.responses import JSONResponse, Response

from ...agent_key import AgentKey, check_agent_id
from ...chat.messages import Chat
from ...engine.api import SamplingParams
from ...errors import Conflict
from ...transcripts.conversation import TranscriptNotFound, inherited, system
from ...transcripts.turns import Messages, Turn, TurnTree, canonical, copies, new_turn
from ..answer import Services, is_retried
from ..auth import agent_of
from ..prefill import OnProgress, prefill, respond
from .chat_messages import to_messages
from .wire import MAX_MESSAGES, AgentLife, ChatMessage, Text, Wire


class ContextBody(Wire):
    """What an agent is told: messages, or text, which the user says.

    Texts without a key that follow one another are one.
    """

    messages: list[ChatMessage] | None = Field(default=None, min_length=1, max_length=MAX_MESSAGES)
    text: Text | None = Field(default=None, min_length=1)
    mode: Literal["append", "replace"] = "append"
    # replaces what was appended under the same
    key: Text | None = Field(default=None, min_length=1, max_length=256)
    stream: bool | None = None
    agentmem: AgentLife | None = None

    @model_validator(mode="after")
    def _one(self) -> "ContextBody":
        if (self.messages is None) == (self.text is None):
            raise ValueError("give either messages or text")
        return self

    @property
    def items(self) -> Messages:
        """The messages, whichever way they came."""
        if self.messages is None:
            return [{"role": "user", "content": self.text}]
        return to_messages(self.messages)


def add_routes(app: FastAPI, services: Services) -> None:
    @app.get("/v1/agents/{agent_id:path}/transcript", response_model=None)
    async def show_transcript(agent_id: str, request: Request, turn: str | None = None) -> Response:
        """Show all that was said up to a turn, by default the newest."""
        tree = await services.transcripts.tree(agent_of(request, agent_id))
        last = tree.newest if turn is None else tree.turns.get(turn)
        if last is None or last.hidden:
            what = "no transcript" if turn is None else f"no turn {turn[:200]!r}"
            raise TranscriptNotFound(
                f"Agent {agent_id[:200]!r} has {what}.", param="turn" if turn else "agent_id"
            )
        return JSONResponse(_transcript(agent_id, tree, last))  # as it is, however deep

    @app.post("/v1/agents/{agent_id:path}/context", response_model=None)
    async def add_context(agent_id: str, body: ContextBody, request: Request) -> Response:
        """Tell the agent something: prefill it, and answer nothing."""
        agent = agent_of(request, check_agent_id(agent_id))

        async def work(on_progress: OnProgress | None) -> dict[str, Any]:
            tree = await services.transcripts.tree(agent)
            async with tree.appending:  # what arrives in pieces is kept in their order
                told = _Told(services, agent, tree, body, is_retried(request))
                return await told.run(on_progress)

        return await respond(request, work, stream=bool(body.stream))


@dataclass(frozen=True)
class Change:
    """What becomes of a transcript."""

    parent: Turn | None
    turns: list[Turn]  # that follow the parent, and each other
    replaced: list[Turn]  # from the last on: not needed any more


def plan(tree: TurnTree, body: ContextBody, *, retried: bool) -> Change:
    """Return what a context changes.

    What was appended under its key is replaced where it stands, and what follows, kept.
    """
    newest = None if body.mode == "replace" else tree.newest
    path = tree.path(newest)
    same = [i for i, turn in enumerate(path) if body.key and turn.key == body.key]
    if same:
        return _replace(path, same[-1], body.items)
    if newest is not None and body.key is None and newest.kind == "context" and newest.key is None:
        if retried and _repeats(newest, body):
            return Change(newest, [], [])
        if body.text is not None and newest.about.get("text") and tree.is_free(newest.id):
            before = newest.items[-1]["content"]
            longer = [*newest.items[:-1], {"role": "user", "content": before + body.text}]
            parent = tree.turns[newest.parent] if newest.parent else None
            return Change(parent, [_context(parent, longer, body)], [newest])
    return Change(newest, [_context(newest, body.items, body)], [])


def _context(parent: Turn | None, items: Messages, body: ContextBody) -> Turn:
    about = {"text": True} if body.text is not None else {}
    return new_turn("context", parent, items, key=body.key, about=about)


def _replace(path: list[Turn], at: int, items: Messages) -> Change:
    old = path[at]
    parent = path[at - 1] if at else None
    if [canonical(item) for item in old.items] == [canonical(item) for item in items]:
        return Change(path[-1], [], [])
    new = new_turn("context", parent, items, key=old.key)
    turns = [new, *copies(path[at + 1 :], new)]
    only_contexts = all(turn.kind == "context" for turn in path[at:])
    return Change(parent, turns, path[at:] if only_contexts else [])


def _repeats(turn: Turn, body: ContextBody) -> bool:
    if body.text is not None:
        return bool(turn.about.get("text")) and str(turn.items[-1]["content"]).endswith(body.text)
    return [canonical(item) for item in turn.items] == [canonical(item) for item in body.items]


@dataclass(frozen=True)
class _Told:
    """One request, while nothing else is appended."""

    services: Services
    agent: AgentKey
    tree: TurnTree
    body: ContextBody
    retried: bool

    async def run(self, on_progress: OnProgress | None) -> dict[str, Any]:
        while True:
            newest = self.tree.newest
            change = plan(self.tree, self.body, retried=self.retried)
            done = await self._prefill(change, on_progress)
            if self.body.mode == "replace" or not self._outdated(newest):
                break
        self._commit(change)
        last = change.turns[-1] if change.turns else change.parent
        assert last is not None
        return {**done, "turn": last.id}

    def _outdated(self, newest: Turn | None) -> bool:
        """Return whether the conversation went on from `newest` meanwhile.

        What is told comes after that. A title call is another conversation.
        """
        tree = self.tree
        if newest is None or tree.newest is newest:
            return tree.newest is not newest
        path = {turn.id for turn in tree.path(tree.newest)}
        return newest.id not in tree.turns or newest.id in path

    async def _prefill(self, change: Change, on_progress: OnProgress | None) -> dict[str, Any]:
        """Prefill what is told as the next request is likely to have it."""
        self._check_kept()
        tree = self.tree
        instructions = inherited(tree, tree.newest, "instructions")
        tools = inherited(tree, tree.newest, "tools")
        before = [*system(instructions), *tree.messages(change.parent)]
        chat = Chat(
            [*before, *(item for turn in change.turns for item in turn.items)],
            known=len(before),
            tools=tools or (),
            generation_prompt=False,
        )
        prompt = await self.services.prompt(self.agent, chat)
        self._check_kept()
        generate = self.services.generate_request(
            self.agent, prompt, SamplingParams(max_tokens=0), life=self.body.agentmem
        )
        return await prefill(self.services.engine, generate, on_progress)

    def _commit(self, change: Change) -> None:
        if not change.turns:
            return
        turns = self.services.transcripts
        ephemeral = bool(self.body.agentmem and self.body.agentmem.ephemeral)
        if not turns.add(self.tree, change.turns, ephemeral=ephemeral):
            raise self._deleted()
        for turn in reversed(change.replaced):
            if turn.id in self.tree.turns and self.tree.is_free(turn.id):
                turns.drop(self.tree, [turn])

    def _check_kept(self) -> None:
        if self.tree.deleted:  # or it would be prefilled for an agent that is there again
            raise self._deleted()

    def _deleted(self) -> Conflict:
        return Conflict(
            f"Agent {self.agent.agent_id[:200]!r} was deleted meanwhile.", param="agent_id"
        )


def _transcript(agent_id: str, tree: TurnTree, last: Turn) -> dict[str, Any]:
    path = tree.path(last)
    turns = [
        {
            "id": turn.id,
            "kind": turn.kind,
            "key": turn.key,
            "messages": len(turn.items),
            "created": turn.created,
            "instructions": inherited(tree, turn, "instructions"),
        }
        for turn in path
    ]
    return {
        "object": "transcript",
        "agent_id": agent_id,
        "turn": last.id,
        "messages": tree.messages(last),
        "turns": turns,
    }
