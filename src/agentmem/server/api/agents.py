"""/v1/agents: what can be done to agents, and with their caches. /v1/store/gc."""

import asyncio
import os
import tempfile
from dataclasses import asdict
from functools import partial
from typing import IO, Any

from fastapi import FastAPI, Request
from pydantic import Field, model_validator
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from ...agent_key import check_agent_id
from ...chat.renderer import ChatRenderer
from ...engine.api import AgentDetail, Export, SamplingParams
from ...errors import AgentNotFound, InvalidRequest, StoreFailed
from ...transcripts.fork import copy_transcript, cut_transcript
from ..answer import Services
from ..auth import agent_of, namespace_of
from ..prefill import prefill, respond
from .wire import ChatMessage, TemplateInput, Text, Wire

IMPORT_PATH = "/v1/agents/import"  # its body is a file: read as it comes


class ForkBody(Wire):
    to: Text  # the new agent's id
    tokens: int | None = None  # how many of the first; null: all


class TruncateBody(Wire):
    """One of the two: how many tokens, or how many messages, to keep."""

    tokens: int | None = Field(default=None, ge=1)
    messages: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _one(self) -> "TruncateBody":
        if (self.tokens is None) == (self.messages is None):
            raise ValueError("give either tokens or messages")
        return self


class TTLBody(Wire):
    seconds: float | None = Field(gt=0, allow_inf_nan=False)  # after the last use; null: for good


class PrewarmBody(TemplateInput):
    messages: list[ChatMessage] = Field(min_length=1)
    stream: bool | None = None  # how far it is, see prefill.py


def add_routes(app: FastAPI, services: Services) -> None:
    engine = services.engine

    @app.get("/v1/agents")
    async def list_agents(request: Request) -> dict[str, Any]:
        agents = await engine.agents(namespace_of(request))
        return {"object": "list", "data": [asdict(agent) for agent in agents]}

    @app.post(IMPORT_PATH)
    async def import_agent(request: Request, agent_id: str | None = None) -> dict[str, Any]:
        """The body is an archive; `agent_id` (in the query) its new name, by default the one it
        had.
        """
        name = None if agent_id is None else check_agent_id(agent_id)
        try:
            with tempfile.TemporaryFile(
                dir=services.settings.home_dir
            ) as file:  # it has no name: nothing is left of it
                await _receive(request, file, engine.import_limit)
                return _shown(await engine.import_agent(namespace_of(request), name, file))
        except OSError as e:
            raise StoreFailed(f"The archive could not be put on disk: {e.strerror}.") from e

    @app.get("/v1/agents/{agent_id:path}")
    async def show_agent(agent_id: str, request: Request) -> dict[str, Any]:
        return _shown(await engine.agent(agent_of(request, agent_id)))

    @app.delete("/v1/agents/{agent_id:path}")
    async def delete_agent(agent_id: str, request: Request) -> dict[str, Any]:
        if not await engine.delete_agent(agent_of(request, agent_id)):
            raise AgentNotFound(agent_id)
        return {"agent_id": agent_id, "deleted": True}

    _add_memory_routes(app, services)
    _add_copy_routes(app, services)

    @app.post("/v1/store/gc")
    async def collect_garbage() -> dict[str, Any]:
        return {"freed_bytes": await engine.collect_garbage()}


