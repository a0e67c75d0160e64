"""A model's chat template: what it reads of a message, and what it ignores."""

import inspect
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, TypeVar

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from ..errors import InvalidRequest
from .markup import Markup
from .messages import (
    Message,
    Role,
    ToolCall,
    check_encodable,
    one_call_each,
    without_system_between,
)

T = TypeVar("T")
_RESERVED = {*inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters, "messages"}
_MAX_OPTIONS = 64  # sets of them that are remembered
_HELLO = Message("user", "hello")
_CALL = ToolCall("call00001", "get_weather", {"city": "Paris"})
_TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "Its name."}},
        },
    },
}


class ChatTemplate:
    """Of one tokenizer, an mlx_lm TokenizerWrapper. To be used in one thread."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._source = source_of(tokenizer)
        self.markup = Markup.of(tokenizer)
        self._asked: dict[str, str] = {}  # by the template's options

    def render(
        self, messages: Sequence[Message], to_tokens: Callable[[list[dict[str, Any]]], T]
    ) -> T:
        """What `to_tokens` makes of the messages as the template takes them. InvalidRequest: it
        refuses them.

        A template that wants one system message at most gets one, see `without_system_between`; one
        that wants one tool call at most in a message gets that, see `one_call_each`.
        """
        refused: TemplateError | TypeError | RecursionError | None = None
        for attempt in self._attempts(messages):
            try:
                return to_tokens(self.dicts(attempt))
            except (
                TemplateError,
                TypeError,
                RecursionError,
            ) as e:  # it does with a value what can't be done with it
                refused = refused or e
        why = (refused.message if isinstance(refused, TemplateError) else str(refused)) or type(
            refused
        ).__name__
        raise InvalidRequest(
            f"The model's chat template refuses these messages: {why}", param="messages"
        ) from refused

    def dicts(self, messages: Iterable[Message]) -> list[dict[str, Any]]:
        """As Hugging Face's templates have them: arguments of a tool call are an object."""
        return [self._dict(message) for message in messages]

    def check(
        self, messages: Iterable[Message], tools: Collection[Any], options: Mapping[str, Any]
    ) -> None:
        """InvalidRequest where something would not be in the prompt, since the template ignores it."""
        if tools and not self._takes_tools:
            why = "This model's chat template ignores tools, so it would not know of them"
            raise InvalidRequest(
                f"{why}; leave them out, or serve a model with tool calling.", param="tools"
            )
        if any(m.tool_calls for m in messages) and not self._takes_calls:
            why = "This model's chat template ignores tool calls, so they would be missing in the prompt"
            raise InvalidRequest(f"{why}; serve a model with tool calling.", param="messages")
        if taken := sorted(_RESERVED & set(options)):
            message = f"chat_template_kwargs must not hold {taken[0]!r}: the server sets it."
            raise InvalidRequest(message, param=f"chat_template_kwargs.{taken[0]}")
        check_encodable(dict(options), "chat_template_kwargs")

    def asks_for_answer(self, options: Mapping[str, Any]) -> str:
        """What the template puts behind the last message where an answer is to follow; "" if it
        can't be told.
        """
        key = repr(sorted(options.items()))
        if key not in self._asked:
            without = self._probe([_HELLO], **options)
            with_it = self._probe([_HELLO], add_generation_prompt=True, **options)
            known = without is not None and with_it is not None and with_it.startswith(without)
            if len(self._asked) >= _MAX_OPTIONS:
                self._asked.clear()
            self._asked[key] = (
                with_it[len(without) :] if known and with_it and without is not None else ""
            )
        return self._asked[key]

    def ends_in_reasoning(self, tokens: Sequence[int]) -> bool:
        """Whether the prompt has opened the reasoning, so that the answer begins within it."""
        start = self.markup.think_start
        return start is not None and self._tokenizer.decode(list(tokens[-16:])).rstrip().endswith(
            start
        )

    def _attempts(self, messages: Sequence[Message]) -> Iterator[Sequence[Message]]:
        first = without_system_between(messages) if self._loses_system(messages) else list(messages)
        yield first
        for change in (without_system_between, one_call_each):
            if (changed := change(first)) != first:
                yield changed

    def _loses_system(self, messages: Sequence[Message]) -> bool:
        """Whether there are system messages after the first that would not be in the prompt."""
        return (
            any(m.role in ("system", "developer") for m in messages[1:])
            and self._ignores_late_system
        )

    def _dict(self, message: Message) -> dict[str, Any]:
        role: Role = message.role
        if role == "developer" and "developer" not in self._source:
            role = "system"
        found: dict[str, Any] = {"role": role, "content": message.content}
        if message.name is not None:
            found["name"] = message.name
        if message.tool_call_id is not None:
            found["tool_call_id"] = message.tool_call_id
        if message.tool_calls:
            found["tool_calls"] = [
                {
                    "id": c.id,
                    "type": "function",
                    "function": {"name": c.name, "arguments": c.arguments},
                }
                for c in message.tool_calls
            ]
        return found | self._reasoning(message)

    def _reasoning(self, message: Message) -> dict[str, str]:
        """Under each name that the template reads. gpt-oss' refuses `thinking` beside what is said
        before a call.
        """
        if message.reasoning is None:
            return {}
        names = {"reasoning_content"} | {
            n for n in ("reasoning", "thinking") if re.search(_read(n), self._source)
        }
        if message.content and message.tool_calls:
            names.discard("thinking")
        return dict.fromkeys(sorted(names), message.reasoning)

    @cached_property
    def _takes_tools(self) -> bool:
        with_tools = self._probe([_HELLO], tools=[_TOOL])
        return with_tools is None or with_tools != self._probe([_HELLO])

    @cached_property
    def _ignores_late_system(self) -> bool:
        late = Message("system", "be quick")
        first, answer = Message("system", "hello"), Message("assistant", "hello")
        texts = [
            self._probe(probe)
            for probe in ([first, late, _HELLO], [first, _HELLO, answer, late, _HELLO])
        ]
        return any(text is not None and late.content not in text for text in texts)

    @cached_property
    def _takes_calls(self) -> bool:
        result = Message("tool", "rain", _CALL.name, tool_call_id=_CALL.id)
        answers = [Message("assistant", "", tool_calls=calls) for calls in ((_CALL,), ())]
        with_call, without = (
            self._probe([_HELLO, answer, result], tools=[_TOOL]) for answer in answers
        )
        return with_call is None or with_call != without

    def _probe(self, messages: Sequence[Message], **options: Any) -> str | None:
        """None: the template refuses them."""
        try:
            text: str = self._tokenizer.apply_chat_template(
                self.dicts(messages), tokenize=False, **options
            )
        except (TemplateError, TypeError):
            return None
        return text


def source_of(tokenizer: Any) -> str:
    """The text of a tokenizer's chat template, of all of them where it has several; "" where it has
    none.
    """
    template = tokenizer.chat_template
    return "\n".join(template.values()) if isinstance(template, dict) else template or ""


def _read(name: str) -> str:
    """A pattern for where a template reads this field of a message."""
    return rf"""\.{name}\b|\[['"]{name}['"]\]|['"]{name}['"] in |\.get\(['"]{name}['"]"""
