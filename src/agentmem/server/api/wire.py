"""OpenAI's chat wire format: what a request may hold.

A parameter that promises something about the output is either honoured or refused (`Only`). One
that promises nothing about it (who asks, how to bill, where to cache) or that nobody knows is
accepted and not looked at.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NoReturn

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

from ...chat.messages import Chat
from ...chat.normalise import function_tools
from ...engine.api import SamplingParams
from ...errors import InvalidRequest
from ...transcripts.conversation import is_prefill
from .chat_messages import to_messages
from .scalars import (
    AlsoText,
    Factor,
    Flag,
    MaxTokens,
    Number,
    Share,
    Temperature,
    TopK,
    Whole,
    chosen,
)
from .thinking import thinking_options

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
_MAX_STOPS = 64
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


def _stop_list(stop: Any) -> Any:
    """Return the stop strings as a list; an empty one stops nothing."""
    if isinstance(stop, str):
        return [stop] if stop else []
    return [text for text in stop if text != ""] if isinstance(stop, list) else stop


_STOP_SCHEMA = {
    "anyOf": [
        {"type": "string", "maxLength": _LONGEST_STOP},
        {
            "type": "array",
            "items": {"type": "string", "maxLength": _LONGEST_STOP},
            "maxItems": _MAX_STOPS,
        },
    ]
}
# one, or several, of which the empty ones stop nothing
StopStrings = Annotated[
    list[Annotated[Text, Field(max_length=_LONGEST_STOP)]],
    Field(max_length=_MAX_STOPS),
    BeforeValidator(_stop_list),
    WithJsonSchema(_STOP_SCHEMA),
]


def _is_token_id(key: str) -> bool:
    return key.isascii() and key.isdigit() and len(key) < 10


def _metadata(value: Any) -> Any:
    """Return what a client notes of its request: an object, or nothing that is looked at."""
    return value if isinstance(value, dict) else None


class Wire(BaseModel):
    """Something in a request that holds no fields but those that are known."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


_FORMAT_SCHEMA = {"type": ["object", "null"]}
TOOL_CHOICE_SCHEMA = {
    "anyOf": [
        {"enum": [None, "none", "auto", "required"]},
        {"type": "object", "required": ["type"]},
    ]
}
_MESSAGE_SCHEMA = {
    "type": "object",
    "required": ["role"],
    "properties": {
        "role": {"enum": ["system", "developer", "user", "assistant", "tool"]},
        "content": {"type": "string"},
    },
}
# read by chat_messages.py: a history is not refused for its form
ChatMessage = Annotated[Any, WithJsonSchema(_MESSAGE_SCHEMA)]


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
        return Chat(to_messages(messages), tools=tools, options=self.chat_template_kwargs or {})


class ChatEnd(Wire):
    """The end of a chat's prompt: before an answer, or within the last message."""

    add_generation_prompt: Flag | None = None
    continue_final_message: Flag | None = None  # the answer goes on with it

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
    model_config = ConfigDict(extra="ignore")

    include_usage: Flag | None = None
    continuous_usage_stats: Flag | None = None  # with each chunk, as far as it has come
    include_obfuscation: Annotated[Any, Only(False)] = None


class SamplingInput(Wire):
    """How an answer's tokens are chosen, and where it ends."""

    temperature: Temperature | None = None
    top_p: Share | None = None
    top_k: TopK | None = None
    min_p: Share | None = None
    repetition_penalty: Factor | None = None
    repeat_penalty: Factor | None = None  # llama.cpp's name
    repetition_context_size: Annotated[Whole, Field(ge=1)] | None = None
    presence_penalty: Number | None = None
    frequency_penalty: Number | None = None
    # of token ids, or of texts: of all their tokens, as in llama.cpp
    logit_bias: Annotated[
        dict[Text, Annotated[Number, Field(ge=-100, le=100)]] | None, Field(max_length=1000)
    ] = None
    seed: Whole | None = None
    stop: StopStrings | None = None
    stop_token_ids: (
        Annotated[list[Annotated[Whole, Field(ge=0)]], Field(max_length=1000)] | None
    ) = None
    ignore_eos: Flag | None = None

    # would promise something that isn't there
    include_stop_str_in_output: Annotated[Any, Only(False)] = None
    min_tokens: Annotated[Any, Only(0)] = None
    mirostat: Annotated[Any, Only(0)] = None
    typical_p: Annotated[Any, Only(1, 1.0)] = None
    tfs_z: Annotated[Any, Only(1, 1.0)] = None
    dry_multiplier: Annotated[Any, Only(0, 0.0)] = None
    xtc_probability: Annotated[Any, Only(0, 0.0)] = None
    use_beam_search: Annotated[Any, Only(False)] = None
    bad_words: Annotated[Any, Only([])] = None
    allowed_token_ids: Annotated[Any, Only()] = None

    @property
    def biased_texts(self) -> dict[str, float]:
        """Texts whose tokens are biased, and by how much."""
        biases = (self.logit_bias or {}).items()
        return {text: bias for text, bias in biases if not _is_token_id(text)}

    def sampling_params(self, max_tokens: int, defaults: Mapping[str, Any]) -> SamplingParams:
        """Return what the body says, then `defaults`, then SamplingParams' own.

        `biased_texts` are still to be added.
        """
        same = {name: getattr(self, name) for name in _SAME_NAME}
        if same["repetition_penalty"] is None:
            same["repetition_penalty"] = self.repeat_penalty
        biases = (self.logit_bias or {}).items()
        top_k = None if self.top_k is None else max(self.top_k, 0)
        return SamplingParams(
            max_tokens=max_tokens,
            logit_bias=tuple((int(key), bias) for key, bias in biases if _is_token_id(key)),
            seed=None if self.seed is None else self.seed % 2**64,
            stop=tuple(self.stop or ()),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
            **chosen(defaults, **same, top_k=top_k),
        )


