"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's Messages.

A request's blocks become messages of the chat format, and the parts of an answer become blocks
again. Fields that this server does not know are ignored, since Anthropic's clients send many that
are hints; what would change the answer and is not honoured is refused.
"""

import json
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, NoReturn

from fastapi import FastAPI, Request
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError
from starlette.responses import JSONResponse, Response

from ...chat.answer_parser import AnswerPart, Content, Reasoning
from ...chat.messages import BILLING_LINE, ToolCall, check_encodable
from ...engine.api import Finished, SamplingParams
from ...errors import AgentMemError, ContextLengthExceeded, InvalidRequest
from ...transcripts.conversation import Conversation
from ...transcripts.turns import Messages
from ..answer import Begun, Item, Ping, RunningAnswer, Services, ask, chat_of, converse
from ..errors import ErrorShape
from ..sse import event_lines, stream, whole
from .identity import ANONYMOUS, resolve_agent_id
from .wire import MAX_MESSAGES, AgentOptions, Only, Text

SIGNATURE = "agentmem"  # of thinking: clients send it back, and nothing here checks it
PING = 'event: ping\ndata: {"type":"ping"}\n\n'
_ECHO = 200  # characters of the client's own text that an error repeats
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


class InputMessage(_Body):
    role: Literal["user", "assistant", "system"]
    content: Any  # a string or a list of blocks, see `to_messages`


def _known_choice(kind: Any) -> Any:
    if kind in ("any", "tool"):
        message = "this server can't make the model call a tool; use 'auto' or 'none'"
        raise PydanticCustomError("unsupported_parameter", "{what}", {"what": message})
    return kind


class ToolChoice(_Body):
    type: Annotated[Literal["auto", "none"], BeforeValidator(_known_choice)]
    disable_parallel_tool_use: bool | None = None


class Thinking(_Body):
    type: str  # "disabled", or a way of thinking: how long is up to the model


class OutputConfig(_Body):
    format: Annotated[Any, Only()] = None


class CountTokensRequest(_Body):
    """The body of POST /v1/messages/count_tokens: all that a prompt is made of."""

    model: Text
    messages: list[InputMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    system: Any = None  # a string or a list of text blocks
    tools: list[Any] | None = None
    tool_choice: ToolChoice | None = None
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
        contents = [self.system, self.tools, *(message.content for message in self.messages)]
        blocks = [block for content in contents if isinstance(content, list) for block in content]
        marked = any(isinstance(block, dict) and block.get("cache_control") for block in blocks)
        return marked or bool(self.cache_control)


class MessagesRequest(CountTokensRequest):
    """The body of POST /v1/messages. Null means the default everywhere."""

    max_tokens: int = Field(ge=0)  # 0: fill the cache, and answer nothing
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=1)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    stop_sequences: list[Annotated[Text, Field(min_length=1, max_length=1000)]] | None = Field(
        default=None, max_length=16
    )

    def sampling_params(self) -> SamplingParams:
        """Return what the body says, with SamplingParams' defaults for the rest."""
        given: dict[str, Any] = {"temperature": self.temperature, "top_p": self.top_p}
        return SamplingParams(
            max_tokens=self.max_tokens,
            top_k=self.top_k or 0,
            stop=tuple(self.stop_sequences or ()),
            **{name: value for name, value in given.items() if value is not None},
        )

    # would promise something that isn't there
    output_config: OutputConfig | None = None
    output_format: Annotated[Any, Only()] = None
    container: Annotated[Any, Only()] = None
    mcp_servers: Annotated[Any, Only([])] = None


