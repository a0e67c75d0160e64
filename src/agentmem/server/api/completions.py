"""POST /v1/completions: OpenAI's completions, of prompts that are plain text or token ids."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated, Any

from fastapi import FastAPI, Request
from llguidance import LLMatcher
from pydantic import BeforeValidator, Field, ValidationInfo, WithJsonSchema, field_validator
from pydantic_core import PydanticCustomError
from starlette.responses import JSONResponse, Response

from ...agent_key import AgentKey
from ...chat.grammar import text_grammar
from ...chat.messages import check_encodable
from ...chat.renderer import Prompt
from ...chat.token_texts import TokenTexts
from ...engine.api import Finished, TextDelta, TokenLogprob
from ...errors import AgentMemError, ContextLengthExceeded, InvalidRequest
from ..answer import Ping, RunningAnswer, Services
from ..auth import agent_of
from ..errors import openai_error
from ..sse import DONE, PING, event_lines, merge, stream, whole
from .identity import agent_id_of
from .logprobs import LEAST
from .scalars import Flag, MaxTokens, Whole
from .structured import content_format
from .usage import StreamUsage, usage
from .wire import AgentLife, CompletionInput, Only, StreamOptions

_MAX_TOKENS = 16  # by default, as OpenAI has it
_MAX_PROMPTS = 2048
_PROMPT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}},
        {"type": "array", "items": {"type": "integer"}},
        {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}},
    ]
}


def _is_ids(prompt: Any) -> bool:
    return isinstance(prompt, list) and bool(prompt) and all(type(token) is int for token in prompt)


def _prompts(prompt: Any) -> list[str | list[int]]:
    """Return the prompts of a request as a list."""
    prompts = [prompt] if isinstance(prompt, str) or _is_ids(prompt) else prompt
    if not isinstance(prompts, list) or not 1 <= len(prompts) <= _MAX_PROMPTS:
        raise ValueError(f"must be a text or a list of token ids, or 1 to {_MAX_PROMPTS} of them")
    if not (all(isinstance(one, str) for one in prompts) or all(map(_is_ids, prompts))):
        raise ValueError("must hold texts, or lists of token ids, none of them empty")
    for one in prompts:
        if isinstance(one, str):
            check_encodable(one, "prompt")
    return prompts


class CompletionRequest(CompletionInput):
    """The body of POST /v1/completions. Null means the default everywhere."""

    prompt: Annotated[Any, BeforeValidator(_prompts), WithJsonSchema(_PROMPT_SCHEMA)]
    agentmem: AgentLife | None = None
    max_tokens: MaxTokens | None = None
    echo: Flag | None = None
    logprobs: Annotated[Whole, Field(ge=0, le=5)] | None = None

    best_of: Whole | None = None

    # would promise something that isn't there
    suffix: Annotated[Any, Only()] = None

    @field_validator("best_of")
    @classmethod
    def _all_are_told(cls, best_of: int | None, info: ValidationInfo) -> int | None:
        if best_of is not None and best_of != (info.data.get("n") or 1):
            message = "more answers than are told are not supported by this server; leave it out"
            raise PydanticCustomError("unsupported_parameter", message)
        return best_of

    @field_validator("prompt")
    @classmethod
    def _not_too_many(cls, prompts: Any, info: ValidationInfo) -> Any:
        if len(prompts) * (info.data.get("n") or 1) > _MAX_PROMPTS:
            raise ValueError(f"may have {_MAX_PROMPTS} answers at most, n for each prompt")
        return prompts


def add_routes(app: FastAPI, services: Services) -> None:
    @app.post("/v1/completions", response_model=None)
    async def create_completion(body: CompletionRequest, request: Request) -> Response:
        services.check_model(body.model)
        agent = agent_of(request, agent_id_of(request, body))
        content = await asyncio.to_thread(content_format, body)
        grammar = None
        if content is not None:
            grammar = await services.matcher(text_grammar(content), content.param)
        choices: list[_Choice] = []
        for prompt in body.prompt:
            choices += await _begin(
                services, body, agent, prompt, index=len(choices), grammar=grammar
            )
        answers = [choice.answer for choice in choices]
        completion = _Completion(services, choices)
        if body.stream:
            return await stream(request, completion.chunks(body.stream_options), *answers)
        return JSONResponse(await whole(request, completion.body(), *answers))


async def _begin(
    services: Services,
    body: CompletionRequest,
    agent: AgentKey,
    said: str | list[int],
    *,
    index: int,
    grammar: LLMatcher | None,
) -> list["_Choice"]:
    """Return the choices of a prompt, from `index` on; their answers are not begun yet.

    InvalidRequest: the prompt.
    """
    scores_prompt = bool(body.echo) and body.logprobs is not None
    if not isinstance(said, str):
        prompt = Prompt(said)
    elif scores_prompt:  # nothing cached is used, so that its tokens are nobody else's
        prompt = Prompt(await services.renderer.text_tokens(said, begins=True))
    else:
        prompt = await services.text_prompt(agent, said, begins=True)
    _check_tokens(services, prompt.tokens)
    max_tokens = _MAX_TOKENS if body.max_tokens is None else body.max_tokens
    sampling = body.sampling_params(max_tokens, services.engine.sampling)
    params = replace(
        await services.with_biased_texts(sampling, body.biased_texts),
        logprobs=body.logprobs,
        prompt_logprobs=body.logprobs if scores_prompt else None,
    )
    request = services.generate_request(
        agent,
        prompt,
        params,
        life=body.agentmem,
        priority=body.priority or 0,
        grammar=grammar,
    )
    answers = RunningAnswer(services, replace(request, continues_text=True)).times(body.n or 1)
    choices = []
    for i, answer in enumerate(answers, start=index):
        texts = await services.renderer.token_texts(after=None if body.echo else prompt.tokens[-1])
        echo = None
        shift = 0
        if body.echo:
            spelled = await texts.work_out(partial(texts.whole, prompt.tokens))
            echo = said if isinstance(said, str) else spelled
            shift = len(spelled) - len(echo)
        table = _Table(texts, shift) if body.logprobs is not None else None
        choices.append(_Choice(i, answer, echo, table))
    return choices


def _check_tokens(services: Services, tokens: Sequence[int]) -> None:
    engine = services.engine
    if not tokens:
        raise InvalidRequest("prompt: has no tokens", param="prompt")
    services.check_tokens(tokens, "prompt")
    if len(tokens) >= engine.max_context:
        why = engine.why_max_context
        raise ContextLengthExceeded(len(tokens), engine.max_context, why, param="prompt")


class _Table:
    """OpenAI's table of tokens, their log probabilities and where they begin in the text."""

    def __init__(self, texts: TokenTexts, shift: int):
        """`shift`: characters that the first tokens stand for and the text does not have."""
        self._texts = texts
        self._shift = shift

    @staticmethod
    def empty() -> dict[str, list[Any]]:
        return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}

    def first(self, token: int) -> dict[str, list[Any]]:
        """Return the row of a prompt's first token, which has no log probability."""
        table = self.empty()
        self._append(table, token, None, None)
        return table

    async def rows(self, told: Sequence[TokenLogprob]) -> dict[str, list[Any]]:
        """Return the rows of the tokens that follow."""
        return await self._texts.work_out(partial(self._rows, told))

    def _rows(self, told: Sequence[TokenLogprob]) -> dict[str, list[Any]]:
        table = self.empty()
        for one in told:
            top: dict[str, float] = {}
            for token, logprob in (*one.top, (one.token, one.logprob)):
                top.setdefault(self._texts.text(token), max(logprob, LEAST))
            self._append(table, one.token, max(one.logprob, LEAST), top)
        return table

    def _append(
        self,
        table: dict[str, list[Any]],
        token: int,
        logprob: float | None,
        top: dict[str, float] | None,
    ) -> None:
        table["tokens"].append(self._texts.text(token))
        table["token_logprobs"].append(logprob)
        table["top_logprobs"].append(top)
        table["text_offset"].append(max(0, self._texts.offset - self._shift))
        self._texts.add(token)


