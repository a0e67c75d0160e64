"""/v1/agents: what can be done to agents, and with their caches. /v1/store/gc."""

import asyncio
import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import IO, Any

import numpy as np
from fastapi import FastAPI, Request
from pydantic import Field, model_validator
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from ...agent_key import AgentKey, check_agent_id
from ...chat.messages import SYSTEM_ROLES, Chat
from ...engine.agents.export import Export
from ...engine.api import SamplingParams
from ...errors import AgentNotFound, InvalidRequest, StoreFailed
from ...prefix_cache.info import AgentDetail
from ...transcripts.conversation import inherited, system
from ...transcripts.turns import Turn, TurnTree
from ..answer import Services
from ..auth import agent_of, namespace_of
from ..prefill import prefill, respond
from .wire import ChatMessage, TemplateInput, Text, Wire

IMPORT_PATH = "/v1/agents/import"  # its body is a file: read as it comes
_NEVER_CACHED = 4  # tokens: the last of an answer, and what closes its message


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
        agents = engine.agents.infos(namespace_of(request))
        return {"object": "list", "data": [asdict(agent) for agent in agents]}

    @app.post(IMPORT_PATH)
    async def import_agent(request: Request, agent_id: str | None = None) -> dict[str, Any]:
        """Import the archive in the body.

        `agent_id`, in the query, is the agent's new name, by default the one it had.
        """
        name = None if agent_id is None else check_agent_id(agent_id)
        try:
            # it has no name: nothing is left of it
            with tempfile.TemporaryFile(dir=services.settings.home_dir) as file:
                await _receive(request, file, engine.archives.room_bytes)
                return _shown(await engine.archives.import_(namespace_of(request), name, file))
        except OSError as e:
            raise StoreFailed(f"The archive could not be put on disk: {e.strerror}.") from e

    @app.get("/v1/agents/{agent_id:path}")
    async def show_agent(agent_id: str, request: Request) -> dict[str, Any]:
        return _shown(await engine.agents.show(agent_of(request, agent_id)))

    @app.delete("/v1/agents/{agent_id:path}")
    async def delete_agent(agent_id: str, request: Request) -> dict[str, Any]:
        if not await engine.agents.delete(agent_of(request, agent_id)):
            raise AgentNotFound(agent_id)
        return {"agent_id": agent_id, "deleted": True}

    _add_memory_routes(app, services)
    _add_copy_routes(app, services)

    @app.post("/v1/store/gc")
    async def collect_garbage() -> dict[str, Any]:
        return {"freed_bytes": await engine.agents.collect_garbage()}


def _add_memory_routes(app: FastAPI, services: Services) -> None:
    """Add what says where an agent's cache is, and for how long."""
    engine = services.engine

    @app.post("/v1/agents/{agent_id:path}/pin")
    async def pin_agent(agent_id: str, request: Request) -> dict[str, Any]:
        await engine.agents.pin(agent_of(request, agent_id), True)
        return {"agent_id": agent_id, "pinned": True}

    @app.post("/v1/agents/{agent_id:path}/unpin")
    async def unpin_agent(agent_id: str, request: Request) -> dict[str, Any]:
        await engine.agents.pin(agent_of(request, agent_id), False)
        return {"agent_id": agent_id, "pinned": False}

    @app.post("/v1/agents/{agent_id:path}/ttl")
    async def set_ttl(agent_id: str, body: TTLBody, request: Request) -> dict[str, Any]:
        await engine.agents.set_ttl(agent_of(request, agent_id), body.seconds)
        return {"agent_id": agent_id, "ttl": body.seconds}

    @app.post("/v1/agents/{agent_id:path}/evict")
    async def evict_agent(agent_id: str, request: Request) -> dict[str, Any]:
        return {
            "agent_id": agent_id,
            "freed_bytes": await engine.agents.evict(agent_of(request, agent_id)),
        }

    @app.post("/v1/agents/{agent_id:path}/prefetch")
    async def prefetch_agent(agent_id: str, request: Request) -> dict[str, Any]:
        restored = await engine.agents.prefetch(agent_of(request, agent_id))
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
        forked = await engine.forks.fork(agent_of(request, agent_id), to, body.tokens)
        if body.tokens is None:
            await services.transcripts.copy(agent_of(request, agent_id), to)
        return _shown(forked)

    @app.post("/v1/agents/{agent_id:path}/truncate")
    async def truncate_agent(agent_id: str, body: TruncateBody, request: Request) -> dict[str, Any]:
        """Keep the beginning of what the agent holds, and of its transcript what is within it."""
        agent = agent_of(request, agent_id)
        keep = body.tokens
        held = None
        if keep is None:
            assert body.messages is not None
            tokens = await engine.agents.tokens(agent)
            held = len(tokens)
            keep = await _messages_end(services, agent, tokens, body.messages)
        branches = engine.branch_tokens(agent)
        cut = await engine.forks.truncate(agent, keep, held)
        await _cut_transcript(services, agent, keep, branches)
        return _shown(cut)

    @app.post("/v1/agents/{agent_id:path}/export", response_class=Response)
    async def export_agent(agent_id: str, request: Request) -> Response:
        """Send the agent as one file, see store/files/archive.py."""
        return _Archive(await engine.archives.export(agent_of(request, agent_id)))


