"""POST /v1/chat/completions: OpenAI's chat completions."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import replace
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response

from ...chat.answer_parser import AnswerPart, Content, Reasoning
from ...chat.messages import ToolCall
from ...chat.normalise import function_tools
from ...engine.api import Finished
from ...errors import AgentMemError, InvalidRequest
from ..answer import Begun, Item, Ping, RunningAnswer, Services, ask, converse
from ..errors import openai_error
from ..sse import DONE, PING, event_lines, merge, stream, whole
from .chat_messages import to_messages
from .identity import ANONYMOUS, agent_id_of
from .logprobs import ContentLogprobs
from .structured import content_format, tool_choice
from .usage import StreamUsage, usage
from .wire import ChatCompletionRequest, StreamOptions


def add_routes(app: FastAPI, services: Services) -> None:
    @app.post("/v1/chat/completions", response_model=None)
    async def create_chat_completion(body: ChatCompletionRequest, request: Request) -> Response:
        services.check_model(body.model)
        answer = await _ask(services, body, request)
        completion = await _begin(services, answer.times(body.n or 1), body)
        answers = completion.answers
        if body.stream:
            return await stream(request, completion.chunks(body.stream_options), *answers)
        return JSONResponse(await whole(request, completion.body(), *answers))


async def _ask(services: Services, body: ChatCompletionRequest, request: Request) -> RunningAnswer:
    tools = function_tools(body.tools)
    agent_id = agent_id_of(request, body)
    conversation = await converse(
        services,
        request,
        agent_id,
        to_messages(body.messages),
        body.agentmem,
        keep=body.store is not False and agent_id != ANONYMOUS and body.max_answer_tokens != 0,
        tools=None if body.tools is None else tools,
    )
    if body.add_generation_prompt is False and not body.continue_final_message:
        raise InvalidRequest(
            "add_generation_prompt: false needs continue_final_message, true; leave it out",
            param="add_generation_prompt",
            code="unsupported_parameter",
        )
    body.check_end(conversation.new)
    conversation.continues = bool(body.continue_final_message)
    max_tokens = body.max_answer_tokens
    if max_tokens is None:
        max_tokens = services.settings.default_max_tokens
    sampling = body.sampling_params(max_tokens, services.engine.sampling)
    params = await services.with_biased_texts(sampling, body.biased_texts)
    return await ask(
        services,
        conversation,
        replace(params, logprobs=body.num_logprobs),
        options=body.template_options,
        tool_choice=tool_choice(body.tool_choice, body.tools, parallel=body.parallel_tool_calls),
        content=await asyncio.to_thread(content_format, body),
        life=body.agentmem,
        priority=body.priority or 0,
    )


async def _begin(
    services: Services, answers: Sequence[RunningAnswer], body: ChatCompletionRequest
) -> "_ChatCompletion":
    """Return what tells the answers as the body wants them."""
    alias = services.settings.reasoning_alias
    choices = []
    for index, answer in enumerate(answers):
        logprobs = None
        if body.logprobs:
            logprobs = ContentLogprobs(answer, await services.renderer.token_texts())
        choices.append(_Choice(index, answer, logprobs, alias))
    return _ChatCompletion(services, choices)


class _ChatCompletion:
    """Answers to one chat in OpenAI's shape, whole or in chunks."""

    def __init__(self, services: Services, choices: Sequence["_Choice"]):
        self.answers = [choice.answer for choice in choices]
        self._choices = choices
        self._id = f"chatcmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._model = services.engine.model_name

    async def body(self) -> dict[str, Any]:
        """Return the answers, when they are whole."""
        async for _ in self._items():
            pass
        return {
            **self._head("chat.completion"),
            "choices": [await choice.body() for choice in self._choices],
            "usage": usage(self.answers),
            "agentmem": await self.answers[0].leave_turn(),
        }

    async def chunks(self, options: StreamOptions | None) -> AsyncIterator[str]:
        """Yield the answers as they come. An engine's error becomes the last line."""
        told = StreamUsage(options, self.answers)
        try:
            async for index, item in self._items():
                if isinstance(item, Ping):
                    yield PING
                async for chunk in self._choices[index].chunks(item):
                    yield self._event(**chunk, **told.field())
            if told.has_last:
                yield self._event(**told.last())
            yield DONE
        except AgentMemError as e:
            yield event_lines(openai_error(e))

    def _items(self) -> AsyncIterator[tuple[int, Item]]:
        items = [answer.items() for answer in self.answers]
        return merge(items, at_once=len(items))

    def _event(self, **fields: Any) -> str:
        return event_lines({**self._head("chat.completion.chunk"), **fields})

    def _head(self, object: str) -> dict[str, Any]:
        return {"id": self._id, "object": object, "created": self._created, "model": self._model}


class _Choice:
    """One of the answers."""

    def __init__(
        self,
        index: int,
        answer: RunningAnswer,
        logprobs: ContentLogprobs | None,
        reasoning_alias: bool,
    ):
        """`logprobs`: of the answer, where they are asked for."""
        self.answer = answer
        self._index = index
        self._logprobs = logprobs
        self._reasoning_alias = reasoning_alias
        self._num_calls = 0  # in chunks so far

    async def body(self) -> dict[str, Any]:
        """Return the choice that it is, when it is whole."""
        finished = self.answer.finished
        assert finished is not None
        message = self.answer.message
        if "reasoning_content" in message:
            message |= self._reasoning(message["reasoning_content"])
        contents = [part for part in self.answer.parts if isinstance(part, Content)]
        return {
            "index": self._index,
            "message": message,
            "logprobs": await self._told(contents),
            "finish_reason": self._finish_reason(finished),
        }

    async def chunks(self, item: Item) -> AsyncIterator[dict[str, Any]]:
        """Yield what becomes of an item in chunks. The first answer's last one says its cost."""
        if isinstance(item, Begun):
            yield self._chunk({"role": "assistant", "content": ""})
        elif isinstance(item, Content | Reasoning | ToolCall):
            logprobs = await self._told([item]) if isinstance(item, Content) else None
            for delta in self._deltas(item):
                yield self._chunk(delta, logprobs=logprobs)
        elif isinstance(item, Finished):
            cost = await self.answer.leave_turn()
            last = self._chunk({}, self._finish_reason(item))
            yield last | ({"agentmem": cost} if self._index == 0 else {})

    async def _told(self, contents: Sequence[Content]) -> dict[str, Any] | None:
        """Return the log probabilities of the tokens of what is new in the content, if wanted."""
        if self._logprobs is None:
            return None
        rows = []
        for content in contents:
            rows += await self._logprobs.of(content)
        return {"content": rows, "refusal": None}

    def _chunk(
        self,
        delta: dict[str, Any],
        finish_reason: str | None = None,
        *,
        logprobs: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        choice = {
            "index": self._index,
            "delta": delta,
            "logprobs": logprobs,
            "finish_reason": finish_reason,
        }
        return {"choices": [choice]}

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
        if finished.reason == "stop" and self.answer.has_calls:
            return "tool_calls"
        return finished.reason