class _Choice:
    """The answer to one prompt, whole or in pieces."""

    def __init__(self, index: int, answer: RunningAnswer, echo: str | None, table: _Table | None):
        """`echo`: the prompt's text, where the answer begins with it."""
        self.answer = answer
        self._echo = echo
        self._table = table
        self.body: dict[str, Any] = {
            "index": index,
            "text": "",
            "logprobs": _Table.empty() if table else None,
            "finish_reason": None,
        }

    async def pieces(self) -> AsyncIterator[dict[str, Any] | None]:
        """Yield what is new, as chunks have it; None where nothing was for a while.

        `body` grows with it.
        """
        if self._echo is not None:
            first = self.answer.request.tokens[0]
            yield self._add(self._echo, self._table.first(first) if self._table else None)
        async for item in self.answer.items():
            if isinstance(item, TextDelta):
                yield self._add(item.text, await self._rows(item))
            elif isinstance(item, Finished):
                end = {"finish_reason": item.reason, "agentmem": self.answer.cost()}
                self.body |= end
                yield self._add("", _Table.empty() if self._table else None) | end
            elif isinstance(item, Ping):
                yield None

    async def _rows(self, delta: TextDelta) -> dict[str, list[Any]] | None:
        return await self._table.rows(delta.logprobs) if self._table else None

    def _add(self, text: str, table: dict[str, list[Any]] | None) -> dict[str, Any]:
        self.body["text"] += text
        for name, column in (table or {}).items():
            self.body["logprobs"][name] += column
        piece = {"index": self.body["index"], "text": text, "logprobs": table}
        return piece | {"finish_reason": None}


class _Completion:
    """The answers to all prompts of a request, whole or in chunks."""

    def __init__(self, services: Services, choices: list[_Choice]):
        self._choices = choices
        self._answers = [choice.answer for choice in choices]
        self._at_once = services.settings.max_running
        self._head: dict[str, Any] = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": services.engine.model_name,
        }

    async def body(self) -> dict[str, Any]:
        """Return the answers when they are whole."""
        async for _ in self._pieces():
            pass
        choices = [choice.body for choice in self._choices]
        return {**self._head, "choices": choices, "usage": usage(self._answers)}

    async def chunks(self, options: StreamOptions | None) -> AsyncIterator[str]:
        """Yield the answers as they come. An engine's error becomes the last line."""
        told = StreamUsage(options, self._answers)
        try:
            async for _, piece in self._pieces():
                if piece is None:
                    yield PING
                else:
                    yield event_lines({**self._head, "choices": [piece], **told.field()})
            if told.has_last:
                yield event_lines({**self._head, **told.last()})
            yield DONE
        except AgentMemError as e:
            yield event_lines(openai_error(e))

    def _pieces(self) -> AsyncIterator[tuple[int, dict[str, Any] | None]]:
        """Yield those of all choices as they come, of as many at a time as run at once."""
        return merge([choice.pieces() for choice in self._choices], self._at_once)
