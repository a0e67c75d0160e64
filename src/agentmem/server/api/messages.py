"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's Messages.

A request's blocks become messages of the chat format, and the parts of an answer become blocks
again. Fields that this server does not know are ignored, since Anthropic's clients send many that
are hints; what would change the answer and is not honoured is refused.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Request
from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema, model_validator
from starlette.responses import JSONResponse, Response

from ...chat.answer_parser import Content, Reasoning
from ...chat.grammar import ContentFormat, ToolChoice
from ...chat.messages import ToolCall
from ...engine.api import Finished, SamplingParams
from ...errors import AgentMemError, ContextLengthExceeded
from ...transcripts.conversation import Conversation, is_prefill
from ..answer import Begun, Item, Ping, RunningAnswer, Services, ask, chat_of, converse
from ..errors import ErrorShape
from ..sse import event_lines, stream, whole
from .identity import ANONYMOUS, resolve_agent_id
from .message_blocks import InputMessage, client_tools, to_messages
from .message_events import GrowingMessage
from .scalars import Flag, MaxTokens, Share, Temperature, TopK, chosen
from .structured import output_format
from .wire import MAX_MESSAGES, AgentOptions, Only, StopStrings, Text

_ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


class _Body(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)


class InputToolChoice(_Body):
    type: Literal["auto", "none", "any", "tool"]
    name: Text | None = None  # of the tool that must be called
    disable_parallel_tool_use: bool | None = None

    @model_validator(mode="after")
    def _names_tool(self) -> "InputToolChoice":
        if self.type == "tool" and not self.name:
            raise ValueError("name: missing, but required where the type is 'tool'")
        return self


class Thinking(_Body):
    type: str  # "disabled", or a way of thinking: how long is up to the model


class OutputConfig(_Body):
    format: Annotated[Any, WithJsonSchema({"type": ["object", "null"]})] = None


