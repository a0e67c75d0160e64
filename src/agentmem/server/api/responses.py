"""/v1/responses: OpenAI's Responses, whose conversations the server keeps as turns of an agent's
transcript.
"""

import time
import uuid
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response

from ...agent_key import AgentKey
from ...chat.answer_parser import AnswerParser, Part
from ...chat.render import render
from ...chat.renderer import ChatRenderer
from ...chat.tools import function_tools
from ...config import Settings
from ...engine.api import EngineAPI, Finished, GenerateRequest, RequestStats, SamplingParams
from ...errors import AgentMemError, ContextLengthExceeded, InvalidRequest, NotFound
from ...transcripts.conversation import Conversation, begin, inherited, is_retried, resume
from ...transcripts.turns import Turn, TurnTree
from ..auth import namespace_of
from ..parts import message_of
from ..sse import Event, Events, EventStream, unless_disconnected
from .chat_completions import FIRST_EVENT_WAIT, PING, PING_INTERVAL, agentmem, check_model, days_of
from .identity import agent_id_of
from .response_events import GrowingResponse
from .responses_wire import ResponsesRequest, flat_tools
from .wire import AgentOptions


class PreviousResponseNotFound(NotFound):
    code = "previous_response_not_found"


def add_response_routes(
    app: FastAPI, engine: EngineAPI, renderer: ChatRenderer, settings: Settings
) -> None:
    @app.post("/v1/responses", response_model=None)
    async def create_response(body: ResponsesRequest, request: Request) -> Response:
        check_model(body.model, engine.model_name)
        conversation = await _conversation(engine, body, request)
        return await _create(_Answer(engine, renderer, body, conversation), settings, request)

    @app.get("/v1/responses/{response_id}", response_model=None)
    async def show_response(response_id: str, request: Request) -> Response:
        # the SDK would find no event, and say nothing
        if request.query_params.get("stream", "false").lower() == "true":
            raise InvalidRequest(
                "stream: a response that is there comes as a whole; leave it out", param="stream"
            )
        _, tree, turn = await _find(engine, namespace_of(request), response_id)
        tools, instructions = (inherited(tree, turn, name) for name in ("tools", "instructions"))
        shown = turn.about["response"] | {
            "tools": flat_tools(tools or []),
            "instructions": instructions,
        }
        return JSONResponse(
            shown
        )  # as it is: FastAPI's encoder would walk through all of it, and fails at less depth

    @app.delete("/v1/responses/{response_id}")
    async def delete_response(response_id: str, request: Request) -> dict[str, Any]:
        namespace = namespace_of(request)
        agent, tree, turn = await _find(engine, namespace, response_id)
        await engine.turns.remove(namespace, agent, tree, [turn])
        return {"id": response_id, "object": "response", "deleted": True}


async def _find(engine: EngineAPI, namespace: str, response_id: str) -> tuple[str, TurnTree, Turn]:
    found = await engine.turns.find(namespace, response_id)
    if found is None or found[2].kind != "response":
        raise NotFound(f"Response with id {response_id[:200]!r} not found.", param="response_id")
    return found


async def _conversation(
    engine: EngineAPI, body: ResponsesRequest, request: Request
) -> Conversation:
    """What goes before the input: the chain that ends in the previous response, or nothing."""
    namespace, options, keep = (
        namespace_of(request),
        body.agentmem or AgentOptions(),
        body.store is not False,
    )
    if body.previous_response_id is not None:
        found = await engine.turns.find(namespace, body.previous_response_id)
        if found is None:
            message = f"Previous response with id {body.previous_response_id[:200]!r} not found."
            raise PreviousResponseNotFound(message, param="previous_response_id")
        agent_id, tree, turn = found
        conversation = Conversation(
            engine.turns, namespace, agent_id, tree, body.messages, turn, resumed=True
        )
    else:
        agent_id = agent_id_of(request, body)
        whose = (engine.turns, namespace, agent_id, body.messages)
        if options.continue_:
            conversation = await resume(*whose, options.turn, retried=is_retried(request))
        else:
            conversation = begin(*whose, keep=keep)
    conversation.keep = keep and not body.prewarm
    conversation.ephemeral, conversation.instructions = bool(options.ephemeral), body.instructions
    conversation.tools = function_tools(body.tools, nested=False)
    return conversation


