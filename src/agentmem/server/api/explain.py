"""GET and POST /v1/agents/{id}/explain: why a prompt was, or would be, cached as far as it is."""

from typing import Any

from fastapi import FastAPI, Request
from pydantic import Field, model_validator

from ...engine.engine import Engine
from ...errors import NotFound
from ...prefix_cache.explain import WORDS
from ...prefix_cache.info import Explanation
from ..answer import Services
from ..auth import agent_of
from .wire import MAX_MESSAGES, ChatMessage, TemplateInput, Text


class ExplainBody(TemplateInput):
    """One of the two: a chat, or a text as it would be rendered."""

    messages: list[ChatMessage] | None = Field(default=None, min_length=1, max_length=MAX_MESSAGES)
    prompt: Text | None = Field(default=None, min_length=1)

    @model_validator(mode="after")
    def _one(self) -> "ExplainBody":
        if (self.messages is None) == (self.prompt is None):
            raise ValueError("give either messages or prompt")
        return self


def add_routes(app: FastAPI, services: Services) -> None:
    engine = services.engine

    @app.get("/v1/agents/{agent_id:path}/explain")
    async def explain_last(agent_id: str, request: Request) -> dict[str, Any]:
        found = await engine.agents.explain(agent_of(request, agent_id), None)
        if found is None:
            raise NotFound(
                f"Agent {agent_id[:200]!r} has had no request since the server was started."
            )
        return _shown(engine, agent_id, found)

    @app.post("/v1/agents/{agent_id:path}/explain")
    async def explain_prompt(agent_id: str, body: ExplainBody, request: Request) -> dict[str, Any]:
        agent = agent_of(request, agent_id)
        if body.messages is not None:
            prompt = await services.prompt(agent, body.chat(body.messages))
        else:
            prompt = await services.text_prompt(agent, body.prompt or "")
        found = await engine.agents.explain(agent, prompt.tokens)
        assert found is not None
        return _shown(engine, agent_id, found)


def _shown(engine: Engine, agent_id: str, found: Explanation) -> dict[str, Any]:
    def side(tokens: list[int]) -> dict[str, Any]:
        return {"text": engine.tokenizer.decode(tokens), "tokens": tokens}

    return {
        "agent_id": agent_id,
        "cause": found.cause,
        "explanation": WORDS[found.cause],
        "prompt_tokens": found.prompt_tokens,
        "cached_tokens": found.cached_tokens,
        "common_tokens": found.common_tokens,
        "branch_tokens": found.branch_tokens,
        "before": side(found.before),
        "cached": side(found.branch),
        "prompt": side(found.prompt),
    }
