"""One answer, whatever API asks for it: from what was said to the turn that it leaves.

A file under api/ reads its wire format and writes it; what lies between is done here:

    conversation = await converse(services, request, agent_id, said, options, keep=...)
    answer = await ask(services, conversation, params, ...)
    if body.stream:
        return await stream(request, lines(answer), answer)
    return JSONResponse(await whole(request, read(answer), answer))

`lines` and `read` are the API's own. Both go through `answer.items()` up to Finished, which comes
last, and then call `answer.leave_turn(...)`. A prompt that is no chat is answered too, with
`RunningAnswer(services, services.generate_request(agent, prompt, params))`.
"""

import time
from collections.abc import AsyncIterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from datetime import date
from typing import Any

import numpy as np
from llguidance import LLMatcher
from starlette.requests import Request

from ..agent_key import AgentKey
from ..chat.answer_parser import AnswerParser, AnswerPart, message_of
from ..chat.dates import session_days
from ..chat.grammar import AUTO, ContentFormat, ToolChoice, callable_tools
from ..chat.grammar_compiler import GrammarCompiler
from ..chat.messages import Chat, ToolCall
from ..chat.renderer import ChatRenderer, Prompt
from ..config import Settings
from ..engine.api import (
    Finished,
    GenerateRequest,
    RequestStats,
    SamplingParams,
    TextDelta,
    TokenLogprob,
)
from ..engine.engine import Engine
from ..errors import InvalidRequest, NotFound
from ..transcripts.conversation import Conversation, begin, resume
from ..transcripts.registry import TranscriptRegistry
from ..transcripts.turns import Kind, Messages
from . import sse
from .api.wire import AgentLife, AgentOptions
from .auth import namespace_of
from .errors import ErrorResponses
from .rate_limits import spend


@dataclass(frozen=True)
class Services:
    """What every API works with."""

    engine: Engine
    settings: Settings
    renderer: ChatRenderer
    compiler: GrammarCompiler
    transcripts: TranscriptRegistry
    errors: ErrorResponses

    def check_model(self, name: str | None) -> None:
        """Raise NotFound where `name` is not the served model's.

        It may be the whole name or its last path part, in any case, with a provider before it or
        Ollama's tag after it; or "default", or nothing. With --any-model any name will do.
        """
        served = self.engine.model_name
        name = name or "default"
        if not self.settings.any_model and not _is_name_of(name, served):
            message = (
                f"The model {name[:200]!r} does not exist; this server has {served!r}, "
                "also known as 'default'."
            )
            raise NotFound(message, param="model", code="model_not_found")

    def check_tokens(self, tokens: Sequence[int], param: str) -> None:
        """Raise InvalidRequest, with `param`, where any of `tokens` is no token id."""
        size = self.engine.vocab_size
        wrong = next((token for token in tokens if not 0 <= token < size), None)
        if wrong is not None:
            message = f"{param}: {wrong} is no token id; the model's are 0 to {size - 1}"
            raise InvalidRequest(message, param=param)

    async def with_biased_texts(
        self, params: SamplingParams, texts: Mapping[str, float]
    ) -> SamplingParams:
        """Return `params` with all tokens of these texts biased."""
        biases = list(params.logit_bias)
        for text, bias in texts.items():
            tokens = await self.renderer.text_tokens(text)
            biases += [(token, bias) for token in tokens]
        return replace(params, logit_bias=tuple(biases))

    async def prompt(
        self, agent: AgentKey, chat: Chat, branches: Sequence[np.ndarray] | None = None
    ) -> Prompt:
        """Return the prompt of a chat, which goes on from what the agent has cached of it.

        `branches`: token ids to go on from instead of those.
        """
        if branches is None:
            branches = self.engine.branch_tokens(agent)
        return await self.renderer.prompt(chat, branches, self._days(agent))

    async def matcher(self, grammar: str | None, param: str | None) -> LLMatcher | None:
        """Return what holds an answer to a grammar. InvalidRequest names `param`."""
        if grammar is None:
            return None
        try:
            return await self.compiler.compile(grammar)
        except InvalidRequest as e:
            e.param = e.param or param
            raise

    async def text_prompt(self, agent: AgentKey, text: str, *, begins: bool = False) -> Prompt:
        """Return the prompt of a text as it is; `begins` as in ChatRenderer.text_tokens."""
        branches = self.engine.branch_tokens(agent)
        tokens = await self.renderer.text_tokens(text, branches, begins=begins)
        return Prompt(tokens, continues_text=True)

    def generate_request(
        self,
        agent: AgentKey,
        prompt: Prompt,
        params: SamplingParams,
        *,
        life: AgentLife | None = None,
        priority: int = 0,
        grammar: LLMatcher | None = None,
    ) -> GenerateRequest:
        """Return what the engine is asked; the answer ends where the context does.

        `params.max_tokens` 0: the prompt is cached, and nothing answered; -1: there is no limit.
        `grammar`: what the answer is held to.
        """
        room = self.engine.max_context - len(prompt.tokens)
        wanted = params.max_tokens if params.max_tokens >= 0 else room
        return GenerateRequest(
            agent,
            prompt.tokens,
            replace(params, max_tokens=min(wanted, room)),
            priority=priority,
            ttl=life.ttl if life else None,
            ephemeral=life.ephemeral if life else None,
            continues_text=prompt.continues_text,
            checkpoint=prompt.checkpoint,
            grammar=grammar,
        )

    def _days(self, agent: AgentKey) -> Sequence[date]:
        """Return the days whose date the agent's prompts may bear."""
        now = time.time()
        created, last_used = self.engine.agent_times(agent) or (now, now)
        return session_days(created, last_used, now, self.settings.date_session * 3600)


