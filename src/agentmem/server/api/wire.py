"""OpenAI's chat wire format: what a request may hold.

A parameter that promises something about the output is either honoured or refused (`Only`). One
that promises nothing about it (who asks, how to bill, where to cache) is accepted and not looked
at.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NoReturn

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from ...chat.messages import Chat, function_tools
from ...engine.api import SamplingParams
from ...errors import InvalidRequest
from ...transcripts.conversation import is_prefill
from ...transcripts.turns import Messages

MAX_CHOICES = 16  # answers to one prompt
MAX_TOP_LOGPROBS = 20  # of each token
MAX_MESSAGES = 10_000  # of a request: they are checked on the event loop
_SAME_NAME = (  # in the body and in SamplingParams
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "repetition_context_size",
    "presence_penalty",
    "frequency_penalty",
)
_MAX_STOPS = 16
_LONGEST_STOP = 1000  # characters


def _unsupported(what: str) -> NoReturn:
    raise PydanticCustomError("unsupported_parameter", "{what}", {"what": what})


@dataclass(frozen=True, init=False, eq=False)  # else typing takes Only(0) and Only(False) for one
class Only:
    """Annotates a field whose feature isn't there.

    Null and what is `allowed` pass, anything else is refused.
    """

    allowed: tuple[Any, ...]

    def __init__(self, *allowed: Any):
        object.__setattr__(self, "allowed", allowed)

    def check(self, value: Any) -> Any:
        """Return `value` if it passes."""
        same = (type(value) is type(a) and value == a for a in self.allowed)
        if value is not None and not any(same):
            use = f", or use {' or '.join(map(repr, self.allowed))}" if self.allowed else ""
            _unsupported(f"this is not supported by this server; leave it out{use}")
        return value

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_before_validator_function(self.check, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        return {"enum": [None, *self.allowed]}


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise ValueError(f"not valid Unicode: lone surrogate at character {e.start}") from None
    return text


Text = Annotated[str, AfterValidator(_encodable)]


def _known_role(role: Any) -> Any:
    if role == "function":
        _unsupported("messages of role 'function' are not supported by this server; use 'tool'")
    return role


def _arguments(arguments: Any) -> Any:
    if not isinstance(arguments, str | dict):
        raise ValueError("must be a JSON object, as such or in a string")
    return arguments


def _stop_list(stop: Any) -> Any:
    return [stop] if isinstance(stop, str) else stop


def _token_ids(bias: dict[str, float] | None) -> dict[str, float] | None:
    for key in bias or {}:
        if not (key.isascii() and key.isdigit() and len(key) < 10):
            raise ValueError('every key must be a token id, such as "50256"')
    return bias


class Wire(BaseModel):
    """Something in a request that holds no fields but those that are known."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class FunctionCall(Wire):
    name: Annotated[Text, Field(min_length=1)]
    arguments: Annotated[
        Any, BeforeValidator(_arguments), WithJsonSchema({"type": ["string", "object"]})
    ]


class ToolCallBody(Wire):
    id: Text
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = None  # of a delta, which a client put together


_CONTENT_SCHEMA = {
    "type": ["string", "array", "null"],
    "items": {"type": "object", "required": ["type", "text"]},
}


_FORMAT_SCHEMA = {"type": ["object", "null"]}
TOOL_CHOICE_SCHEMA = {
    "anyOf": [
        {"enum": [None, "none", "auto", "required"]},
        {"type": "object", "required": ["type"]},
    ]
}


class ChatMessage(Wire):
    role: Annotated[
        Literal["system", "developer", "user", "assistant", "tool"], BeforeValidator(_known_role)
    ]
    content: Annotated[Any, WithJsonSchema(_CONTENT_SCHEMA)] = None
    name: Text | None = None
    tool_calls: list[ToolCallBody] | None = None
    tool_call_id: Text | None = None
    reasoning_content: Text | None = None
    reasoning: Text | None = None
    # what a client sends back of an earlier answer, where it holds nothing
    refusal: Annotated[Any, Only()] = None
    audio: Annotated[Any, Only()] = None
    function_call: Annotated[Any, Only()] = None
    annotations: Annotated[Any, Only([])] = None


def said(messages: Sequence[ChatMessage]) -> Messages:
    """Return messages as transcripts hold them, and `Chat` takes them."""
    return [message.model_dump(exclude_none=True) for message in messages]


class AgentLife(Wire):
    """What a request says of how long its agent is kept."""

    # s that it is kept after its last use
    ttl: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    ephemeral: bool | None = None  # a new agent is never written to disk


class AgentOptions(AgentLife):
    """The field `agentmem` of a request: what it says of its agent."""

    # the transcript holds what was said before
    continue_: bool | None = Field(default=None, alias="continue")
    turn: Text | None = None  # where to continue, by default the newest

    @model_validator(mode="after")
    def _where(self) -> "AgentOptions":
        if self.turn is not None and not self.continue_:
            raise ValueError("turn says where to continue: it needs continue, true")
        return self


