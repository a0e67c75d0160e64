"""/v1/responses: OpenAI's Responses.

The server keeps their conversations, as turns of an agent's transcript.
"""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response

from ...chat.answer_parser import Content, Reasoning
from ...chat.messages import ToolCall
from ...engine.api import Finished, RequestStats, SamplingParams
from ...errors import AgentMemError, ContextLengthExceeded, InvalidRequest, NotFound
from ...transcripts.conversation import Conversation, inherited
from ...transcripts.turns import Turn, TurnTree
from ..answer import Ping, RunningAnswer, Services, ask, converse
from ..auth import namespace_of
from ..sse import PING, stream, whole
from .identity import agent_id_of
from .logprobs import ContentLogprobs
from .response_events import GrowingResponse, place_of
from .response_items import is_reference
from .response_tools import flat_tools
from .responses_wire import ResponsesRequest
from .scalars import chosen
from .structured import tool_choice


class PreviousResponseNotFound(NotFound):
    code = "previous_response_not_found"


def add_routes(app: FastAPI, services: Services) -> None:
    @app.post("/v1/responses", response_model=None)
    async def create_response(body: ResponsesRequest, request: Request) -> Response:
        services.check_model(body.model)
        if isinstance(body.input, list):
            body.input = await _resolved(services, request, body.input)
        offered = body.offered_tools
        conversation = await _conversation(services, body, request)
        conversation.tools = offered.functions
        head = _head(body, services.engine.model_name, conversation)
        growing = GrowingResponse(head, offered)
        try:
            answer = await _ask(services, body, conversation)
        except ContextLengthExceeded as e:
            if not body.stream:
                raise
            return await stream(request, _refused(growing, e))  # Codex reads it there
        response = _Response(services, body, answer, growing)
        if body.num_logprobs is not None:
            texts = await services.renderer.token_texts()
            response.logprobs = ContentLogprobs(answer, texts)
        if body.stream:
            return await stream(request, response.events(), answer)
        return JSONResponse(await whole(request, response.body(), answer))

    @app.get("/v1/responses/{response_id}", response_model=None)
    async def show_response(response_id: str, request: Request) -> Response:
        # the SDK would find no event, and say nothing
        if request.query_params.get("stream", "false").lower() == "true":
            raise InvalidRequest(
                "stream: a response that is there comes as a whole; leave it out", param="stream"
            )
        tree, turn = await _find(services, request, response_id)
        shown = turn.about["response"] | {
            "tools": flat_tools(inherited(tree, turn, "tools") or []),
            "instructions": inherited(tree, turn, "instructions"),
        }
        # as it is: FastAPI's encoder would walk through all of it, and fails at less depth
        return JSONResponse(shown)

    @app.delete("/v1/responses/{response_id}")
    async def delete_response(response_id: str, request: Request) -> dict[str, Any]:
        tree, turn = await _find(services, request, response_id)
        await services.transcripts.remove(tree, [turn])
        return {"id": response_id, "object": "response", "deleted": True}


async def _find(services: Services, request: Request, response_id: str) -> tuple[TurnTree, Turn]:
    found = await services.transcripts.find(namespace_of(request), response_id)
    if found is None or found[1].kind != "response":
        raise NotFound(f"Response with id {response_id[:200]!r} not found.", param="response_id")
    return found


