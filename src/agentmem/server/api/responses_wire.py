"""OpenAI's Responses wire format: what a request may hold, and its input as chat messages."""

from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
)
from pydantic_core import PydanticCustomError

from ...chat.grammar import ContentFormat
from ...transcripts.turns import Messages
from .response_items import loaded_tools, to_messages
from .response_tools import OfferedTools, offered_tools
from .scalars import Flag, MaxTokens, Share, Temperature, Whole
from .structured import response_format
from .wire import (
    MAX_MESSAGES,
    MAX_TOP_LOGPROBS,
    TOOL_CHOICE_SCHEMA,
    AgentOptions,
    Only,
    Text,
    Wire,
)

_ITEM_SCHEMA = {
    "type": "object",
    "properties": {"type": {"type": ["string", "null"]}, "role": {"type": ["string", "null"]}},
}
_INPUT_SCHEMA = {
    "anyOf": [
        {"type": "string", "minLength": 1},
        {"type": "array", "items": _ITEM_SCHEMA, "minItems": 1, "maxItems": MAX_MESSAGES},
    ]
}


def _text_or_items(value: Any) -> Any:
    """Return an input of the form that `to_messages` takes; what is in an item is checked there."""
    if not isinstance(value, str | list):
        raise PydanticCustomError("input_type", "must be a string or a list of items")
    if not value:
        raise ValueError("must not be empty")
    if isinstance(value, list):
        if len(value) > MAX_MESSAGES:
            raise ValueError(f"must not hold more than {MAX_MESSAGES} items")
        if not all(isinstance(item, dict) for item in value):
            raise PydanticCustomError("input_type", "every item must be an object")
    return value


class TextOptions(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)

    format: Annotated[Any, WithJsonSchema({"type": ["object", "null"]})] = None
    verbosity: str | None = None


class CacheOptions(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)

    prewarm: bool | None = None  # fill the cache, answer nothing


_LOGPROBS = "message.output_text.logprobs"


def _no_other_logprobs(wanted: str) -> str:
    if wanted.endswith(".logprobs") and wanted != _LOGPROBS:
        raise ValueError(f"this server has log probabilities only as {_LOGPROBS}; leave it out")
    return wanted


class ResponsesRequest(Wire):
    """The body of POST /v1/responses. Null means the default everywhere.

    Fields that are not known here are wishes: clients send many, and each release more.
    """

    model_config = ConfigDict(extra="ignore")

    model: Text | None = None
    input: Annotated[Any, BeforeValidator(_text_or_items), WithJsonSchema(_INPUT_SCHEMA)]
    instructions: Text | None = None
    previous_response_id: Text | None = None
    agent_id: Text | None = None
    agentmem: AgentOptions | None = None
    store: Flag | None = None
    stream: Flag | None = None
    stream_options: dict[str, Any] | None = None

    max_output_tokens: MaxTokens | None = None
    temperature: Temperature | None = None
    top_p: Share | None = None
    text: TextOptions | None = None
    tools: list[Any] | None = None
    tool_choice: Annotated[Any, WithJsonSchema(TOOL_CHOICE_SCHEMA)] = None
    parallel_tool_calls: Flag | None = None

    # promise nothing about the output, or may be no more than wishes
    user: Any = None
    metadata: dict[Text, Any] | None = None
    client_metadata: dict[str, Any] | None = None
    service_tier: str | None = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_options: CacheOptions | None = None
    prompt_cache_retention: str | None = None
    reasoning: dict[str, Any] | None = None
    top_logprobs: Annotated[Whole, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    include: list[Annotated[str, AfterValidator(_no_other_logprobs)]] | None = None
    context_management: Any = None
    max_tool_calls: Any = None  # of tools that are not there
    truncation: Any = None  # of an input that is too long: an error says so

    # would promise something that isn't there
    background: Annotated[Any, Only(False)] = None
    conversation: Annotated[Any, Only()] = None
    moderation: Annotated[Any, Only()] = None
    prompt: Annotated[Any, Only()] = None

    @property
    def prewarm(self) -> bool:
        """Whether the cache is to be filled, and nothing answered."""
        return bool(self.prompt_cache_options and self.prompt_cache_options.prewarm)

    def content_format(self) -> ContentFormat | None:
        """Return what the content must be. InvalidRequest: that is not supported."""
        return response_format(self.text and self.text.format, "text.format")

    @property
    def echoed_format(self) -> dict[str, Any]:
        """What a response says of its text's format; a schema has a name, whatever was sent."""
        given = self.text and self.text.format
        if not isinstance(given, dict):
            return {"type": "text"}
        return {"name": "response", **given} if given.get("type") == "json_schema" else given

    @property
    def num_logprobs(self) -> int | None:
        """How many of the likeliest tokens are to be told with each; None: nothing is."""
        if self.top_logprobs or _LOGPROBS in (self.include or ()):
            return self.top_logprobs or 0
        return None

    @property
    def messages(self) -> Messages:
        """The input in the chat format. InvalidRequest names what can't be read."""
        if isinstance(self.input, str):
            return [{"role": "user", "content": self.input}]
        return to_messages(self.input)

    @property
    def offered_tools(self) -> OfferedTools:
        """The tools as a model knows them. InvalidRequest names what can't be read."""
        items = self.input if isinstance(self.input, list) else []
        return offered_tools(self.tools, loaded_tools(items))
