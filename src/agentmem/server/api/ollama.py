"""POST /api/chat and /api/generate: Ollama's API, whose streams are lines of JSON."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response

from ...chat.answer_parser import AnswerParser, Content, Reasoning
from ...chat.grammar import AUTO, text_grammar
from ...chat.messages import Chat, ToolCall
from ...chat.renderer import Prompt
from ...engine.api import Finished, RequestStats, TextDelta
from ...errors import AgentMemError, InvalidRequest
from ...transcripts.conversation import is_prefill
from ...transcripts.turns import Messages
from ..answer import Ping, RunningAnswer, Services, ask, converse
from ..auth import agent_of
from ..errors import ErrorShape
from ..sse import stream, whole
from .identity import ANONYMOUS, resolve_agent_id
from .logprobs import ContentLogprobs
from .ollama_messages import CallIds, to_messages
from .ollama_wire import (
    OllamaChatRequest,
    OllamaGenerateRequest,
    OllamaRequest,
    add_post,
)

NDJSON = "application/x-ndjson"
# what Ollama has and this server has not
_MISSING = {
    "/api/embed": "this server makes no embeddings",
    "/api/embeddings": "this server makes no embeddings",
    "/api/pull": "this server serves the model that it was started with; use `agentmem pull`",
    "/api/push": "this server publishes no models",
    "/api/create": "this server makes no models; start it with another --model",
    "/api/copy": "this server makes no models; start it with another --model",
    "/api/delete": "this server deletes no models",
    "/api/blobs/{digest}": "this server makes no models; start it with another --model",
}


class Unsupported(InvalidRequest):
    """A route of Ollama's that is not there."""

    status = 501
    code = "not_supported"


def add_routes(app: FastAPI, services: Services) -> None:
    services.errors.set_shape("/api", ErrorShape(ollama_error))

    async def chat(body: OllamaChatRequest, request: Request) -> Response:
        services.check_model(body.model)
        if not body.messages and not (body.agentmem and body.agentmem.continue_):
            return _loaded(body, _message("", "", []))
        began = time.monotonic_ns()
        ids = CallIds()
        answer = await _ask(services, body, request, to_messages(body.messages or [], ids))
        told = _Answer(body, answer, _message, ids, began=began)
        return await _respond(services, request, body, told)

    async def generate(body: OllamaGenerateRequest, request: Request) -> Response:
        services.check_model(body.model)
        if not body.prompt:
            return _loaded(body, _response("", "", []))
        began = time.monotonic_ns()
        if body.raw:
            answer = await _ask_raw(services, body, request)
        elif body.context:
            answer = await _ask_on(services, body, request)
        else:
            answer = await _ask(services, body, request, body.messages)

        async def context() -> list[int] | None:
            return None if body.raw else await _context(services, body, answer.message)

        told = _Answer(body, answer, _response, CallIds(), began=began, context=context)
        return await _respond(services, request, body, told)

    add_post(app, "/api/chat", chat)
    add_post(app, "/api/generate", generate)
    for path, why in _MISSING.items():
        _add_missing(app, path, why)


def _add_missing(app: FastAPI, path: str, why: str) -> None:
    async def missing() -> None:
        raise Unsupported(why)

    methods = ["GET", "POST", "DELETE"]
    app.router.add_api_route(path, missing, methods=methods, include_in_schema=False)


def ollama_error(error: AgentMemError, request_id: str = "") -> dict[str, Any]:
    """Return the body of an error as Ollama has it, in valid UTF-8."""
    return {"error": error.message.encode(errors="backslashreplace").decode()}


async def _ask(
    services: Services, body: OllamaRequest, request: Request, said: Messages
) -> RunningAnswer:
    tools = body.function_tools() if isinstance(body, OllamaChatRequest) and body.tools else None
    agent_id = resolve_agent_id(request.headers, agent_id=body.agent_id)
    conversation = await converse(
        services,
        request,
        agent_id,
        said,
        body.agentmem,
        keep=agent_id != ANONYMOUS,
        tools=tools,
    )
    conversation.continues = is_prefill(said)
    return await ask(
        services,
        conversation,
        body.sampling_params(services.settings.default_max_tokens, services.engine.sampling),
        options=body.template_options,
        content=await asyncio.to_thread(body.content_format),
        life=body.agentmem,
    )