class CountTokensRequest(_Body):
    """The body of POST /v1/messages/count_tokens: all that a prompt is made of."""

    model: Text | None = None
    messages: list[InputMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    system: Any = None  # a string or a list of text blocks
    tools: list[Any] | None = None
    tool_choice: InputToolChoice | None = None
    thinking: Thinking | None = None
    cache_control: dict[str, Any] | None = None
    agent_id: Text | None = None
    agentmem: AgentOptions | None = None
    metadata: dict[str, Any] | None = None

    @property
    def options(self) -> dict[str, Any]:
        """The chat template's options: without `thinking` the template decides."""
        return (
            {} if self.thinking is None else {"enable_thinking": self.thinking.type != "disabled"}
        )

    @property
    def marks_cache(self) -> bool:
        """Whether any block says where to cache, so that the client expects to hear of writes."""
        contents = [self.system, self.tools, *(said.get("content") for said in self.messages)]
        blocks = [block for content in contents if isinstance(content, list) for block in content]
        marked = any(isinstance(block, dict) and block.get("cache_control") for block in blocks)
        return marked or bool(self.cache_control)


class MessagesRequest(CountTokensRequest):
    """The body of POST /v1/messages. Null means the default everywhere."""

    max_tokens: MaxTokens
    stream: Flag | None = None
    temperature: Temperature | None = None
    top_p: Share | None = None
    top_k: TopK | None = None
    stop_sequences: StopStrings | None = None

    def sampling_params(self, defaults: Mapping[str, Any]) -> SamplingParams:
        """Return what the body says, then `defaults`, then SamplingParams' own."""
        top_k = None if self.top_k is None else max(self.top_k, 0)
        given = {"temperature": self.temperature, "top_p": self.top_p, "top_k": top_k}
        return SamplingParams(
            max_tokens=self.max_tokens,
            stop=tuple(self.stop_sequences or ()),
            **chosen(defaults, **given),
        )

    def content_format(self) -> ContentFormat | None:
        """Return what the content must be. InvalidRequest: that is not supported."""
        if self.output_config is not None and self.output_config.format is not None:
            return output_format(self.output_config.format, "output_config.format")
        return output_format(self.output_format, "output_format")

    def chosen_tools(self) -> ToolChoice:
        """Return which tools may or must be called, and how many."""
        tools = [tool for tool in self.tools or () if isinstance(tool, dict)]
        strict = frozenset(str(tool.get("name")) for tool in tools if tool.get("strict") is True)
        choice = self.tool_choice
        if choice is None:
            return ToolChoice(strict=strict)
        modes: dict[str, Literal["none", "auto", "required"]] = {"none": "none", "auto": "auto"}
        is_single = choice.disable_parallel_tool_use or choice.type == "tool"
        return ToolChoice(
            modes.get(choice.type, "required"),
            names=(choice.name,) if choice.type == "tool" and choice.name else None,
            strict=strict,
            max_calls=1 if is_single else 0,
        )

    output_config: OutputConfig | None = None
    output_format: Annotated[Any, WithJsonSchema({"type": ["object", "null"]})] = None

    # would promise something that isn't there
    container: Annotated[Any, Only({})] = None
    mcp_servers: Annotated[Any, Only([])] = None


def add_routes(app: FastAPI, services: Services) -> None:
    shape = ErrorShape(anthropic_error, anthropic_status)
    services.errors.set_shape("/v1/messages", shape)
    services.errors.set_shape_for("/v1/models", "anthropic-version", shape)  # OpenAI's has it too

    @app.post("/v1/messages", response_model=None)
    async def create_message(body: MessagesRequest, request: Request) -> Response:
        services.check_model(body.model)
        answer = await _ask(services, body, request)
        growing = GrowingMessage(
            services.engine.model_name,
            len(answer.request.tokens),
            max_tokens=body.max_tokens if body.max_tokens >= 0 else services.engine.max_context,
            marks_cache=body.marks_cache,
        )
        if body.stream:
            request_id = request.scope["agentmem.request_id"]
            return await stream(request, _events(answer, growing, request_id), answer)
        return JSONResponse(await whole(request, _body(answer, growing), answer))

    @app.post("/v1/messages/count_tokens")
    async def count_tokens(body: CountTokensRequest, request: Request) -> dict[str, int]:
        services.check_model(body.model)
        conversation = await _conversation(services, body, request, keep=False)
        try:
            prompt = await services.prompt(conversation.agent, chat_of(conversation, body.options))
        except ContextLengthExceeded as e:
            return {"input_tokens": e.prompt_tokens}
        return {"input_tokens": len(prompt.tokens)}


async def _conversation(
    services: Services, body: CountTokensRequest, request: Request, *, keep: bool
) -> Conversation:
    agent_id = resolve_agent_id(request.headers, agent_id=body.agent_id, metadata=body.metadata)
    tools = client_tools(body.tools)
    said = to_messages(body.messages, body.system, tools.deferred)
    conversation = await converse(
        services,
        request,
        agent_id,
        said,
        body.agentmem,
        keep=keep and agent_id != ANONYMOUS,
        tools=None if body.tools is None else tools.functions,
    )
    conversation.deferred_tools = tools.deferred
    conversation.continues = is_prefill(said)
    return conversation


async def _ask(services: Services, body: MessagesRequest, request: Request) -> RunningAnswer:
    conversation = await _conversation(services, body, request, keep=body.max_tokens != 0)
    return await ask(
        services,
        conversation,
        body.sampling_params(services.engine.sampling),
        options=body.options,
        tool_choice=body.chosen_tools(),
        content=await asyncio.to_thread(body.content_format),
        life=body.agentmem,
    )


async def _body(answer: RunningAnswer, growing: GrowingMessage) -> dict[str, Any]:
    """Return the message when it is whole."""
    async for item in answer.items():
        for _ in await _grow(answer, growing, item):
            pass
    return growing.body


async def _events(
    answer: RunningAnswer, growing: GrowingMessage, request_id: str
) -> AsyncIterator[str]:
    """Yield the events of the message as it comes. An engine's error becomes the last one."""
    try:
        async for item in answer.items():
            for event in await _grow(answer, growing, item):
                yield event
    except AgentMemError as e:
        yield error_event(e, request_id)


async def _grow(
    answer: RunningAnswer, growing: GrowingMessage, item: Item
) -> Iterator[str] | list[str]:
    if isinstance(item, Begun):
        return growing.begin()
    if isinstance(item, Ping):
        return growing.ping()
    if isinstance(item, Finished):
        return growing.finish(item, await answer.leave_turn())
    return growing.add(item) if isinstance(item, Content | Reasoning | ToolCall) else []


# -- errors


def anthropic_status(error: AgentMemError) -> int:
    """Return the HTTP status of an error, by which Anthropic's SDKs know what it is."""
    return 413 if error.code == "request_too_large" else error.status


def anthropic_error(error: AgentMemError, request_id: str) -> dict[str, Any]:
    """Return the body of an error as Anthropic has it, whose type follows from the status.

    Text of the client's own that isn't valid Unicode is escaped, so that the body is UTF-8. A
    prompt that is too long is called so in the words by which Claude Code knows that it must
    compact.
    """
    status = anthropic_status(error)
    message = error.message
    kind = _ERROR_TYPES.get(status, "api_error" if status >= 500 else "invalid_request_error")
    if isinstance(error, ContextLengthExceeded):
        message = (
            f"prompt is too long: {error.prompt_tokens} tokens > {error.max_context} maximum. "
            f"{message}"
        )
    clean = message.encode(errors="backslashreplace").decode()
    return {
        "type": "error",
        "error": {"type": kind, "message": clean},
        "request_id": request_id,
    }


def error_event(error: AgentMemError, request_id: str) -> str:
    """Return the event that ends a stream that failed."""
    return event_lines(anthropic_error(error, request_id), "error")
