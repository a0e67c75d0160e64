"""POST /v1/chat/completions: OpenAI's chat completions."""

import time
import uuid
from collections.abc import AsyncIterator, Iterator
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response

from ...chat.answer_parser import AnswerPart, Content, Reasoning
from ...chat.messages import ToolCall, function_tools
from ...engine.api import Finished, RequestStats
from ...errors import AgentMemError
from ..answer import Begun, Ping, RunningAnswer, Services, ask, converse
from ..errors import openai_error
from ..sse import DONE, PING, event_lines, stream, whole
from .identity import ANONYMOUS, agent_id_of
from .wire import ChatCompletionRequest, said


def add_routes(app: FastAPI, services: Services) -> None:
    @app.post("/v1/chat/completions", response_model=None)
    async def create_chat_completion(body: ChatCompletionRequest, request: Request) -> Response:
        services.check_model(body.model)
        answer = await _ask(services, body, request)
        completion = _ChatCompletion(services, answer)
        if body.stream:
            include_usage = bool(body.stream_options and body.stream_options.include_usage)
            return await stream(request, completion.chunks(include_usage), answer)
        return JSONResponse(await whole(request, completion.body(), answer))


async def _ask(services: Services, body: ChatCompletionRequest, request: Request) -> RunningAnswer:
    tools = function_tools(body.tools)
    agent_id = agent_id_of(request, body)
    conversation = await converse(
        services,
        request,
        agent_id,
        said(body.messages),
        body.agentmem,
        keep=body.store is not False and agent_id != ANONYMOUS,
        tools=None if body.tools is None else tools,
    )
    limits = [limit for limit in (body.max_tokens, body.max_completion_tokens) if limit is not None]
    max_tokens = min(limits, default=services.settings.default_max_tokens)
    return await ask(
        services,
        conversation,
        body.sampling_params(max_tokens),
        options=body.chat_template_kwargs,
        may_call=body.tool_choice != "none",
        max_calls=1 if body.parallel_tool_calls is False else 0,
        life=body.agentmem,
        priority=body.priority or 0,
    )


class _ChatCompletion:
    """An answer in OpenAI's shape, whole or in chunks."""

    def __init__(self, services: Services, answer: RunningAnswer):
        self._answer = answer
        self._reasoning_alias = services.settings.reasoning_alias
        self._num_calls = 0  # in chunks so far
        self._id = f"chatcmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._model = services.engine.model_name

    async def body(self) -> dict[str, Any]:
        """Return the answer, when it is whole."""
        async for _ in self._answer.items():
            pass
        finished = self._answer.finished
        assert finished is not None
        message = self._answer.message
        if "reasoning_content" in message:
            message |= self._reasoning(message["reasoning_content"])
        choice = {
            "index": 0,
            "message": message,
            "logprobs": None,
            "finish_reason": self._finish_reason(finished),
        }
        return {
            **self._head("chat.completion"),
            "choices": [choice],
            "usage": _usage(finished.stats),
            "agentmem": await self._answer.leave_turn(),
        }

    async def chunks(self, include_usage: bool) -> AsyncIterator[str]:
        """Yield the answer as it comes. An engine's error becomes its last line."""
        usage = {"usage": None} if include_usage else {}
        try:
            async for item in self._answer.items():
                if isinstance(item, Begun):
                    yield self._chunk({"role": "assistant", "content": ""}, **usage)
                elif isinstance(item, Ping):
                    yield PING
                elif isinstance(item, Content | Reasoning | ToolCall):
                    for delta in self._deltas(item):
                        yield self._chunk(delta, **usage)
                elif isinstance(item, Finished):
                    cost = await self._answer.leave_turn()
                    yield self._chunk({}, self._finish_reason(item), **usage, agentmem=cost)
                    if include_usage:
                        yield self._event(choices=[], usage=_usage(item.stats))
                    yield DONE
        except AgentMemError as e:
            yield event_lines(openai_error(e))

    def _chunk(self, delta: dict[str, Any], finish_reason: str | None = None, **more: Any) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return self._event(choices=[choice], **more)

    def _event(self, **fields: Any) -> str:
        return event_lines({**self._head("chat.completion.chunk"), **fields})

    def _head(self, object: str) -> dict[str, Any]:
        return {"id": self._id, "object": object, "created": self._created, "model": self._model}

    def _deltas(self, part: AnswerPart) -> Iterator[dict[str, Any]]:
        if isinstance(part, Content):
            yield {"content": part.text}
        elif isinstance(part, Reasoning):
            yield self._reasoning(part.text)
        else:
            yield from self._call_deltas(part)

    def _call_deltas(self, call: ToolCall) -> Iterator[dict[str, Any]]:
        """Yield who is called, then with what."""
        index = self._num_calls
        self._num_calls += 1
        head = {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": ""}}
        yield {"tool_calls": [{"index": index, **head}]}
        yield {"tool_calls": [{"index": index, "function": {"arguments": call.arguments_json}}]}

    def _reasoning(self, text: str) -> dict[str, str]:
        """Return the reasoning, under both of its names where the settings say so."""
        return {"reasoning_content": text} | ({"reasoning": text} if self._reasoning_alias else {})

    def _finish_reason(self, finished: Finished) -> str:
        if finished.reason == "stop" and self._answer.has_calls:
            return "tool_calls"
        return finished.reason


def _usage(stats: RequestStats) -> dict[str, Any]:
    return {
        "prompt_tokens": stats.prompt_tokens,
        "completion_tokens": stats.completion_tokens,
        "total_tokens": stats.prompt_tokens + stats.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": stats.cached_tokens},
    }