async def _ask_raw(
    services: Services, body: OllamaGenerateRequest, request: Request
) -> RunningAnswer:
    """Have the prompt answered as it is; no turn is left."""
    assert body.prompt is not None
    agent = agent_of(request, resolve_agent_id(request.headers, agent_id=body.agent_id))
    prompt = await services.text_prompt(agent, body.prompt, begins=True)
    params = body.sampling_params(services.settings.default_max_tokens, services.engine.sampling)
    content = await asyncio.to_thread(body.content_format)
    grammar = text_grammar(content) if content is not None else None
    matcher = await services.matcher(grammar, "format")
    generate = services.generate_request(agent, prompt, params, life=body.agentmem, grammar=matcher)
    return RunningAnswer(services, generate)


async def _ask_on(
    services: Services, body: OllamaGenerateRequest, request: Request
) -> RunningAnswer:
    """Have the prompt answered behind `context`, which no transcript has: no turn is left."""
    before = body.context or []
    vocab_size = services.engine.vocab_size
    if not all(0 <= token < vocab_size for token in before):
        message = f"context: holds what is no token id; the model's are 0 to {vocab_size - 1}"
        raise InvalidRequest(message, param="context")
    agent = agent_of(request, resolve_agent_id(request.headers, agent_id=body.agent_id))
    prompt = await _later_prompt(services, body)
    content = await asyncio.to_thread(body.content_format)
    held = await services.renderer.constraint([], AUTO, content, prompt=prompt)
    matcher = await services.matcher(held.grammar, "format")
    parser = AnswerParser(held.markup, [], in_reasoning=prompt.in_reasoning)
    joined = Prompt([*before, *prompt.tokens])
    params = body.sampling_params(services.settings.default_max_tokens, services.engine.sampling)
    generate = services.generate_request(agent, joined, params, life=body.agentmem, grammar=matcher)
    return RunningAnswer(services, generate, parser)


async def _later_prompt(services: Services, body: OllamaGenerateRequest) -> Prompt:
    """Return the prompt without what a template puts before a chat, if it can be told apart."""
    options = body.template_options
    hello = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hello"}]
    render = services.renderer.prompt
    before = (await render(Chat(hello, options=options, generation_prompt=False))).tokens
    later = await render(Chat([*hello, *body.messages], options=options))
    if later.tokens[: len(before)] == before:
        return replace(later, tokens=later.tokens[len(before) :])
    return await render(Chat(body.messages, options=options))


async def _context(
    services: Services, body: OllamaGenerateRequest, message: dict[str, Any]
) -> list[int] | None:
    """Return the tokens of all that was said, for a later prompt.

    None: they fill the context, or the template takes no such answer.
    """
    chat = Chat([*body.messages, message], options=body.template_options, generation_prompt=False)
    try:
        prompt = await services.renderer.prompt(chat)
    except InvalidRequest:
        return None
    return [*(body.context or ()), *prompt.tokens]


def _loaded(body: OllamaRequest, said: dict[str, Any]) -> Response:
    """Return the answer to a request without a prompt, which loads or unloads a model.

    The model stays in memory either way.
    """
    reason = "unload" if body.unloads else "load"
    return JSONResponse({**_head(body), **said, "done": True, "done_reason": reason})


def _head(body: OllamaRequest) -> dict[str, Any]:
    created = datetime.now(UTC).isoformat().replace("+00:00", "Z")
    return {"model": body.model, "created_at": created}