class CompletionInput(SamplingInput):
    """What OpenAI's bodies of chat completions and of completions have in common."""

    model_config = ConfigDict(extra="ignore")

    model: Text | None = None
    agent_id: Text | None = None
    n: (
        Annotated[int, Field(ge=1, le=MAX_CHOICES), AlsoText(r"([1-9]|1[0-6])(\.0{1,6})?")] | None
    ) = None
    stream: Flag | None = None
    stream_options: StreamOptions | None = None
    priority: Annotated[Whole, Field(ge=-1000, le=1000)] | None = None

    # what the answer's content must be, see structured.py: in OpenAI's words, and in vLLM's
    response_format: Annotated[Any, WithJsonSchema(_FORMAT_SCHEMA)] = None
    structured_outputs: Annotated[Any, WithJsonSchema(_FORMAT_SCHEMA)] = None
    guided_json: Annotated[Any, WithJsonSchema({"type": ["object", "string", "null"]})] = None
    guided_regex: Text | None = None
    guided_choice: list[Text] | None = None
    guided_grammar: Text | None = None
    guided_decoding_backend: str | None = None
    guided_whitespace_pattern: str | None = None

    # say who the agent is, in one form or other
    user: Any = None
    metadata: Annotated[dict[str, Any] | None, BeforeValidator(_metadata), WithJsonSchema({})] = (
        None
    )
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    store: Flag | None = None


class ChatCompletionRequest(TemplateInput, ChatEnd, CompletionInput):
    """The body of POST /v1/chat/completions. Null means the default everywhere."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    agentmem: AgentOptions | None = None

    max_tokens: MaxTokens | None = None
    max_completion_tokens: MaxTokens | None = None
    max_new_tokens: MaxTokens | None = None  # the name that Transformers has for it

    tool_choice: Annotated[Any, WithJsonSchema(TOOL_CHOICE_SCHEMA)] = None
    parallel_tool_calls: Flag | None = None
    logprobs: Flag | None = None
    top_logprobs: Annotated[Whole, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None

    # ways to say whether, and how much, a model is to think before it answers
    enable_thinking: Any = None
    think: Any = None
    thinking: Any = None
    reasoning: Any = None
    reasoning_effort: Any = None

    # would promise something that isn't there
    functions: Annotated[Any, Only([])] = None
    function_call: Annotated[Any, Only("none", "auto")] = None
    modalities: Annotated[Any, Only(["text"])] = None
    audio: Annotated[Any, Only()] = None
    web_search_options: Annotated[Any, Only()] = None
    best_of: Annotated[Any, Only(1)] = None
    echo: Annotated[Any, Only(False)] = None
    prompt_logprobs: Annotated[Any, Only(0)] = None

    @field_validator("top_logprobs")
    @classmethod
    def _of_logprobs(cls, count: int | None, info: ValidationInfo) -> int | None:
        if count and not info.data.get("logprobs"):
            raise ValueError("needs logprobs, true")
        return count

    @property
    def max_answer_tokens(self) -> int | None:
        """The smallest limit that the body names; -1: none is wanted; None: none is named."""
        named = (self.max_tokens, self.max_completion_tokens, self.max_new_tokens)
        given = [limit for limit in named if limit is not None]
        return min((limit for limit in given if limit >= 0), default=-1 if given else None)

    @property
    def template_options(self) -> dict[str, Any]:
        """The chat template's options, of whatever field they came in."""
        wishes = thinking_options(
            self.enable_thinking, self.think, self.thinking, self.reasoning, self.reasoning_effort
        )
        return wishes | (self.chat_template_kwargs or {})

    @property
    def num_logprobs(self) -> int | None:
        """How many of the likeliest tokens are to be told with each; None: nothing is."""
        return (self.top_logprobs or 0) if self.logprobs else None
