"""POST /tokenize and /detokenize: texts and chats to token ids and back, as vLLM has them.

They look at no agent and leave nothing. A chat's tokens are those of its prompt where nothing is
cached.
"""

from dataclasses import replace
from typing import Annotated, Any

from fastapi import FastAPI
from pydantic import Field, model_validator

from ...errors import InvalidRequest
from ..answer import Services
from .scalars import Flag
from .wire import MAX_MESSAGES, ChatEnd, ChatMessage, TemplateInput, Text, Wire

_CHARACTERS_PER_TOKEN = 16  # more than any language has: a longer text is no prompt


class TokenizeRequest(TemplateInput, ChatEnd):
    """The body of POST /tokenize: a text, or a chat."""

    model: Text | None = None
    prompt: Text | None = None
    messages: list[ChatMessage] | None = Field(default=None, min_length=1, max_length=MAX_MESSAGES)
    # None: for a text alone, since templates write them themselves
    add_special_tokens: Flag | None = None
    return_token_strs: Flag | None = None

    @model_validator(mode="after")
    def _one(self) -> "TokenizeRequest":
        if (self.messages is None) == (self.prompt is None):
            raise ValueError("give either prompt or messages")
        return self


class DetokenizeRequest(Wire):
    """The body of POST /detokenize."""

    model: Text | None = None
    tokens: list[Annotated[int, Field(ge=0)]]


def add_routes(app: FastAPI, services: Services) -> None:
    engine = services.engine

    @app.post("/tokenize")
    @app.post("/v1/tokenize")
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        services.check_model(body.model)
        tokens = await _tokens(services, body)
        strs = await services.renderer.token_names(tokens) if body.return_token_strs else None
        return {
            "count": len(tokens),
            "max_model_len": engine.max_context,
            "tokens": tokens,
            "token_strs": strs,
        }

    @app.post("/detokenize")
    @app.post("/v1/detokenize")
    async def detokenize(body: DetokenizeRequest) -> dict[str, str]:
        services.check_model(body.model)
        services.check_tokens(body.tokens, "tokens")
        if len(body.tokens) > engine.max_context:
            message = (
                f"tokens: may be {engine.max_context:,} at most, which is what the context holds"
            )
            raise InvalidRequest(message, param="tokens")
        return {"prompt": await services.renderer.decode(body.tokens)}


def _check_length(services: Services, text: str) -> None:
    """Raise InvalidRequest where a text is so long that its tokens keep others waiting."""
    most = _CHARACTERS_PER_TOKEN * services.engine.max_context
    if len(text) > most:
        message = f"prompt: has {len(text):,} characters; the most is {most:,}"
        raise InvalidRequest(message, param="prompt")


async def _tokens(services: Services, body: TokenizeRequest) -> list[int]:
    renderer = services.renderer
    if body.messages is None:
        _check_length(services, body.prompt or "")
        begins = body.add_special_tokens is not False
        return await renderer.text_tokens(body.prompt or "", begins=begins)
    said = body.chat(body.messages)
    body.check_end(said.messages)
    chat = replace(
        said,
        generation_prompt=body.add_generation_prompt is not False,
        continues=bool(body.continue_final_message),
    )
    prompt = await renderer.prompt(chat)
    before = await renderer.text_tokens("", begins=True) if body.add_special_tokens else []
    return [*before, *prompt.tokens]