async def _resolved(
    services: Services, request: Request, items: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Return items with what they refer to in place of references, where it is stored."""
    places = {i: place_of(item.get("id")) for i, item in enumerate(items) if is_reference(item)}
    outputs: dict[str, list[dict[str, Any]]] = {}
    resolved = list(items)
    for i, place in places.items():
        if place is None:
            continue
        response_id, index = place
        if response_id not in outputs:
            found = await services.transcripts.find(namespace_of(request), response_id)
            about = found[1].about if found else {}
            outputs[response_id] = about.get("response", {}).get("output", [])
        if index < len(outputs[response_id]):
            resolved[i] = outputs[response_id][index]
    return resolved


async def _conversation(
    services: Services, body: ResponsesRequest, request: Request
) -> Conversation:
    """Return what goes before the input: the chain to the previous response, or nothing."""
    keep = body.store is not False and not body.prewarm
    if body.previous_response_id is not None:
        conversation = await _after_previous(services, body, request)
    else:
        agent_id = agent_id_of(request, body)
        conversation = await converse(
            services, request, agent_id, body.messages, body.agentmem, keep=body.store is not False
        )
    conversation.keep = keep
    conversation.instructions = body.instructions
    return conversation


async def _after_previous(
    services: Services, body: ResponsesRequest, request: Request
) -> Conversation:
    assert body.previous_response_id is not None
    found = await services.transcripts.find(namespace_of(request), body.previous_response_id)
    if found is None:
        message = f"Previous response with id {body.previous_response_id[:200]!r} not found."
        raise PreviousResponseNotFound(message, param="previous_response_id")
    tree, turn = found
    return Conversation(
        services.transcripts,
        tree.agent,
        tree,
        body.messages,
        parent=turn,
        resumed=True,
        ephemeral=bool(body.agentmem and body.agentmem.ephemeral),
    )


async def _ask(
    services: Services, body: ResponsesRequest, conversation: Conversation
) -> RunningAnswer:
    max_tokens = body.max_output_tokens
    if max_tokens is None:
        max_tokens = services.settings.default_max_tokens
    params = SamplingParams(
        max_tokens=0 if body.prewarm else max_tokens,
        logprobs=body.num_logprobs,
        **chosen(services.engine.sampling, temperature=body.temperature, top_p=body.top_p),
    )
    try:
        return await ask(
            services,
            conversation,
            params,
            tool_choice=tool_choice(
                body.tool_choice, body.tools, parallel=body.parallel_tool_calls
            ),
            content=await asyncio.to_thread(body.content_format),
            life=body.agentmem,
        )
    except InvalidRequest as e:
        # what Responses call them
        e.param = "input" if (e.param or "").startswith("messages") else e.param
        raise


class _Response:
    """An answer in the shape of Responses, whole or as events."""

    def __init__(
        self,
        services: Services,
        body: ResponsesRequest,
        answer: RunningAnswer,
        growing: GrowingResponse,
    ):
        self._services = services
        self._prewarm = body.prewarm
        self._answer = answer
        self._growing = growing
        self.logprobs: ContentLogprobs | None = None  # where they are asked for

    async def body(self) -> dict[str, Any]:
        """Return the response, when it is whole."""
        async for _ in self._grow():
            pass
        return self._growing.body

    async def events(self) -> AsyncIterator[str]:
        """Yield the response as it grows. An engine's error becomes its last event."""
        for line in self._growing.begin():
            yield line
        try:
            async for line in self._grow():
                yield line
        except AgentMemError as e:
            yield self._growing.fail(e)
            return
        yield self._growing.end()

    async def _grow(self) -> AsyncIterator[str]:
        """Yield events up to the turn that is left."""
        async for item in self._answer.items():
            if isinstance(item, Ping):
                yield PING
            elif isinstance(item, Content | Reasoning | ToolCall):
                rows = []
                if self.logprobs is not None and isinstance(item, Content):
                    rows = await self.logprobs.of(item)
                for line in self._growing.add(item, rows):
                    yield line
            elif isinstance(item, Finished):
                cut = item.reason == "length" and not self._prewarm
                usage = _usage(item.stats, await self._reasoning_tokens())
                for line in self._growing.finish(cut=cut, usage=usage):
                    yield line
                await self._leave_turn()

    async def _reasoning_tokens(self) -> int:
        text = self._answer.message.get("reasoning_content")
        return len(await self._services.renderer.text_tokens(text)) if text else 0

    async def _leave_turn(self) -> None:
        """Leave a turn that holds the response, but for what its conversation tells."""
        response = self._growing.body
        about = ("tools", "instructions")
        kept = {name: value for name, value in response.items() if name not in about}
        kept["agentmem"] = self._answer.cost(response["id"])
        response["agentmem"] = await self._answer.leave_turn(
            "response", response["id"], response=kept
        )


async def _refused(growing: GrowingResponse, error: AgentMemError) -> AsyncIterator[str]:
    for line in growing.begin():
        yield line
    yield growing.fail(error)


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
        "text": {"format": body.echoed_format},
        "tool_choice": body.tool_choice or "auto",
        "tools": flat_tools(conversation.tools),
        "top_logprobs": body.top_logprobs or 0,
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
