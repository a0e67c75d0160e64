"""A conversation with an agent of a running server.

The server has the transcript: only what is new is sent.
"""

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from ..client import Client, RequestFailed, agent_path
from ..errors import AgentNotFound, StartupError

_UNKNOWN = "transcript_not_found"


@dataclass
class ChatAnswer:
    """An answer as far as it has come."""

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
        if self.reasoning:
            said["reasoning_content"] = self.reasoning
        return said

    @property
    def is_begun(self) -> bool:
        return self.first > 0

    @property
    def tokens_per_second(self) -> float | None:
        """The speed from the first token that was received to the last."""
        tokens = self.usage["completion_tokens"] - 1
        seconds = self.last - self.first
        return tokens / seconds if tokens > 0 and seconds > 0 else None

    def add(self, event: dict[str, Any]) -> None:
        """Take a chunk of the stream."""
        self.cost = event.get("agentmem", self.cost)
        self.usage = event.get("usage") or self.usage
        for choice in event["choices"]:
            self.reason = choice["finish_reason"]
            reasoning = choice["delta"].get("reasoning_content") or ""
            content = choice["delta"].get("content") or ""
            self.reasoning += reasoning
            self.content += content
            self.last = time.monotonic()
            if not self.first and (reasoning or content):
                self.first = self.last


@dataclass
class ChatSession:
    """One side of the conversation: what it knows, and what the server has not been told yet."""

    client: Client
    agent: str
    options: dict[str, Any]  # of every request
    turn: str | None = None  # the newest that is known of; None: nothing was said yet
    pending: list[dict[str, Any]] = field(default_factory=list)  # goes before the next question
    answer: ChatAnswer = field(default_factory=ChatAnswer)  # to the last question
    # the server may have what this side does not know of: go on from `turn`, not from its newest
    is_lost: bool = False

    def load(self) -> dict[str, Any]:
        """Return the transcript so far, as the server tells it; a new agent's is empty."""
        try:
            found = self.client.call("GET", agent_path(self.agent, "/transcript"))
        except RequestFailed as e:
            if e.code != _UNKNOWN:
                raise
            found = {"turn": None, "messages": [], "turns": []}
        self.turn = found["turn"]
        self.is_lost = False
        return found

    def stats(self) -> dict[str, Any] | None:
        """Return what the server tells of the agent's cache; None: it has none."""
        try:
            return self.client.call("GET", agent_path(self.agent))
        except RequestFailed as e:
            if e.code != AgentNotFound.code:
                raise
            return None

    def ask(self, question: str, hear: Callable[[str, str], None]) -> ChatAnswer:
        """Return the answer; `hear` gets its reasoning and its content as they come.

        Raise RequestFailed or StartupError: the question is not part of the conversation.
        KeyboardInterrupt: the server stops, see `keep_cut`.
        """
        self.answer = ChatAnswer()
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
        self._is_told(self.answer.cost["turn"])
        return self.answer

    def _is_told(self, turn: str | None) -> None:
        """Note that the server has all that was said up to `turn`."""
        self.turn = turn
        self.pending = []
        self.is_lost = False

    def _where(self) -> dict[str, Any]:
        """Return where the question goes on from, as the request's `agentmem` object."""
        if self.turn is None:
            return {}
        if self.is_lost:
            return {"continue": True, "turn": self.turn}
        return {"continue": True}

    def _receive(self, body: dict[str, Any], hear: Callable[[str, str], None]) -> None:
        answer = self.answer
        with closing(self.client.events("POST", "/v1/chat/completions", json=body)) as events:
            for event in events:
                reasoned = len(answer.reasoning)
                said = len(answer.content)
                answer.add(event)
                hear(answer.reasoning[reasoned:], answer.content[said:])
        if not answer.usage:
            raise StartupError("the answer ended early")

    def instruct(self, text: str) -> None:
        """Put a system message before the next question."""
        if self.pending and self.pending[-1]["role"] == "system":
            self.pending.pop()
        self.pending.append({"role": "system", "content": text})

    def keep_cut(self, question: str) -> dict[str, Any] | None:
        """Make the answer that was interrupted a part of the conversation, as far as it came.

        Return what that cost. None: there was nothing of it yet, and its question is dropped too.
        Where the server can't be told now, it is with the next question.
        """
        if not self.answer.content.strip():
            return None
        self.pending += [{"role": "user", "content": question}, self.answer.message]
        body = {"messages": self.pending}
        done = self.client.call("POST", agent_path(self.agent, "/context"), json=body)
        self._is_told(done["turn"])
        return done

    def fork(self, to: str) -> None:
        """Go on as another agent, from here."""
        self.client.call("POST", agent_path(self.agent, "/fork"), json={"to": to})
        self.agent = to
        self.load()