def _add_memory_routes(app: FastAPI, services: Services) -> None:
    """Add what says where an agent's cache is, and for how long."""
    engine = services.engine

    @app.post("/v1/agents/{agent_id:path}/pin")
    async def pin_agent(agent_id: str, request: Request) -> dict[str, Any]:
        await engine.pin_agent(agent_of(request, agent_id), True)
        return {"agent_id": agent_id, "pinned": True}

    @app.post("/v1/agents/{agent_id:path}/unpin")
    async def unpin_agent(agent_id: str, request: Request) -> dict[str, Any]:
        await engine.pin_agent(agent_of(request, agent_id), False)
        return {"agent_id": agent_id, "pinned": False}

    @app.post("/v1/agents/{agent_id:path}/ttl")
    async def set_ttl(agent_id: str, body: TTLBody, request: Request) -> dict[str, Any]:
        await engine.set_agent_ttl(agent_of(request, agent_id), body.seconds)
        return {"agent_id": agent_id, "ttl": body.seconds}

    @app.post("/v1/agents/{agent_id:path}/evict")
    async def evict_agent(agent_id: str, request: Request) -> dict[str, Any]:
        return {
            "agent_id": agent_id,
            "freed_bytes": await engine.evict_agent(agent_of(request, agent_id)),
        }

    @app.post("/v1/agents/{agent_id:path}/prefetch")
    async def prefetch_agent(agent_id: str, request: Request) -> dict[str, Any]:
        restored = await engine.prefetch_agent(agent_of(request, agent_id))
        if restored is None:
            raise AgentNotFound(agent_id)
        return {"agent_id": agent_id, "restored_bytes": restored}

    @app.post("/v1/agents/{agent_id:path}/prewarm", response_model=None)
    async def prewarm_agent(agent_id: str, body: PrewarmBody, request: Request) -> Response:
        """Prefill these messages as a request would, and answer nothing."""
        agent = agent_of(request, check_agent_id(agent_id))
        prompt = await services.prompt(agent, body.chat(body.messages))
        generate = services.generate_request(agent, prompt, SamplingParams(max_tokens=0))
        work = partial(prefill, engine, generate)
        return await respond(request, work, stream=bool(body.stream))


def _add_copy_routes(app: FastAPI, services: Services) -> None:
    """Add what is done with what an agent holds: it is forked, cut, taken away."""
    engine = services.engine

    @app.post("/v1/agents/{agent_id:path}/fork")
    async def fork_agent(agent_id: str, body: ForkBody, request: Request) -> dict[str, Any]:
        to = check_agent_id(body.to, "to")
        forked = await engine.fork_agent(agent_of(request, agent_id), to, body.tokens)
        if body.tokens is None:
            await copy_transcript(services.transcripts, agent_of(request, agent_id), to)
        return _shown(forked)

    @app.post("/v1/agents/{agent_id:path}/truncate")
    async def truncate_agent(agent_id: str, body: TruncateBody, request: Request) -> dict[str, Any]:
        agent, keep, held = agent_of(request, agent_id), body.tokens, None
        if keep is None:
            assert body.messages is not None
            tokens = await engine.agent_tokens(agent)
            keep, held = await _messages_end(services.renderer, tokens, body.messages), len(tokens)
        branches = engine.branch_tokens(agent)
        cut = await engine.truncate_agent(agent, keep, held)
        await cut_transcript(services.transcripts, services.renderer, agent, keep, branches)
        return _shown(cut)

    @app.post("/v1/agents/{agent_id:path}/export", response_class=Response)
    async def export_agent(agent_id: str, request: Request) -> Response:
        """The agent in one file, see store/files/archive.py."""
        return _Archive(await engine.export_agent(agent_of(request, agent_id)))


class _Archive(StreamingResponse):
    """Whatever ends the response, the files that it reads from are let go."""

    def __init__(self, export: Export):
        headers = {"content-disposition": 'attachment; filename="agent.agentmem"'}
        super().__init__(export.chunks, media_type="application/x-tar", headers=headers)
        self._export = export

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await asyncio.to_thread(self._export.close)


async def _messages_end(renderer: ChatRenderer, tokens: list[int], keep: int) -> int:
    """Where the first `keep` messages end, in tokens."""
    starts = await renderer.message_starts(tokens)
    if keep > len(starts):
        message = f"messages must be 1 to {len(starts)}: that is how many the cache holds."
        raise InvalidRequest(message, param="messages")
    return len(tokens) if keep == len(starts) else starts[keep]


async def _receive(request: Request, file: IO[bytes], limit: int) -> None:
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limit:
            message = f"The archive is larger than the {limit:,} bytes that the store has room for."
            raise InvalidRequest(message, param="file", code="request_too_large")
        await asyncio.to_thread(file.write, chunk)
    if not size:
        raise InvalidRequest("The body is empty; send the file that export gave.", param="file")
    file.seek(0, os.SEEK_SET)


def _shown(detail: AgentDetail) -> dict[str, Any]:
    return {
        "object": "agent",
        **asdict(detail.agent),
        "branches": [asdict(branch) for branch in detail.branches],
    }
