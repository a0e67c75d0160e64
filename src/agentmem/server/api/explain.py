"""GET and POST /v1/agents/{id}/explain: why a prompt was, or would be, cached as far as it is, and
no further.
"""

from typing import Any

from fastapi import FastAPI, Request
from pydantic import Field, model_validator

from ...chat.renderer import ChatRenderer
from ...config import Settings
from ...engine.api import EngineAPI, Explanation
from ...errors import NotFound
from ...prefix_cache.explain import WORDS
from ..auth import agent_of
from .chat_completions import days_of
from .wire import MAX_MESSAGES, ChatMessage, TemplateInput, Text, chat_messages


class ExplainBody(TemplateInput):
    """One of the two: a chat, or a text as it would be rendered."""

    messages: list[ChatMessage] | None = Field(default=None, min_length=1, max_length=MAX_MESSAGES)
    prompt: Text | None = Field(default=None, min_length=1)

    @model_validator(mode="after")
    def _one(self) -> "ExplainBody":
        if (self.messages is None) == (self.prompt is None):
            raise ValueError("give either messages or prompt")
        return self


def add_explain_routes(
    app: FastAPI, engine: EngineAPI, renderer: ChatRenderer, settings: Settings
) -> None:
    @app.get("/v1/agents/{agent_id:path}/explain")
    async def explain_last(agent_id: str, request: Request) -> dict[str, Any]:
        found = await engine.explain_agent(agent_of(request, agent_id), None)
        if found is None:
            raise NotFound(
                f"Agent {agent_id[:200]!r} has had no request since the server was started."
            )
        return _shown(engine, agent_id, found)

    @app.post("/v1/agents/{agent_id:path}/explain")
    async def explain_prompt(agent_id: str, body: ExplainBody, request: Request) -> dict[str, Any]:
        agent = agent_of(request, agent_id)
        branches = engine.branch_tokens(agent)
        if body.messages is not None:
            days = days_of(engine, settings, agent)  # a request would be dated so
            tokens = await renderer.render(
                chat_messages(body.messages), branches, **body.given(), days=days
            )
        else:
            tokens = await renderer.text_tokens(body.prompt or "", branches)
        found = await engine.explain_agent(agent, tokens)
        assert found is not None
        return _shown(engine, agent_id, found)


def _shown(engine: EngineAPI, agent_id: str, found: Explanation) -> dict[str, Any]:
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