def _is_name_of(name: str, served: str) -> bool:
    """Tell whether clients that say `name` mean the model `served`."""

    def plain(text: str) -> str:
        return text.strip("/").casefold().removesuffix(":latest")

    last = plain(served).rpartition("/")[2]
    asked = plain(name)
    names = {"default", plain(served), last}
    return asked in names or asked.partition("/")[2].strip("/") in names


async def converse(
    services: Services,
    request: Request,
    agent_id: str,
    said: Messages,
    options: AgentOptions | None,
    *,
    keep: bool,
    tools: list[dict[str, Any]] | None = None,
) -> Conversation:
    """Return where the request stands in the agent's transcript, by what its `options` say.

    It has said all that was said before, or it goes on from a turn; it leaves one if `keep`.
    Without `tools` it goes on with those of that turn. Raises NotFound where there is no such
    turn, and StoreFailed.
    """
    options = options or AgentOptions()
    agent = AgentKey(namespace_of(request), agent_id)
    if options.continue_:
        retried = is_retried(request)
        conversation = await resume(
            services.transcripts, agent, said, options.turn, retried=retried
        )
    else:
        conversation = begin(services.transcripts, agent, said, keep=keep)
    conversation.ephemeral = bool(options.ephemeral)
    conversation.keep = keep
    if tools is not None:
        conversation.tools = tools
    return conversation


def chat_of(conversation: Conversation, options: Mapping[str, Any] | None = None) -> Chat:
    """Return what the prompt of a conversation is rendered from; `options` are the template's."""
    messages = conversation.messages
    known = len(messages) - len(conversation.new)
    return Chat(
        messages,
        known=known,
        tools=conversation.tools,
        options=options or {},
        continues=conversation.continues,
    )


def is_retried(request: Request) -> bool:
    """Return whether OpenAI's or Anthropic's SDK sends it again: no answer came, or an error."""
    count = request.headers.get("x-stainless-retry-count", "0")
    return count.isdigit() and int(count) > 0


