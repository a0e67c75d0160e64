"""OpenAI's Responses wire format: what a request may hold, and its input as chat messages."""

from typing import Annotated, Any, Literal, NoReturn

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from ...chat.messages import arguments_of, check_encodable
from ...errors import InvalidRequest
from ...transcripts.turns import Messages
from .wire import MAX_MESSAGES, AgentOptions, Only, Text, Wire, check_tool_choice

_TEXT_PARTS = ("input_text", "output_text", "text", "reasoning_text")
_ECHO = 200  # characters of the client's own text that an error repeats


class InputItem(BaseModel):
    """Any item.

    What a client sends back of an output item besides (id, status, phase) is not looked at.
    """

    model_config = ConfigDict(extra="ignore", strict=True)

    type: str = "message"
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: Any = None
    call_id: Text | None = None
    name: Text | None = None
    arguments: Text | None = None
    output: Any = None


class TextOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    format: Annotated[Any, Only({"type": "text"})] = None
    verbosity: str | None = None


class CacheOptions(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)

    prewarm: bool | None = None  # fill the cache, answer nothing


class ResponseStreamOptions(Wire):
    include_obfuscation: Annotated[Any, Only(False)] = None


def _no_logprobs(wanted: str) -> str:
    if wanted.endswith(".logprobs"):
        raise ValueError("this server gives no log probabilities; leave it out")
    return wanted


class ResponsesRequest(Wire):
    """The body of POST /v1/responses. Null means the default everywhere."""

    model: Text = "default"
    input: Text | Annotated[list[InputItem], Field(max_length=MAX_MESSAGES)] = Field(min_length=1)
    instructions: Text | None = None
    previous_response_id: Text | None = None
    agent_id: Text | None = None
    agentmem: AgentOptions | None = None
    store: bool | None = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None

    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    text: TextOptions | None = None
    tools: list[Any] | None = None
    tool_choice: Annotated[Any, BeforeValidator(check_tool_choice)] = None
    parallel_tool_calls: bool | None = None

    # promise nothing about the output, or may be no more than wishes
    user: Text | None = None
    metadata: dict[Text, Text] | None = None
    client_metadata: dict[str, Any] | None = None
    service_tier: str | None = None
    safety_identifier: Text | None = None
    prompt_cache_key: Text | None = None
    prompt_cache_options: CacheOptions | None = None
    prompt_cache_retention: str | None = None
    reasoning: dict[str, Any] | None = None
    include: list[Annotated[str, AfterValidator(_no_logprobs)]] | None = None
    context_management: Any = None

    # would promise something that isn't there
    background: Annotated[Any, Only(False)] = None
    conversation: Annotated[Any, Only()] = None
    max_tool_calls: Annotated[Any, Only()] = None
    moderation: Annotated[Any, Only()] = None
    prompt: Annotated[Any, Only()] = None
    top_logprobs: Annotated[Any, Only(0)] = None
    truncation: Annotated[Any, Only("disabled")] = None

    @property
    def prewarm(self) -> bool:
        """Whether the cache is to be filled, and nothing answered."""
        return bool(self.prompt_cache_options and self.prompt_cache_options.prewarm)

    @property
    def messages(self) -> Messages:
        """The input in the chat format. InvalidRequest names what can't be read."""
        if isinstance(self.input, str):
            return [{"role": "user", "content": self.input}]
        return _messages(self.input)


def flat_tools(tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what `function_tools` returns in the format of Responses."""
    return [{"type": "function", **tool["function"], "strict": False} for tool in tools]


def _messages(items: list[InputItem]) -> Messages:
    """Return items as messages.

    Reasoning, a message and calls that follow one another are one message of the assistant's. So is
    text that follows calls: they wait for their results, so that no other answer can have begun.
    """
    messages: Messages = []
    whole = True  # nothing more belongs to the last message
    for i, item in enumerate(items):
        param = f"input.{i}"
        if item.type == "function_call_output":
            if item.call_id is None:
                _refuse(f"{param}.call_id", "missing, but required", "missing_required_parameter")
            text = _text(item.output, f"{param}.output")
            messages.append({"role": "tool", "tool_call_id": item.call_id, "content": text})
            whole = True
        elif item.type == "message" and item.role != "assistant":
            if item.role is None:
                _refuse(f"{param}.role", "missing, but required", "missing_required_parameter")
            messages.append({"role": item.role, "content": _text(item.content, f"{param}.content")})
            whole = True
        else:
            news = _of_assistant(item, param)
            if whole or _says_more(messages[-1], news):
                messages.append({"role": "assistant", "content": None})
            _extend(messages[-1], news)
            whole = False
    return messages


def _says_more(message: dict[str, Any], news: dict[str, Any]) -> bool:
    """Return whether text comes after text, with no call between: it is another message."""
    both_say = message["content"] is not None and news["content"] is not None
    return both_say and not message.get("tool_calls")


def _of_assistant(item: InputItem, param: str) -> dict[str, Any]:
    if item.type == "message":
        return {"content": _text(item.content, f"{param}.content")}
    if item.type == "reasoning":
        return {"content": None, "reasoning_content": _text(item.content or "", f"{param}.content")}
    if item.type != "function_call":
        kinds = "message, reasoning, function_call and function_call_output"
        message = f"{item.type[:_ECHO]!r} is not supported by this server; it reads {kinds}"
        _refuse(f"{param}.type", message)
    for name in ("call_id", "name", "arguments"):
        if not getattr(item, name) and (name != "arguments" or item.arguments is None):
            _refuse(f"{param}.{name}", "missing, but required", "missing_required_parameter")
    arguments_of(item.arguments, f"{param}.arguments")
    function = {"name": item.name, "arguments": item.arguments}
    call = {"id": item.call_id, "type": "function", "function": function}
    return {"content": None, "tool_calls": [call]}


def _extend(message: dict[str, Any], news: dict[str, Any]) -> None:
    if news["content"] is not None:
        message["content"] = (message["content"] or "") + news["content"]
    if thought := news.get("reasoning_content"):
        message["reasoning_content"] = message.get("reasoning_content", "") + thought
    if "tool_calls" in news:
        message["tool_calls"] = [*message.get("tool_calls", ()), *news["tool_calls"]]


def _text(content: Any, param: str) -> str:
    if isinstance(content, str):
        check_encodable(content, param)
        return content
    if not isinstance(content, list):
        _refuse(param, "must be a string or a list of parts with text", "invalid_type")
    texts = []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in _TEXT_PARTS:
            message = f"is of type {str(kind)[:_ECHO]!r}; this server reads only text"
            _refuse(f"{param}.{i}", message)
        if not isinstance(part.get("text"), str):
            _refuse(f"{param}.{i}.text", "must be a string", "invalid_type")
        check_encodable(part["text"], f"{param}.{i}.text")
        texts.append(part["text"])
    return "".join(texts)


def _refuse(param: str, message: str, code: str = "unsupported_parameter") -> NoReturn:
    raise InvalidRequest(f"{param}: {message}", param=param, code=code)
