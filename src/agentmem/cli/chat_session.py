"""A conversation with an agent of a running server. The server has the transcript: only what is new
is sent.
"""

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from ..client import Client, RequestFailed
from ..errors import AgentNotFound, StartupError
from .agents import path_of

Messages = list[dict[str, Any]]
_UNKNOWN = "transcript_not_found"


@dataclass
class Answer:
    """As far as it has come."""

    content: str = ""
    reasoning: str = ""
    reason: str | None = None  # why it ended; None: it did not
    cost: dict[str, Any] = field(default_factory=dict)  # the server's `agentmem` object
    usage: dict[str, Any] = field(default_factory=dict)
    first: float = 0.0  # s on the monotonic clock
    last: float = 0.0

    @property
    def message(self) -> dict[str, Any]:
        said = {"role": "assistant", "content": self.content}
        return said | ({"reasoning_content": self.reasoning} if self.reasoning else {})

    @property
    def is_begun(self) -> bool:
        return self.first > 0

    @property
    def tokens_per_second(self) -> float | None:
        """From the first token that was received to the last."""
        tokens, seconds = self.usage["completion_tokens"] - 1, self.last - self.first
        return tokens / seconds if tokens > 0 and seconds > 0 else None

    def add(self, event: dict[str, Any]) -> None:
        self.cost = event.get("agentmem", self.cost)
        self.usage = event.get("usage") or self.usage
        for choice in event["choices"]:
            self.reason = choice["finish_reason"]
            reasoning, content = (
                choice["delta"].get(kind) or "" for kind in ("reasoning_content", "content")
            )
            self.reasoning, self.content = self.reasoning + reasoning, self.content + content
            self.last = time.monotonic()
            self.first = self.first or (self.last if reasoning or content else 0.0)


@dataclass
class ChatSession:
    client: Client
    agent: str
    options: dict[str, Any]  # of every request
    turn: str | None = None  # the newest that is known of; None: nothing was said yet
    pending: Messages = field(default_factory=list)  # goes before the next question
    answer: Answer = field(default_factory=Answer)  # to the last question
    # the server may have what this side does not know of: go on from `turn`, not from its newest
    is_lost: bool = False

    def load(self) -> dict[str, Any]:
        """The transcript so far, as the server tells it; of a new agent, an empty one."""
        try:
            found = self.client.call("GET", path_of(self.agent, "/transcript"))
        except RequestFailed as e:
            if e.code != _UNKNOWN:
                raise
            found = {"turn": None, "messages": [], "turns": []}
        self.turn, self.is_lost = found["turn"], False
        return found

    def stats(self) -> dict[str, Any] | None:
        """Of the agent's cache; None: it has none."""
        try:
            return self.client.call("GET", path_of(self.agent))
        except RequestFailed as e:
            if e.code != AgentNotFound.code:
                raise
            return None

    def ask(self, question: str, hear: Callable[[str, str], None]) -> Answer:
        """The answer; `hear` gets its reasoning and its content as they come.

        Raises RequestFailed or StartupError: the question is not part of the conversation.
        KeyboardInterrupt: the server stops, see `keep_cut`.
        """
        self.answer = Answer()
        messages = [*self.pending, {"role": "user", "content": question}]
        body = {"agent_id": self.agent, "messages": messages, "stream": True, **self.options}
        body |= {"stream_options": {"include_usage": True}, "agentmem": self._where()}
        try:
            self._receive(body, hear)
        except (StartupError, KeyboardInterrupt):
            self.is_lost = True
            raise
        except RequestFailed as e:
            if e.code == _UNKNOWN:  # the agent was deleted, or cut
                self.load()
            raise
        self.turn, self.pending, self.is_lost = self.answer.cost["turn"], [], False
        return self.answer

    def _where(self) -> dict[str, Any]:
        if self.turn is None:
            return {}
        return {"continue": True} | ({"turn": self.turn} if self.is_lost else {})

    def _receive(self, body: dict[str, Any], hear: Callable[[str, str], None]) -> None:
        answer = self.answer
        with closing(self.client.events("POST", "/v1/chat/completions", json=body)) as events:
            for event in events:
                before = len(answer.reasoning), len(answer.content)
                answer.add(event)
                hear(answer.reasoning[before[0] :], answer.content[before[1] :])
        if not answer.usage:
            raise StartupError("the answer ended early")

    def instruct(self, text: str) -> None:
        """A system message before the next question."""
        if self.pending and self.pending[-1]["role"] == "system":
            self.pending.pop()
        self.pending.append({"role": "system", "content": text})

    def keep_cut(self, question: str) -> dict[str, Any] | None:
        """Make the answer that was interrupted a part of the conversation, as far as it came; what
        that cost.

        None: there was nothing of it yet, and its question is dropped too. Where the server can't
        be told now, it is with the next question.
        """
        if not self.answer.content.strip():
            return None
        self.pending += [{"role": "user", "content": question}, self.answer.message]
        done = self.client.call(
            "POST", path_of(self.agent, "/context"), json={"messages": self.pending}
        )
        self.turn, self.pending, self.is_lost = done["turn"], [], False
        return done

    def fork(self, to: str) -> None:
        """Go on as another agent, from here."""
        self.client.call("POST", path_of(self.agent, "/fork"), json={"to": to})
        self.agent = to
        self.load()
