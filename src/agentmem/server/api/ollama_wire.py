"""Ollama's wire format: what a request may hold. What its messages say is in ollama_messages.py.

What an option wishes for the model's loading, or for hardware, passes unseen: the model is loaded.
"""

import re
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Request
from fastapi.routing import APIRoute
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema
from starlette.responses import Response

from ...chat.grammar import ContentFormat, any_json_content, json_content
from ...chat.normalise import function_tools
from ...engine.api import SamplingParams
from ...transcripts.turns import Messages
from .scalars import chosen
from .wire import MAX_MESSAGES, MAX_TOP_LOGPROBS, AgentOptions, Only, Text

_ALL_TOKENS = 1 << 30  # a window of the repeat penalty that holds every prompt
_NO_TIME = re.compile(r"[+-]?0*\.?0+(ns|us|µs|ms|s|m|h)?")


class AnyContentType(APIRoute):
    """A route that takes a body for JSON whatever its content-type says, as Ollama does.

    A request of a web page, which has an Origin, must name JSON: that is what makes a browser ask
    first whether the page may.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            headers = request.scope["headers"]
            if not any(name == b"origin" for name, _ in headers):
                others = [(name, value) for name, value in headers if name != b"content-type"]
                request.scope["headers"] = [*others, (b"content-type", b"application/json")]
            return await handler(request)

        return handle


def add_post(app: FastAPI, path: str, handler: Callable[..., Any]) -> None:
    """Add a route of Ollama's that takes a body."""
    app.router.add_api_route(
        path, handler, methods=["POST"], response_model=None, route_class_override=AnyContentType
    )


class _Body(BaseModel):
    """Something in a request. Fields that are not known are ignored, as Ollama does it."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)


def _truncated(value: Any) -> Any:
    return int(value) if isinstance(value, float) and abs(value) < 2**63 else value


def _stop_list(stop: Any) -> Any:
    stops = [stop] if isinstance(stop, str) else stop
    return [text for text in stops if text != ""] if isinstance(stops, list) else stops


Whole = Annotated[int, BeforeValidator(_truncated)]  # a fraction is cut off, as Ollama does it


class OllamaOptions(_Body):
    """The options that an answer depends on; values beyond their bounds mean the nearest one."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: Whole | None = None
    min_p: float | None = None
    repeat_penalty: float | None = None
    repeat_last_n: Whole | None = None  # tokens; 0: no penalty, -1: all
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: Whole | None = None  # below 0: any
    num_predict: Whole | None = None  # tokens of the answer; below 0: as many as there is room for
    stop: Annotated[
        list[Annotated[Text, Field(max_length=1000)]] | None,
        Field(max_length=16),
        BeforeValidator(_stop_list),
    ] = None

    def sampling_params(
        self, default_max_tokens: int, defaults: Mapping[str, Any]
    ) -> SamplingParams:
        """Return what the options say, then `defaults`, then Ollama's own."""
        own = {"temperature": 0.8, "top_p": 0.9, "top_k": 40, "min_p": 0.0, **defaults}
        given = {name: getattr(self, name) for name in ("temperature", "top_p", "top_k", "min_p")}
        told = chosen(own, **given)
        max_tokens = default_max_tokens if self.num_predict is None else self.num_predict
        window = 64 if self.repeat_last_n is None else self.repeat_last_n
        penalty = self.repeat_penalty or defaults.get("repetition_penalty") or 1.0
        return SamplingParams(
            max_tokens=max_tokens if max_tokens >= 0 else _ALL_TOKENS,
            temperature=max(told["temperature"], 0.0),
            top_p=min(max(told["top_p"], 1e-6), 1.0),
            top_k=max(told["top_k"], 0),
            min_p=min(max(told["min_p"], 0.0), 1.0),
            repetition_penalty=penalty if penalty > 0 and window != 0 else 1.0,
            repetition_context_size=window if window > 0 else _ALL_TOKENS,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            seed=None if self.seed is None or self.seed < 0 else self.seed % 2**64,
            stop=tuple(self.stop or ()),
        )


class OllamaRequest(_Body):
    """What bodies of /api/chat and of /api/generate have in common. Null means the default."""

    model: Text | None = None
    stream: bool | None = None  # by default true
    think: bool | Literal["low", "medium", "high", "max"] | None = None
    options: OllamaOptions | None = None
    keep_alive: float | str | None = None  # 0 without a prompt: an unload; else a wish
    agent_id: Text | None = None
    agentmem: AgentOptions | None = None

    logprobs: bool | None = None
    top_logprobs: Annotated[Whole, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None

    format: Annotated[Any, WithJsonSchema({"type": ["string", "object", "null"]})] = None

    def content_format(self) -> ContentFormat | None:
        """Return what the content must be: any JSON object, or JSON of a schema.

        InvalidRequest: that is not supported.
        """
        if self.format in (None, ""):
            return None
        if self.format == "json":
            return any_json_content("format")
        return json_content(self.format, "format")

    @property
    def template_options(self) -> dict[str, Any]:
        """The chat template's options: where nothing is said of thinking the template decides."""
        if self.think is None:
            return {}
        options: dict[str, Any] = {"enable_thinking": self.think is not False}
        if isinstance(self.think, str):
            options["reasoning_effort"] = "high" if self.think == "max" else self.think
        return options

    @property
    def unloads(self) -> bool:
        """Whether, without a prompt, it asks that the model leaves memory at once."""
        keep = self.keep_alive
        return bool(_NO_TIME.fullmatch(keep)) if isinstance(keep, str) else keep == 0

    def sampling_params(
        self, default_max_tokens: int, defaults: Mapping[str, Any]
    ) -> SamplingParams:
        """Return what the body says, then `defaults`, then Ollama's own."""
        options = self.options or OllamaOptions()
        params = options.sampling_params(default_max_tokens, defaults)
        return replace(params, logprobs=(self.top_logprobs or 0) if self.logprobs else None)


class OllamaChatRequest(OllamaRequest):
    """The body of POST /api/chat."""

    messages: Annotated[list[dict[str, Any]] | None, Field(max_length=MAX_MESSAGES)] = None
    tools: list[Any] | None = None

    def function_tools(self) -> list[dict[str, Any]]:
        """Return the tools, whose type may be missing. InvalidRequest names what can't be read."""
        typed = [
            {"type": "function", **tool} if isinstance(tool, dict) else tool
            for tool in self.tools or ()
        ]
        return function_tools(typed)


class OllamaGenerateRequest(OllamaRequest):
    """The body of POST /api/generate."""

    prompt: Text | None = None
    system: Text | None = None
    raw: bool | None = None  # the prompt goes to the model as it is
    context: list[int] | None = None  # tokens that go before the prompt, from an earlier answer

    # would promise something that isn't there
    images: Annotated[Any, Only([])] = None
    suffix: Annotated[Any, Only("")] = None
    template: Annotated[Any, Only("")] = None

    @property
    def messages(self) -> Messages:
        """What is said, in the shape of OpenAI's chat."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {"role": "user", "content": self.prompt or ""}]


class OllamaShowRequest(_Body):
    """The body of POST /api/show."""

    model: Text | None = None
    name: Text | None = None  # what the model's field was called before