async def ask(
    services: Services,
    conversation: Conversation,
    params: SamplingParams,
    *,
    options: Mapping[str, Any] | None = None,
    tool_choice: ToolChoice = AUTO,
    content: ContentFormat | None = None,
    life: AgentLife | None = None,
    priority: int = 0,
) -> "RunningAnswer":
    """Render what was said, with the conversation's tools, and have it answered.

    `options` are the chat template's. Calls are text where `tool_choice` allows none, and of more
    than it allows the rest is left out. `content`: what the content must be, unless a call is
    forced. Raises InvalidRequest, ContextLengthExceeded, and Busy where the queue is full already,
    so that rendering would be in vain.
    """
    services.engine.check_queue()
    tools = conversation.callable_tools
    callable = list(callable_tools(tools, tool_choice))
    prompt = await services.prompt(conversation.agent, chat_of(conversation, options))
    constraint = await services.renderer.constraint(tools, tool_choice, content, prompt=prompt)
    parser = AnswerParser(
        constraint.markup,
        callable,
        in_reasoning=prompt.in_reasoning,
        max_calls=tool_choice.max_calls,
    )
    param = content.param if content else tool_choice.param
    matcher = await services.matcher(constraint.grammar, param)
    if matcher is not None and prompt.continues_text:
        matcher = await _gone_on(services, matcher, conversation.messages[-1].get("content"))
    request = services.generate_request(
        conversation.agent,
        prompt,
        params,
        life=life,
        priority=priority,
        grammar=matcher,
    )
    return RunningAnswer(services, request, parser, conversation)


async def _gone_on(services: Services, matcher: LLMatcher, begun: Any) -> LLMatcher:
    """Return the matcher after what was begun of an answer, or as it is where that does not fit."""
    if not isinstance(begun, str) or not begun:
        return matcher
    tokens = await services.renderer.text_tokens(begun)
    after = matcher.deep_copy()
    return after if after.try_consume_tokens(tokens) == len(tokens) else matcher


@dataclass(frozen=True)
class Begun:
    """The engine has begun to answer: the prompt is in the cache."""


@dataclass(frozen=True)
class Ping:
    """Nothing was said for a while; a client may want to know that it is not forgotten."""


Item = Begun | Ping | AnswerPart | TextDelta | Finished


