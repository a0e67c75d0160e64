"""POST /v1/chat/completions: OpenAI's request to a GenerateRequest, the engine's events to JSON or
SSE.
"""

import json
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from datetime import date
from typing import Any

from fastapi import Request
from starlette.responses import JSONResponse, Response

from ...agent_key import AgentKey
from ...chat.answer_parser import AnswerParser, Content, Part, Reasoning
from ...chat.dates import session_days
from ...chat.messages import ToolCall
from ...chat.render import render
from ...chat.renderer import ChatRenderer
from ...config import Settings
from ...engine.api import EngineAPI, Finished, GenerateRequest, RequestStats
from ...errors import AgentMemError, NotFound
from ...transcripts.conversation import Conversation, begin, is_retried, resume
from ..auth import namespace_of
from ..parts import message_of
from ..sse import Event, Events, EventStream, unless_disconnected
from .identity import ANONYMOUS, agent_id_of
from .wire import AgentOptions, ChatCompletionRequest, error_body

FIRST_EVENT_WAIT = 2.0  # s; until then an error can still become an HTTP status
PING_INTERVAL = 5.0  # s between comments while a stream has nothing to say
PING = ": ping\n\n"
DONE = "data: [DONE]\n\n"


class ChatCompletions:
    """The adapter between OpenAI's chat completions and the engine."""

    def __init__(self, engine: EngineAPI, settings: Settings):
        self._engine = engine
        self._settings = settings
        self.renderer = ChatRenderer(engine.tokenizer, engine.max_context, engine.why_max_context)

    async def create(self, body: ChatCompletionRequest, request: Request) -> Response:
        check_model(body.model, self._engine.model_name)
        given = body.given()
        conversation = await self._conversation(body, request)
        if conversation.resumed and body.tools is None:
            given["tools"] = (
                conversation.tools
            )  # without them the prompt would be another one from its start on
        conversation.tools = given["tools"]
        generate = await self._generate_request(body, conversation, given)
        parser = AnswerParser(
            self.renderer.markup,
            [] if body.tool_choice == "none" else given["tools"],
            in_reasoning=await self.renderer.ends_in_reasoning(generate.tokens),
            max_calls=1 if body.parallel_tool_calls is False else 0,
        )
        answer = Answer(
            self._engine.model_name, conversation, parser, self._settings.reasoning_alias
        )
        events = Events(self._engine.generate(generate))
        async with AsyncExitStack() as closing:
            closing.push_async_callback(events.aclose)
            if not body.stream:
                return JSONResponse(await unless_disconnected(request, _completion(answer, events)))
            first = await unless_disconnected(request, events.next(FIRST_EVENT_WAIT))
            closing.pop_all()  # from here on the response closes it
        include_usage = bool(body.stream_options and body.stream_options.include_usage)
        return EventStream(_chunks(answer, events, first, include_usage), events)

    async def _conversation(self, body: ChatCompletionRequest, request: Request) -> Conversation:
        agent_id = agent_id_of(request, body)
        options, said = (
            body.agentmem or AgentOptions(),
            [m.model_dump(exclude_none=True) for m in body.messages],
        )
        whose = (self._engine.turns, namespace_of(request), agent_id)
        if options.continue_:
            conversation = await resume(*whose, said, options.turn, retried=is_retried(request))
        else:
            conversation = begin(
                *whose, said, keep=body.store is not False and agent_id != ANONYMOUS
            )
        conversation.ephemeral = bool(options.ephemeral)
        return conversation

    async def _generate_request(
        self, body: ChatCompletionRequest, conversation: Conversation, given: dict[str, Any]
    ) -> GenerateRequest:
        agent = AgentKey(conversation.namespace, conversation.agent_id)
        branches = self._engine.branch_tokens(agent)
        days = days_of(self._engine, self._settings, agent)
        messages = conversation.messages
        known = len(messages) - len(conversation.new)
        tokens = await render(self.renderer, messages, branches, known=known, **given, days=days)
        limits = [
            limit for limit in (body.max_tokens, body.max_completion_tokens) if limit is not None
        ]
        limits = limits or [self._settings.default_max_tokens]
        max_tokens = min(*limits, self._engine.max_context - len(tokens))
        params = body.sampling_params(max_tokens)
        life = body.agentmem or AgentOptions()
        return GenerateRequest(
            agent,
            tokens,
            params,
            priority=body.priority or 0,
            ttl=life.ttl,
            ephemeral=life.ephemeral,
            checkpoint=await self.renderer.before_answer(tokens, body.chat_template_kwargs),
        )


@dataclass(frozen=True)
class Answer:
    model: str
    conversation: Conversation
    parser: AnswerParser
    reasoning_alias: bool  # the reasoning under both names
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def head(self, object: str) -> dict[str, Any]:
        return {"id": self.id, "object": object, "created": self.created, "model": self.model}

    def reasoning(self, text: str) -> dict[str, str]:
        return {"reasoning_content": text} | ({"reasoning": text} if self.reasoning_alias else {})

    def finish_reason(self, event: Finished) -> str:
        return "tool_calls" if event.reason == "stop" and self.parser.num_calls else event.reason

    async def end(self, stats: RequestStats, parts: list[Part]) -> dict[str, Any]:
        """Leave a turn; what this answer cost."""
        turn = await self.conversation.finish("chat", [message_of(parts)])
        return agentmem(self.conversation.agent_id, stats, turn)