class _Answer:
    """One request, from its conversation to its response."""

    def __init__(
        self,
        engine: EngineAPI,
        renderer: ChatRenderer,
        body: ResponsesRequest,
        conversation: Conversation,
    ):
        self.engine, self.renderer, self.body, self.conversation = (
            engine,
            renderer,
            body,
            conversation,
        )
        self.growing = GrowingResponse(_head(body, engine.model_name, conversation))
        self.parts: list[Part] = []

    async def generate_request(self, settings: Settings) -> GenerateRequest:
        said, body = self.conversation, self.body
        agent = AgentKey(said.namespace, said.agent_id)
        branches = self.engine.branch_tokens(agent)
        days = days_of(self.engine, settings, agent)
        try:
            tokens = await render(
                self.renderer, said.messages, branches, tools=said.tools, days=days
            )
        except InvalidRequest as e:
            e.param = "input" if e.param == "messages" else e.param  # what Responses call them
            raise
        max_tokens = min(
            body.max_output_tokens or settings.default_max_tokens,
            self.engine.max_context - len(tokens),
        )
        sampling = {k: v for k in ("temperature", "top_p") if (v := getattr(body, k)) is not None}
        params = SamplingParams(max_tokens=0 if body.prewarm else max_tokens, **sampling)
        options = body.agentmem or AgentOptions()
        return GenerateRequest(
            agent,
            tokens,
            params,
            ttl=options.ttl,
            ephemeral=options.ephemeral,
            checkpoint=await self.renderer.before_answer(tokens),
        )

    async def parser(self, tokens: list[int]) -> AnswerParser:
        return AnswerParser(
            self.renderer.markup,
            [] if self.body.tool_choice == "none" else self.conversation.tools,
            in_reasoning=await self.renderer.ends_in_reasoning(tokens),
            max_calls=1 if self.body.parallel_tool_calls is False else 0,
        )

    async def reasoning_tokens(self) -> int:
        text = message_of(self.parts).get("reasoning_content")
        return len(await self.renderer.text_tokens(text)) if text else 0

    async def end(self, event: Finished) -> None:
        """Leave a turn, and say what the answer cost."""
        said, response = self.conversation, self.growing.body
        kept = {
            name: value for name, value in response.items() if name not in ("tools", "instructions")
        }
        kept["agentmem"] = agentmem(said.agent_id, event.stats, response["id"])
        turn = await said.finish(
            "response", [message_of(self.parts)], response["id"], response=kept
        )
        response["agentmem"] = agentmem(said.agent_id, event.stats, turn)


async def _create(answer: _Answer, settings: Settings, request: Request) -> Response:
    try:
        generate = await answer.generate_request(settings)
    except ContextLengthExceeded as e:
        if not answer.body.stream:
            raise
        return EventStream(_refused(answer, e), Events(_nothing()))  # Codex reads it there
    parser = await answer.parser(generate.tokens)
    events = Events(answer.engine.generate(generate))
    async with AsyncExitStack() as closing:
        closing.push_async_callback(events.aclose)
        if not answer.body.stream:
            return JSONResponse(await unless_disconnected(request, _whole(answer, parser, events)))
        first = await unless_disconnected(request, events.next(FIRST_EVENT_WAIT))
        closing.pop_all()  # from here on the response closes it
    return EventStream(_stream(answer, parser, events, first), events)


async def _whole(answer: _Answer, parser: AnswerParser, events: Events) -> dict[str, Any]:
    async for _ in _grow(answer, parser, events, await events.next()):
        pass
    return answer.growing.body


async def _stream(
    answer: _Answer, parser: AnswerParser, events: Events, event: Event | None
) -> AsyncIterator[str]:
    for line in answer.growing.begin():
        yield line
    try:
        async for line in _grow(answer, parser, events, event):
            yield line
    except AgentMemError as e:
        yield answer.growing.fail(e)
        return
    yield answer.growing.end()


async def _grow(
    answer: _Answer, parser: AnswerParser, events: Events, event: Event | None
) -> AsyncIterator[str]:
    """From the first event (None: none yet) to the turn that is left."""
    said = time.monotonic()
    while not isinstance(event, Finished):
        fresh = parser.feed(event.text) if event is not None else []
        answer.parts += fresh
        for part in fresh:
            for line in answer.growing.add(part):
                said = time.monotonic()
                yield line
        if time.monotonic() - said > PING_INTERVAL:
            said = time.monotonic()
            yield PING
        event = await events.next(PING_INTERVAL)
    cut = event.reason == "length" and not answer.body.prewarm
    answer.parts += (rest := parser.finish(cut=cut))
    for part in rest:
        for line in answer.growing.add(part):
            yield line
    for line in answer.growing.finish(
        cut=cut, usage=_usage(event.stats, await answer.reasoning_tokens())
    ):
        yield line
    await answer.end(event)


async def _refused(answer: _Answer, error: AgentMemError) -> AsyncIterator[str]:
    for line in answer.growing.begin():
        yield line
    yield answer.growing.fail(error)


async def _nothing() -> AsyncIterator[Event]:
    return
    yield


def _head(body: ResponsesRequest, model: str, conversation: Conversation) -> dict[str, Any]:
    parent = conversation.parent
    return {
        "id": f"resp_{uuid.uuid4().hex}",
        "object": "response",
        "created_at": time.time(),
        "completed_at": None,
        "model": model,
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": body.previous_response_id or (parent.id if parent else None),
        "prompt_cache_key": body.prompt_cache_key,
        "reasoning": {"effort": None, "summary": None},
        "safety_identifier": body.safety_identifier,
        "store": body.store is not False,
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "text": {"format": {"type": "text"}},
        "tool_choice": body.tool_choice or "auto",
        "tools": flat_tools(conversation.tools),
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "truncation": "disabled",
        "user": body.user,
    }


def _usage(stats: RequestStats, reasoning_tokens: int) -> dict[str, Any]:
    cached = stats.cached_tokens
    return {
        "input_tokens": stats.prompt_tokens,
        "input_tokens_details": {
            "cached_tokens": cached,
            "cache_write_tokens": stats.prompt_tokens - cached,
        },
        "output_tokens": stats.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": reasoning_tokens},
        "total_tokens": stats.prompt_tokens + stats.completion_tokens,
    }