class RunningAnswer:
    """An answer while it comes. It is not begun before it is read, and must be closed."""

    def __init__(
        self,
        services: Services,
        request: GenerateRequest,
        parser: AnswerParser | None = None,
        conversation: Conversation | None = None,
        events: AsyncIterator[TextDelta | Finished] | None = None,
    ):
        """Have the engine answer `request`; `events`: what it tells of it, if it is asked already.

        Its text is given as it comes where there is no parser; no turn is left where there is no
        conversation.
        """
        self.request = request
        self.parts: list[AnswerPart] = []  # so far
        self.finished: Finished | None = None
        self.shares_prompt = False  # with an answer before it
        self.logprobs: list[TokenLogprob] = []  # so far, where they are asked for
        self.num_tokens = 0  # so far
        self.num_reasoning_tokens = 0  # of those, with the marks around the reasoning
        self._parser = parser
        self._services = services
        self._conversation = conversation
        self._events = sse.Events(events or services.engine.generate(request))
        self._has_left_turn = False

    def times(self, n: int) -> list["RunningAnswer"]:
        """Return `n` answers to its prompt, which is prefilled once: itself, and others.

        The one of index i is what the request is answered alone with a seed that is greater by i.
        Only the first leaves a turn. To be called before it is read.
        """
        requests = [self.request, *(_reseeded(self.request, i) for i in range(1, n))]
        first, *others = self._services.engine.generate_each(requests)
        self._events = sse.Events(first)
        answers = [self]
        for request, events in zip(requests[1:], others, strict=True):
            other = RunningAnswer(self._services, request, deepcopy(self._parser), events=events)
            other.shares_prompt = True
            answers.append(other)
        return answers

    async def items(self) -> AsyncIterator[Item]:
        """Yield what comes, Finished last. Raises what the engine raises, at any time.

        That is: Begun, with pings before it where it takes long; then the parts, or, without a
        parser, TextDeltas; Ping wherever nothing was said for PING_INTERVAL seconds. A long tool
        call says nothing until it is whole.
        """
        has_begun = False
        said = time.monotonic()
        event = await self._events.next(timeout=0)
        while True:
            if event is not None and not has_begun:
                has_begun = True
                yield Begun()
            for item in self._read(event):
                said = time.monotonic()
                yield item
            if self.finished is not None:
                return
            if event is None or time.monotonic() - said > sse.PING_INTERVAL:
                said = time.monotonic()
                yield Ping()
            event = await self._events.next(sse.PING_INTERVAL)

    def _read(self, event: TextDelta | Finished | None) -> Sequence[Item]:
        if event is None:
            return []
        parts = self._parse(self._parser, event) if self._parser is not None else []
        self.parts += parts
        if isinstance(event, TextDelta):
            self.logprobs += event.logprobs
            self.num_tokens = event.num_tokens
            return parts if self._parser is not None else [event]
        self.finished = event
        spend(event.stats)
        return [*parts, event]

    def _parse(self, parser: AnswerParser, event: TextDelta | Finished) -> list[AnswerPart]:
        """Return the parts that an event brings; count the tokens that are reasoning."""
        if isinstance(event, Finished):
            return parser.finish(cut=event.cut)
        was_reasoning = parser.in_reasoning
        parts = parser.feed(event.text)
        if was_reasoning or parser.in_reasoning:
            self.num_reasoning_tokens += event.num_tokens - self.num_tokens
        return parts

    @property
    def message(self) -> dict[str, Any]:
        """What was said so far, as a message in the shape of OpenAI's chat API."""
        return message_of(self.parts)

    @property
    def has_calls(self) -> bool:
        """Whether it has called tools so far."""
        return self._parser is not None and self._parser.num_calls > 0

    def name_call(self, call: ToolCall, call_id: str) -> None:
        """Give a call that it has made another id, in the turn that it leaves too."""
        self.parts[self.parts.index(call)] = replace(call, id=call_id)

    async def leave_turn(
        self, kind: Kind = "chat", turn_id: str | None = None, **about: Any
    ) -> dict[str, Any]:
        """Leave a turn with the answer in the agent's transcript; return what the answer cost.

        To be called once, after Finished. `about` is kept with the turn.
        """
        assert self.finished is not None and not self._has_left_turn
        self._has_left_turn = True
        turn = None
        if self._conversation is not None:
            turn = await self._conversation.finish(kind, [self.message], turn_id, **about)
        return self.cost(turn)

    def cost(self, turn: str | None = None) -> dict[str, Any]:
        """Return the field `agentmem` of an answer: what it cost, times in ms, and its turn."""
        assert self.finished is not None
        return _cost(self.request.agent.agent_id, self.finished.stats, turn)

    async def ready(self, timeout: float) -> None:
        """Wait until the answer begins, `timeout` s at most. Raises what the engine raises."""
        await self._events.ready(timeout)

    async def aclose(self) -> None:
        """Cancel the answer, if it still comes."""
        await self._events.aclose()


def _reseeded(request: GenerateRequest, index: int) -> GenerateRequest:
    """Return a request with a seed that is greater by `index`, if it has one."""
    seed = request.params.seed
    if seed is None:
        return request
    return replace(request, params=replace(request.params, seed=(seed + index) % 2**64))


def _cost(agent_id: str, stats: RequestStats, turn: str | None) -> dict[str, Any]:
    return {
        "agent_id": agent_id,
        "cache": stats.cache,
        "cached_tokens": stats.cached_tokens,
        "cause": stats.cause,
        "restored_bytes": stats.restored_bytes,
        "restore_ms": round(stats.restore_ms, 3),
        "prefill_ms": round(stats.prefill_ms, 3),
        "ttft_ms": round(stats.ttft_ms, 3),
        "queue_ms": round(stats.queue_ms, 3),
        "turn": turn,
    }
