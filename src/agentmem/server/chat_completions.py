"""POST /v1/chat/completions: OpenAI's request to a GenerateRequest, the engine's events to JSON or SSE."""

import json
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request
from starlette.responses import JSONResponse, Response

from ..config import Settings
from ..engine.request import EngineAPI, Finished, GenerateRequest, RequestStats, SamplingParams
from ..errors import AgentMemError, NotFound
from .auth import namespace_of
from .chat import ChatRenderer, resolve_agent_id
from .events import Event, Events, EventStream, unless_disconnected
from .openai import AgentOptions, ChatCompletionRequest, chat_message, error_body

FIRST_EVENT_WAIT = 2.0  # s; until then an error can still become an HTTP status
PING_INTERVAL = 5.0  # s between comments while a stream has nothing to say
PING = ": ping\n\n"
DONE = "data: [DONE]\n\n"
_SAME_NAME = (  # in the body and in SamplingParams
    *("temperature", "top_p", "min_p", "repetition_penalty", "repetition_context_size"),
    *("presence_penalty", "frequency_penalty"),
)


class ChatCompletions:
    """The adapter between OpenAI's chat completions and the engine."""

    def __init__(self, engine: EngineAPI, settings: Settings):
        self._engine = engine
        self._settings = settings
        self.renderer = ChatRenderer(engine.tokenizer, engine.max_context, engine.why_max_context)

    async def create(self, body: ChatCompletionRequest, request: Request) -> Response:
        check_model(body.model, self._engine.model_name)
        generate = await self._generate_request(body, request)
        answer = Answer(self._engine.model_name, generate.agent_id)
        events = Events(self._engine.generate(generate))
        async with AsyncExitStack() as closing:
            closing.push_async_callback(events.aclose)
            if not body.stream:
                return JSONResponse(await unless_disconnected(request, _completion(answer, events)))
            first = await unless_disconnected(request, events.next(FIRST_EVENT_WAIT))
            closing.pop_all()  # from here on the response closes it
        include_usage = bool(body.stream_options and body.stream_options.include_usage)
        return EventStream(_chunks(answer, events, first, include_usage), events)

    async def _generate_request(self, body: ChatCompletionRequest, request: Request) -> GenerateRequest:
        header = next((value for name, value in request.headers.raw if name == b"x-agent-id"), None)
        agent_id = resolve_agent_id(body.agent_id, header)
        branches = self._engine.branch_tokens(namespace_of(request), agent_id)
        tokens = await self.renderer.render([chat_message(m) for m in body.messages], branches)
        limits = [limit for limit in (body.max_tokens, body.max_completion_tokens) if limit is not None]
        limits = limits or [self._settings.default_max_tokens]
        max_tokens = min(*limits, self._engine.max_context - len(tokens))
        params = sampling_params(body, max_tokens)
        agent = body.agentmem or AgentOptions()
        return GenerateRequest(
            namespace_of(request), agent_id, tokens, params, body.priority or 0, agent.ttl, agent.ephemeral
        )


@dataclass(frozen=True)
class Answer:
    model: str
    agent_id: str
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def head(self, object: str) -> dict[str, Any]:
        return {"id": self.id, "object": object, "created": self.created, "model": self.model}

    def agentmem(self, stats: RequestStats) -> dict[str, Any]:
        """What this answer cost; times in ms."""
        return {
            "agent_id": self.agent_id,
            "cache": stats.cache,
            "cached_tokens": stats.cached_tokens,
            "restored_bytes": stats.restored_bytes,
            "restore_ms": round(stats.restore_ms, 3),
            "prefill_ms": round(stats.prefill_ms, 3),
            "ttft_ms": round(stats.ttft_ms, 3),
            "queue_ms": round(stats.queue_ms, 3),
        }


def check_model(name: str, served: str) -> None:
    """`name` may be the served name, its last path part, or "default". Raises NotFound."""
    if name not in (served, served.rstrip("/").rpartition("/")[2], "default"):
        message = f"The model {name[:200]!r} does not exist; this server has {served!r}, also known as 'default'."
        raise NotFound(message, param="model", code="model_not_found")


def sampling_params(body: ChatCompletionRequest, max_tokens: int) -> SamplingParams:
    """What the body says; SamplingParams' defaults for the rest, with `max_tokens` already fit to the context."""
    said = {name: value for name in _SAME_NAME if (value := getattr(body, name)) is not None}
    return SamplingParams(
        max_tokens=max_tokens,
        top_k=max(body.top_k or 0, 0),
        logit_bias=tuple((int(token), bias) for token, bias in (body.logit_bias or {}).items()),
        seed=None if body.seed is None else body.seed % 2**64,
        stop=tuple(body.stop or ()),
        ignore_eos=bool(body.ignore_eos),
        **said,
    )


def _usage(stats: RequestStats) -> dict[str, Any]:
    return {
        "prompt_tokens": stats.prompt_tokens,
        "completion_tokens": stats.completion_tokens,
        "total_tokens": stats.prompt_tokens + stats.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": stats.cached_tokens},
    }


async def _completion(answer: Answer, events: Events) -> dict[str, Any]:
    text = []
    while not isinstance(event := await events.next(), Finished):
        assert event is not None
        text.append(event.text)
    message = {"role": "assistant", "content": "".join(text)}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": event.reason}
    return {
        **answer.head("chat.completion"),
        "choices": [choice],
        "usage": _usage(event.stats),
        "agentmem": answer.agentmem(event.stats),
    }


async def _chunks(answer: Answer, events: Events, event: Event | None, include_usage: bool) -> AsyncIterator[str]:
    """The stream from its first event (None: none yet) on. An engine's error becomes its last line."""
    head = answer.head("chat.completion.chunk")
    usage = {"usage": None} if include_usage else {}

    def chunk(delta: dict[str, str], finish_reason: str | None = None, **more: Any) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return _data({**head, "choices": [choice], **usage, **more})

    has_role = False
    while True:
        if event is None:
            yield PING
        elif not has_role:
            has_role = True
            yield chunk({"role": "assistant", "content": ""})
        if isinstance(event, Finished):
            yield chunk({}, event.reason, agentmem=answer.agentmem(event.stats))
            if include_usage:
                yield _data({**head, "choices": [], "usage": _usage(event.stats)})
            yield DONE
            return
        if event is not None:
            yield chunk({"content": event.text})
        try:
            event = await events.next(PING_INTERVAL)
        except AgentMemError as e:
            yield _data(error_body(e.message, type=e.type, param=e.param, code=e.code))
            return


def _data(payload: dict[str, Any]) -> str:
    return f"data: {json.dumps(payload, ensure_ascii=False, separators=(',', ':'))}\n\n"