def add_routes(app: FastAPI, services: Services) -> None:
    services.errors.set_shape("/v1/messages", ErrorShape(anthropic_error, anthropic_status))

    @app.post("/v1/messages", response_model=None)
    async def create_message(body: MessagesRequest, request: Request) -> Response:
        services.check_model(body.model)
        answer = await _ask(services, body, request)
        growing = GrowingMessage(
            services.engine.model_name,
            len(answer.request.tokens),
            max_tokens=body.max_tokens,
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
    return await converse(
        services,
        request,
        agent_id,
        to_messages(body),
        body.agentmem,
        keep=keep and agent_id != ANONYMOUS,
        tools=None if body.tools is None else function_tools(body.tools),
    )


async def _ask(services: Services, body: MessagesRequest, request: Request) -> RunningAnswer:
    check_ends_with_user(body)
    conversation = await _conversation(services, body, request, keep=body.max_tokens > 0)
    choice = body.tool_choice
    return await ask(
        services,
        conversation,
        body.sampling_params(),
        options=body.options,
        may_call=choice is None or choice.type != "none",
        max_calls=1 if choice and choice.disable_parallel_tool_use else 0,
        life=body.agentmem,
    )


async def _body(answer: RunningAnswer, growing: "GrowingMessage") -> dict[str, Any]:
    """Return the message when it is whole."""
    async for item in answer.items():
        for _ in await _grow(answer, growing, item):
            pass
    return growing.body


async def _events(
    answer: RunningAnswer, growing: "GrowingMessage", request_id: str
) -> AsyncIterator[str]:
    """Yield the events of the message as it comes. An engine's error becomes the last one."""
    try:
        async for item in answer.items():
            for event in await _grow(answer, growing, item):
                yield event
    except AgentMemError as e:
        yield error_event(e, request_id)


async def _grow(
    answer: RunningAnswer, growing: "GrowingMessage", item: Item
) -> Iterator[str] | list[str]:
    if isinstance(item, Begun):
        return growing.begin()
    if isinstance(item, Ping):
        return [PING]
    if isinstance(item, Finished):
        return growing.finish(item, await answer.leave_turn())
    return growing.add(item) if isinstance(item, Content | Reasoning | ToolCall) else []


# -- from blocks to messages


def to_messages(body: CountTokensRequest) -> Messages:
    """Return the request's messages in the chat format, the system prompt first.

    A string and a list with that string as its only block give the same. The text of neighbouring
    blocks is joined without anything between. What is no text stands in history as a note that it
    was left out. InvalidRequest names what can't be read, such as
    messages.3.content.0.text, or what of the user's newest messages is no text.
    """
    result: Messages = _system(body.system, "system")
    roles = [message.role for message in body.messages]
    num_answered = max((i + 1 for i, role in enumerate(roles) if role == "assistant"), default=0)
    for i, message in enumerate(body.messages):
        param = f"messages.{i}.content"
        if message.role == "system":
            result += _system(message.content, param)
        elif message.role == "assistant":
            result.append(_assistant(_blocks(message.content, param), param))
        else:
            blocks = _blocks(message.content, param)
            result += _user(blocks, param, is_new=i >= num_answered)
    return result


def check_ends_with_user(body: MessagesRequest) -> None:
    """Raise InvalidRequest where the answer should go on from an assistant's message."""
    if body.messages[-1].role == "assistant":
        message = "the last message is the assistant's; this server does not support prefill"
        _refuse(f"messages.{len(body.messages) - 1}.role", message)


def function_tools(tools: Sequence[Any] | None) -> list[dict[str, Any]]:
    """Return the client's own tools in the chat format; tools that Anthropic runs are left out.

    InvalidRequest names what can't be read, such as tools.0.input_schema.
    """
    found = []
    for i, tool in enumerate(tools or ()):
        param = f"tools.{i}"
        if not isinstance(tool, dict):
            _refuse(param, "must be an object")
        if tool.get("type") in (None, "custom"):
            found.append({"type": "function", "function": _function(tool, param)})
    check_encodable(found, "tools")
    return found


def _function(tool: dict[str, Any], param: str) -> dict[str, Any]:
    description = tool.get("description")
    schema = tool.get("input_schema")
    if not isinstance(description, str | None):
        _refuse(f"{param}.description", "must be a string")
    if not isinstance(schema, dict):
        _refuse(f"{param}.input_schema", "must be a JSON schema, which is an object")
    name = _string(tool, "name", param)
    return {"name": name, "description": description or "", "parameters": schema}


def _system(content: Any, param: str) -> Messages:
    """Return the system message; none where there is no text but Claude Code's billing line."""
    if content is None:
        return []
    blocks = _blocks(content, param)
    texts = [_text(block, where, is_new=True) for where, block in blocks]
    text = "".join(BILLING_LINE.sub("", text) for text in texts)
    return [{"role": "system", "content": text}] if text else []


def _blocks(content: Any, param: str) -> list[tuple[str, dict[str, Any]]]:
    """Return the blocks of a content, each with what an error calls it."""
    if isinstance(content, str):
        return [(param, {"type": "text", "text": content})]
    if not isinstance(content, list):
        _refuse(param, "must be a string or a list of blocks", "invalid_type")
    for i, block in enumerate(content):
        if not isinstance(block, dict) or not isinstance(block.get("type"), str):
            _refuse(f"{param}.{i}", "must be an object with a type")
    return [(f"{param}.{i}", block) for i, block in enumerate(content)]


def _user(blocks: list[tuple[str, dict[str, Any]]], param: str, *, is_new: bool) -> Messages:
    """Return results of tools, and what the user says, in their order."""
    messages: Messages = []
    for where, block in blocks:
        if block["type"] == "tool_result":
            messages.append(_tool_result(block, where))
            continue
        text = _text(block, where, is_new=is_new)
        if messages and messages[-1]["role"] == "user":
            messages[-1]["content"] += text
        else:
            messages.append({"role": "user", "content": text})
    return messages or [{"role": "user", "content": ""}]


def _tool_result(block: dict[str, Any], param: str) -> dict[str, Any]:
    content = block.get("content")
    blocks = [] if content is None else _blocks(content, f"{param}.content")
    text = "".join(_text(inner, where, is_new=False) for where, inner in blocks)
    if block.get("is_error") and not text:
        text = "error"
    return {"role": "tool", "tool_call_id": _string(block, "tool_use_id", param), "content": text}


def _assistant(blocks: list[tuple[str, dict[str, Any]]], param: str) -> dict[str, Any]:
    """Return one message; what was redacted of its thinking can't be read, and is left out."""
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[dict[str, Any]] = []
    for where, block in blocks:
        if block["type"] == "thinking":
            thoughts.append(_string(block, "thinking", where, may_be_empty=True))
        elif block["type"] == "tool_use":
            calls.append(_tool_use(block, where))
        elif block["type"] != "redacted_thinking":
            texts.append(_text(block, where, is_new=False))
    message: dict[str, Any] = {"role": "assistant", "content": "".join(texts)}
    if thinking := "".join(thoughts):
        message["reasoning_content"] = thinking
    if calls:
        message["content"] = message["content"] or None
        message["tool_calls"] = calls
    return message


def _tool_use(block: dict[str, Any], param: str) -> dict[str, Any]:
    arguments = block.get("input")
    if not isinstance(arguments, dict):
        _refuse(f"{param}.input", "must be an object")
    check_encodable(arguments, f"{param}.input")
    function = {
        "name": _string(block, "name", param),
        "arguments": json.dumps(arguments, ensure_ascii=False),
    }
    return {"id": _string(block, "id", param), "type": "function", "function": function}


def _text(block: dict[str, Any], param: str, *, is_new: bool) -> str:
    """Return the text of a block. One without text is refused where it is new, else noted."""
    kind = block["type"]
    source = block.get("source")
    if kind == "text":
        return _string(block, "text", param, may_be_empty=True)
    if kind == "search_result":
        inner = _blocks(block.get("content") or [], f"{param}.content")
        texts = [_text(found, where, is_new=is_new) for where, found in inner]
        return "\n".join([str(block.get("title") or ""), str(source or ""), *texts, ""])
    if kind == "document" and isinstance(source, dict) and source.get("type") == "text":
        title = block.get("title")
        text = _string(source, "data", f"{param}.source", may_be_empty=True)
        return f"{title}\n{text}" if title else text
    if is_new:
        _refuse(param, f"is of type {kind[:_ECHO]!r}; this server reads only text")
    return f"[{kind[:_ECHO]} left out: only text can be read]"


def _string(block: Mapping[str, Any], name: str, param: str, *, may_be_empty: bool = False) -> str:
    value = block.get(name)
    if not isinstance(value, str) or not (value or may_be_empty):
        also = "" if may_be_empty else ", and not empty"
        _refuse(f"{param}.{name}", f"must be a string{also}", "invalid_type")
    check_encodable(value, f"{param}.{name}")
    return value


def _refuse(param: str, message: str, code: str | None = None) -> NoReturn:
    raise InvalidRequest(f"{param}: {message}", param=param, code=code)


# -- from an answer's parts to blocks


class GrowingMessage:
    """An answer as it grows. Its methods return the events, ready to be sent."""

    def __init__(self, model: str, prompt_tokens: int, *, max_tokens: int, marks_cache: bool):
        """`prompt_tokens`: how many of them are cached is known at the end only."""
        self._max_tokens = max_tokens
        self._marks_cache = marks_cache
        self._num_calls = 0
        self._is_open = False  # whether the last block still grows
        self.body: dict[str, Any] = {
            "id": f"msg_{uuid.uuid4().hex}",
            "type": "message",
            "role": "assistant",
            "model": model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": _usage(prompt_tokens, 0, 0, marks_cache=marks_cache),
        }

    def begin(self) -> Iterator[str]:
        yield _event("message_start", message=self.body)
        yield PING

    def add(self, part: AnswerPart) -> Iterator[str]:
        if isinstance(part, ToolCall):
            yield from self._close()
            yield from self._tool_use(part)
            return
        kind = "thinking" if isinstance(part, Reasoning) else "text"
        if not self._is_open or self._block["type"] != kind:
            yield from self._close()
            more = {"signature": ""} if kind == "thinking" else {}
            yield self._open({"type": kind, kind: "", **more})
        self._block[kind] += part.text
        yield self._delta(f"{kind}_delta", kind, part.text)

    def finish(self, event: Finished, agentmem: dict[str, Any]) -> Iterator[str]:
        """`agentmem`: what the answer cost, in this server's own words."""
        yield from self._close()
        stats = event.stats
        usage = _usage(
            stats.prompt_tokens,
            stats.cached_tokens,
            stats.completion_tokens,
            marks_cache=self._marks_cache,
        )
        why = {"stop_reason": self._stop_reason(event), "stop_sequence": event.stop_string}
        self.body |= {**why, "usage": usage, "agentmem": agentmem}
        yield _event("message_delta", delta=why, usage=usage, agentmem=agentmem)
        yield _event("message_stop")

    def _stop_reason(self, event: Finished) -> str:
        if event.stop_string is not None:
            return "stop_sequence"
        if event.reason == "length":
            is_full = event.stats.completion_tokens < self._max_tokens
            return "model_context_window_exceeded" if is_full else "max_tokens"
        return "tool_use" if self._num_calls else "end_turn"

    @property
    def _block(self) -> dict[str, Any]:
        block: dict[str, Any] = self.body["content"][-1]
        return block

    def _open(self, block: dict[str, Any]) -> str:
        self.body["content"].append(block)
        self._is_open = True
        index = len(self.body["content"]) - 1
        return _event("content_block_start", index=index, content_block=block)

    def _delta(self, kind: str, name: str, value: str) -> str:
        index = len(self.body["content"]) - 1
        return _event("content_block_delta", index=index, delta={"type": kind, name: value})

    def _close(self) -> Iterator[str]:
        if not self._is_open:
            return
        if self._block["type"] == "thinking":
            self._block["signature"] = SIGNATURE
            yield self._delta("signature_delta", "signature", SIGNATURE)
        self._is_open = False
        yield _event("content_block_stop", index=len(self.body["content"]) - 1)

    def _tool_use(self, call: ToolCall) -> Iterator[str]:
        self._num_calls += 1
        yield self._open({"type": "tool_use", "id": call.id, "name": call.name, "input": {}})
        self._block["input"] = call.arguments
        yield self._delta("input_json_delta", "partial_json", call.arguments_json)
        yield from self._close()


def _usage(
    prompt_tokens: int, cached_tokens: int, output_tokens: int, *, marks_cache: bool
) -> dict[str, int]:
    """Return Anthropic's usage, whose three kinds of input tokens add up to the prompt.

    Every prompt is cached here. Tokens count as written only to clients that say where to cache;
    to others they are plain input, as Anthropic counts them.
    """
    new = prompt_tokens - cached_tokens
    return {
        "input_tokens": 0 if marks_cache else new,
        "cache_creation_input_tokens": new if marks_cache else 0,
        "cache_read_input_tokens": cached_tokens,
        "output_tokens": output_tokens,
    }


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


def _event(event: str, /, **fields: Any) -> str:
    return event_lines({"type": event, **fields}, event)