class TemplateInput(Wire):
    """What a prompt depends on, besides its messages."""

    tools: list[Any] | None = None
    chat_template_kwargs: dict[Text, Any] | None = Field(default=None, max_length=1000)

    def chat(self, messages: Sequence[ChatMessage]) -> Chat:
        """Return what a prompt is rendered from. InvalidRequest names tools that can't be read."""
        tools = function_tools(self.tools)
        return Chat(said(messages), tools=tools, options=self.chat_template_kwargs or {})


class ChatEnd(Wire):
    """The end of a chat's prompt: before an answer, or within the last message."""

    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None  # the answer goes on with it

    @field_validator("continue_final_message")
    @classmethod
    def _one_end(cls, continues: bool | None, info: ValidationInfo) -> bool | None:
        if continues and info.data.get("add_generation_prompt") is not False:
            raise ValueError("needs add_generation_prompt, false")
        return continues

    def check_end(self, messages: Sequence[Mapping[str, Any]]) -> None:
        """Raise InvalidRequest where the last message is to be gone on with and can't be."""
        if self.continue_final_message and not is_prefill(messages):
            message = (
                "continue_final_message: the last message must be the assistant's, with content "
                "and without tool_calls"
            )
            raise InvalidRequest(message, param="continue_final_message")


class StreamOptions(Wire):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None  # with each chunk, as far as it has come
    include_obfuscation: Annotated[Any, Only(False)] = None


class SamplingInput(Wire):
    """How an answer's tokens are chosen, and where it ends."""

    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    repetition_context_size: Annotated[int, Field(ge=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: Annotated[
        dict[str, Annotated[float, Field(ge=-100, le=100)]] | None, AfterValidator(_token_ids)
    ] = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Annotated[
        list[Annotated[Text, Field(min_length=1, max_length=_LONGEST_STOP)]] | None,
        Field(max_length=_MAX_STOPS),
        BeforeValidator(_stop_list),
    ] = None
    ignore_eos: bool | None = None

    def sampling_params(self, max_tokens: int) -> SamplingParams:
        """Return what the body says, with SamplingParams' defaults for the rest."""
        same = {name: getattr(self, name) for name in _SAME_NAME}
        biases = (self.logit_bias or {}).items()
        return SamplingParams(
            max_tokens=max_tokens,
            top_k=max(self.top_k or 0, 0),
            logit_bias=tuple((int(token), bias) for token, bias in biases),
            seed=None if self.seed is None else self.seed % 2**64,
            stop=tuple(self.stop or ()),
            ignore_eos=bool(self.ignore_eos),
            **{name: value for name, value in same.items() if value is not None},
        )


class CompletionInput(SamplingInput):
    """What OpenAI's bodies of chat completions and of completions have in common."""

    model: Text = "default"
    agent_id: Text | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    priority: Annotated[int, Field(ge=-1000, le=1000)] | None = None

    # what the answer's content must be, see structured.py: in OpenAI's words, and in vLLM's
    response_format: Annotated[Any, WithJsonSchema(_FORMAT_SCHEMA)] = None
    structured_outputs: Annotated[Any, WithJsonSchema(_FORMAT_SCHEMA)] = None
    guided_json: Annotated[Any, WithJsonSchema({"type": ["object", "string", "null"]})] = None
    guided_regex: Text | None = None
    guided_choice: list[Text] | None = None
    guided_grammar: Text | None = None
    guided_decoding_backend: str | None = None
    guided_whitespace_pattern: str | None = None

    # promise nothing about the output
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    prompt_cache_retention: str | None = None


class ChatCompletionRequest(TemplateInput, ChatEnd, CompletionInput):
    """The body of POST /v1/chat/completions. Null means the default everywhere."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    agentmem: AgentOptions | None = None

    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None

    tool_choice: Annotated[Any, WithJsonSchema(TOOL_CHOICE_SCHEMA)] = None
    parallel_tool_calls: bool | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None

    # would promise something that isn't there
    functions: Annotated[Any, Only([])] = None
    function_call: Annotated[Any, Only("none", "auto")] = None
    modalities: Annotated[Any, Only(["text"])] = None
    audio: Annotated[Any, Only()] = None
    prediction: Annotated[Any, Only()] = None
    reasoning_effort: Annotated[Any, Only()] = None
    verbosity: Annotated[Any, Only()] = None
    moderation: Annotated[Any, Only()] = None
    web_search_options: Annotated[Any, Only()] = None

    @field_validator("top_logprobs")
    @classmethod
    def _of_logprobs(cls, count: int | None, info: ValidationInfo) -> int | None:
        if count and not info.data.get("logprobs"):
            raise ValueError("needs logprobs, true")
        return count

    @property
    def num_logprobs(self) -> int | None:
        """How many of the likeliest tokens are to be told with each; None: nothing is."""
        return (self.top_logprobs or 0) if self.logprobs else None