def _message(content: str, thinking: str, calls: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what an answer to /api/chat, or a piece of it, says."""
    message: dict[str, Any] = {"role": "assistant", "content": content}
    if thinking:
        message["thinking"] = thinking
    if calls:
        message["tool_calls"] = calls
    return {"message": message}


def _response(content: str, thinking: str, calls: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what an answer to /api/generate, or a piece of it, says."""
    return {"response": content} | ({"thinking": thinking} if thinking else {})


class _Answer:
    """An answer in Ollama's shape, whole or in pieces."""

    def __init__(
        self,
        body: OllamaRequest,
        answer: RunningAnswer,
        shape: Callable[[str, str, list[dict[str, Any]]], dict[str, Any]],
        ids: CallIds,
        *,
        began: int,
        context: Callable[[], Coroutine[Any, Any, list[int] | None]] | None = None,
    ):
        """`shape` says a content, a thought and calls; `context` ends an answer to generate.

        `began`: when the request came, in ns of the monotonic clock.
        """
        self.answer = answer
        self._body = body
        self._shape = shape
        self._ids = ids
        self._context = context
        self.logprobs: ContentLogprobs | None = None  # where they are asked for
        self._began = began
        self._asked = time.monotonic_ns()
        self._content = self._thinking = ""
        self._calls: list[dict[str, Any]] = []
        self._rows: list[dict[str, Any]] = []  # of log probabilities

    async def body(self) -> dict[str, Any]:
        """Return the answer when it is whole."""
        pieces = [piece async for piece in self._pieces()]
        said = self._shape(self._content, self._thinking, self._calls)
        return pieces[-1] | said | ({"logprobs": self._rows} if self.logprobs else {})

    async def lines(self) -> AsyncIterator[str]:
        """Yield the answer as it comes. An engine's error becomes its last line."""
        try:
            async for piece in self._pieces():
                yield _line(piece)
        except AgentMemError as e:
            yield _line(ollama_error(e))

    async def _pieces(self) -> AsyncIterator[dict[str, Any]]:
        """Yield what is new; nothing new where nothing was for a while."""
        async for item in self.answer.items():
            if isinstance(item, Content):
                yield await self._say(item)
            elif isinstance(item, TextDelta):
                end = len(self._content) + len(item.text)
                yield await self._say(Content(item.text, end))
            elif isinstance(item, Reasoning):
                self._thinking += item.text
                yield self._piece(thinking=item.text)
            elif isinstance(item, ToolCall):
                yield self._piece(calls=[self._call(item)])
            elif isinstance(item, Ping):
                yield self._piece()
            elif isinstance(item, Finished):
                yield await self._end(item)

    async def _say(self, content: Content) -> dict[str, Any]:
        self._content += content.text
        piece = self._piece(content=content.text)
        if self.logprobs is None:
            return piece
        rows = await self.logprobs.of(content)
        self._rows += rows
        return {**piece, "logprobs": rows}

    def _piece(
        self, *, content: str = "", thinking: str = "", calls: list[dict[str, Any]] | None = None
    ) -> dict[str, Any]:
        said = self._shape(content, thinking, calls or [])
        return {**_head(self._body), **said, "done": False}

    def _call(self, call: ToolCall) -> dict[str, Any]:
        call_id = self._ids.next(call.name, call.arguments)
        self.answer.name_call(call, call_id)
        function = {"index": len(self._calls), "name": call.name, "arguments": call.arguments}
        self._calls.append({"id": call_id, "function": function})
        return self._calls[-1]

    async def _end(self, finished: Finished) -> dict[str, Any]:
        durations = self._durations(finished.stats)
        context = await self._context() if self._context else None
        return {
            **self._piece(),
            "done": True,
            "done_reason": finished.reason,
            **({} if context is None else {"context": context}),
            **durations,
            "agentmem": await self.answer.leave_turn(),
        }

    def _durations(self, stats: RequestStats) -> dict[str, int]:
        """Return tokens, and times in ns. To load is to read from disk what the agent has cached.

        The prompt is counted as a whole, what was cached too.
        """
        now = time.monotonic_ns()
        return {
            "total_duration": now - self._began,
            "load_duration": _ns(stats.restore_ms),
            "prompt_eval_count": stats.prompt_tokens,
            "prompt_eval_duration": _ns(stats.prefill_ms),
            "eval_count": stats.completion_tokens,
            "eval_duration": max(now - self._asked - _ns(stats.ttft_ms), 1),
        }


async def _respond(
    services: Services, request: Request, body: OllamaRequest, answer: _Answer
) -> Response:
    if body.logprobs:
        texts = await services.renderer.token_texts()
        texts.drops_blank &= not answer.answer.request.continues_text
        answer.logprobs = ContentLogprobs(answer.answer, texts)
    if body.stream is False:
        return JSONResponse(await whole(request, answer.body(), answer.answer))
    return await stream(request, answer.lines(), answer.answer, media_type=NDJSON)


def _line(piece: dict[str, Any]) -> str:
    return json.dumps(piece, ensure_ascii=False, separators=(",", ":")) + "\n"


def _ns(milliseconds: float) -> int:
    return round(milliseconds * 1e6)