class _Archive(StreamingResponse):
    """An agent on its way out. Whatever ends that, the files that it is read from are let go."""

    def __init__(self, export: Export):
        headers = {"content-disposition": 'attachment; filename="agent.agentmem"'}
        super().__init__(export.chunks, media_type="application/x-tar", headers=headers)
        self._export = export

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await asyncio.to_thread(self._export.close)


async def _messages_end(services: Services, agent: AgentKey, tokens: list[int], keep: int) -> int:
    """Return where the first `keep` messages that were sent end, in tokens."""
    starts = await services.renderer.message_starts(tokens)
    if len(starts) > 1 and await _begins_with_templates_own(services, agent, tokens[: starts[1]]):
        del starts[1]  # what the template put in goes with the first message
    if keep > len(starts):
        message = f"messages must be 1 to {len(starts)}: that is how many the cache holds."
        raise InvalidRequest(message, param="messages")
    return len(tokens) if keep == len(starts) else starts[keep]


async def _begins_with_templates_own(services: Services, agent: AgentKey, first: list[int]) -> bool:
    """Return whether the first message in the cache is one that nobody sent.

    The template puts it in where a chat has no system message, so it begins a chat of one word too.
    """
    tree = await services.transcripts.tree(agent)
    said = tree.messages(tree.newest)
    if inherited(tree, tree.newest, "instructions") or (said and said[0]["role"] in SYSTEM_ROLES):
        return False
    tools = inherited(tree, tree.newest, "tools")
    word = Chat([{"role": "user", "content": "1"}], tools=tools or (), generation_prompt=False)
    prompt = await services.prompt(agent, word, [np.array(first)])
    starts = await services.renderer.message_starts(prompt.tokens)
    return len(starts) > 1 and prompt.tokens[: starts[1]] == first


async def _cut_transcript(
    services: Services, agent: AgentKey, num_tokens: int, branches: Sequence[np.ndarray]
) -> None:
    """Forget the last turns of the newest path, as far as they are not within `num_tokens`.

    What follows them on other paths keeps its messages. `branches`: the agent's, from before its
    cache was cut to its first `num_tokens`.
    """
    tree = await services.transcripts.tree(agent)
    async with tree.appending:
        path = tree.path(tree.newest)
        fits = 0  # turns
        too_many = len(path) + 1
        while too_many - fits > 1:
            middle = (fits + too_many) // 2
            length = await _length(services, agent, tree, path[middle - 1], branches)
            if length <= num_tokens + _NEVER_CACHED:
                fits = middle
            else:
                too_many = middle
        await services.transcripts.cut(tree, path[fits:])


async def _length(
    services: Services,
    agent: AgentKey,
    tree: TurnTree,
    turn: Turn,
    branches: Sequence[np.ndarray],
) -> float:
    """Return how many tokens all that was said up to the end of a turn takes."""
    messages = [*system(inherited(tree, turn, "instructions")), *tree.messages(turn)]
    if not messages:  # a cut, which marks where a path goes on, and says nothing
        return 0
    tools = inherited(tree, turn, "tools") or ()
    chat = Chat(messages, tools=tools, generation_prompt=False)
    try:
        return len((await services.prompt(agent, chat, branches)).tokens)
    except InvalidRequest:  # too long, for one
        return math.inf


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