def agentmem(agent_id: str, stats: RequestStats, turn: str | None) -> dict[str, Any]:
    """What an answer cost, times in ms, and the turn that it left."""
    return {
        "agent_id": agent_id,
        "cache": stats.cache,
        "cached_tokens": stats.cached_tokens,
        "cause": stats.cause,
        "restored_bytes": stats.restored_bytes,
        "restore_ms": round(stats.restore_ms, 3),
        "prefill_ms": round(stats.prefill_ms, 3),
        "ttft_ms": round(stats.ttft_ms, 3),
        "queue_ms": round(stats.queue_ms, 3),
        "turn": turn,
    }


def days_of(engine: EngineAPI, settings: Settings, agent: AgentKey) -> Sequence[date]:
    """Whose date the agent's prompts may bear."""
    now = time.time()
    created, last_used = engine.agent_times(agent) or (now, now)
    return session_days(created, last_used, now, settings.date_session * 3600)


def check_model(name: str, served: str) -> None:
    """`name` may be the served name, its last path part, or "default". Raises NotFound."""
    if name not in (served, served.rstrip("/").rpartition("/")[2], "default"):
        message = f"The model {name[:200]!r} does not exist; this server has {served!r}, also known as 'default'."
        raise NotFound(message, param="model", code="model_not_found")


def _usage(stats: RequestStats) -> dict[str, Any]:
    return {
        "prompt_tokens": stats.prompt_tokens,
        "completion_tokens": stats.completion_tokens,
        "total_tokens": stats.prompt_tokens + stats.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": stats.cached_tokens},
    }


async def _completion(answer: Answer, events: Events) -> dict[str, Any]:
    parts: list[Part] = []
    while not isinstance(event := await events.next(), Finished):
        assert event is not None
        parts += answer.parser.feed(event.text)
    parts += answer.parser.finish(cut=event.cut)
    choice = {
        "index": 0,
        "message": _message(answer, parts),
        "logprobs": None,
        "finish_reason": answer.finish_reason(event),
    }
    return {
        **answer.head("chat.completion"),
        "choices": [choice],
        "usage": _usage(event.stats),
        "agentmem": await answer.end(event.stats, parts),
    }


def _message(answer: Answer, parts: list[Part]) -> dict[str, Any]:
    message = message_of(parts)
    if "reasoning_content" in message:
        message |= answer.reasoning(message["reasoning_content"])
    return message


class _Deltas:
    """The deltas of one stream, in the order that OpenAI's clients put together."""

    def __init__(self, answer: Answer):
        self._answer = answer
        self._num_calls = 0

    def of(self, parts: list[Part]) -> Iterator[dict[str, Any]]:
        for part in parts:
            if isinstance(part, Content):
                yield {"content": part.text}
            elif isinstance(part, Reasoning):
                yield self._answer.reasoning(part.text)
            else:
                yield from self._of_call(part)

    def _of_call(self, call: ToolCall) -> Iterator[dict[str, Any]]:
        """Who is called, then with what."""
        index, self._num_calls = self._num_calls, self._num_calls + 1
        head = {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": ""}}
        yield {"tool_calls": [{"index": index, **head}]}
        yield {"tool_calls": [{"index": index, "function": {"arguments": call.arguments_json}}]}


async def _chunks(
    answer: Answer, events: Events, event: Event | None, include_usage: bool
) -> AsyncIterator[str]:
    """The stream from its first event (None: none yet) on. An engine's error becomes its last line."""
    head = answer.head("chat.completion.chunk")
    usage = {"usage": None} if include_usage else {}

    deltas, parser, parts = _Deltas(answer), answer.parser, list[Part]()

    def chunk(delta: dict[str, Any], finish_reason: str | None = None, **more: Any) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return _data({**head, "choices": [choice], **usage, **more})

    has_role, said = False, time.monotonic()
    while True:
        if event is not None and not has_role:
            has_role = True
            yield chunk({"role": "assistant", "content": ""})
        if isinstance(event, Finished):
            parts += (rest := parser.finish(cut=event.cut))
            for delta in deltas.of(rest):
                yield chunk(delta)
            cost = await answer.end(event.stats, parts)
            yield chunk({}, answer.finish_reason(event), agentmem=cost)
            if include_usage:
                yield _data({**head, "choices": [], "usage": _usage(event.stats)})
            yield DONE
            return
        parts += (fresh := parser.feed(event.text) if event is not None else [])
        for delta in deltas.of(fresh):
            said = time.monotonic()
            yield chunk(delta)
        if (
            event is None or time.monotonic() - said > PING_INTERVAL
        ):  # a long tool call says nothing until it is whole
            said = time.monotonic()
            yield PING
        try:
            event = await events.next(PING_INTERVAL)
        except AgentMemError as e:
            yield _data(error_body(e.message, type=e.type, param=e.param, code=e.code))
            return


def _data(payload: dict[str, Any]) -> str:
    return f"data: {json.dumps(payload, ensure_ascii=False, separators=(',', ':'))}\n\n"
