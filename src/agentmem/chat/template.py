"""A model's chat template: what it reads of a message, what it ignores, what it refuses."""

import inspect
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import takewhile
from typing import Any, TypeVar

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from ..errors import InvalidRequest
from .markup import Markup
from .messages import SYSTEM_ROLES, Message, Role, ToolCall, check_encodable

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
    """The chat template of one tokenizer. To be used in one thread."""

    def __init__(self, tokenizer: Any):
        """`tokenizer` is an mlx_lm TokenizerWrapper."""
        self._tokenizer = tokenizer
        self._source = source_of(tokenizer)
        self.markup = Markup.of(tokenizer)
        self._asked: dict[str, str] = {}  # by the template's options

    def render(
        self, messages: Sequence[Message], to_tokens: Callable[[list[dict[str, Any]]], T]
    ) -> T:
        """Return what `to_tokens` makes of the messages as the template takes them.

        A template that wants one system message at most gets one, see `without_system_between`; one
        that wants one tool call at most in a message gets that, see `one_call_each`.
        InvalidRequest: it refuses them.
        """
        refused: TemplateError | TypeError | RecursionError | None = None
        for attempt in self._attempts(messages):
            try:
                return to_tokens(self.dicts(attempt))
            except (TemplateError, TypeError, RecursionError) as e:
                # the last two: it does with a value what can't be done with it
                refused = refused or e
        why = refused.message if isinstance(refused, TemplateError) else str(refused)
        raise InvalidRequest(
            f"The model's chat template refuses these messages: {why or type(refused).__name__}",
            param="messages",
        ) from refused

    def dicts(self, messages: Iterable[Message]) -> list[dict[str, Any]]:
        """Return messages as Hugging Face's templates have them: a call's arguments an object."""
        return [self._dict(message) for message in messages]

    def check(
        self, messages: Iterable[Message], tools: Collection[Any], options: Mapping[str, Any]
    ) -> None:
        """Raise InvalidRequest where the template ignores something, so no prompt would hold it."""
        if tools and not self.takes_tools:
            why = "This model's chat template ignores tools, so it would not know of them"
            raise InvalidRequest(
                f"{why}; leave them out, or serve a model with tool calling.", param="tools"
            )
        if any(m.tool_calls for m in messages) and not self._takes_calls:
            message = (
                "This model's chat template ignores tool calls, so they would be missing in the "
                "prompt; serve a model with tool calling."
            )
            raise InvalidRequest(message, param="messages")
        if taken := sorted(_RESERVED & set(options)):
            message = f"chat_template_kwargs must not hold {taken[0]!r}: the server sets it."
            raise InvalidRequest(message, param=f"chat_template_kwargs.{taken[0]}")
        check_encodable(dict(options), "chat_template_kwargs")

    def asks_for_answer(self, options: Mapping[str, Any]) -> str:
        """Return what the template puts behind the last message where an answer is to follow.

        It is empty if that can't be told.
        """
        key = repr(sorted(options.items()))
        if key not in self._asked:
            without = self._probe([_HELLO], **options)
            with_it = self._probe([_HELLO], add_generation_prompt=True, **options)
            if len(self._asked) >= _MAX_OPTIONS:
                self._asked.clear()
            self._asked[key] = ""
            if without is not None and with_it is not None and with_it.startswith(without):
                self._asked[key] = with_it.removeprefix(without)
        return self._asked[key]

    def opens_reasoning(self, text: str) -> bool:
        """Return whether a text of the assistant's has begun to reason, and not ended."""
        start = self.markup.think_start
        if not start or start not in text:
            return False
        return self._tokenizer.think_end not in text.rpartition(start)[2]

    def ends_in_reasoning(self, tokens: Sequence[int]) -> bool:
        """Return whether the prompt has opened the reasoning, so that the answer begins in it."""
        start = self.markup.think_start
        if start is None:
            return False
        end: str = self._tokenizer.decode(list(tokens[-16:]))
        return end.rstrip().endswith(start)

    def rendered(self, messages: Sequence[Message], **options: Any) -> str | None:
        """Return the text of messages; None: the template refuses them, in whatever way."""
        try:
            return self._probe(messages, **options)
        except (ValueError, LookupError, AttributeError, ArithmeticError, RecursionError):
            return None  # it does with a message what can't be done with it

    def _attempts(self, messages: Sequence[Message]) -> Iterator[Sequence[Message]]:
        first = without_system_between(messages) if self._loses_system(messages) else list(messages)
        yield first
        for change in (without_system_between, one_call_each):
            if (changed := change(first)) != first:
                yield changed

    def _loses_system(self, messages: Sequence[Message]) -> bool:
        """Return whether a system message after the first would not be in the prompt."""
        has_late = any(message.role in SYSTEM_ROLES for message in messages[1:])
        return has_late and self._ignores_late_system

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
            found["tool_calls"] = [_call_dict(call) for call in message.tool_calls]
        return found | self._reasoning(message)

    def _reasoning(self, message: Message) -> dict[str, str]:
        """Return the reasoning under each name that the template reads.

        gpt-oss' refuses `thinking` beside what is said before a call.
        """
        if message.reasoning is None:
            return {}
        names = {n for n in ("reasoning", "thinking") if re.search(_read(n), self._source)}
        names.add("reasoning_content")
        if message.content and message.tool_calls:
            names.discard("thinking")
        return dict.fromkeys(sorted(names), message.reasoning)

    @cached_property
    def takes_tools(self) -> bool:
        """Whether a prompt holds the tools that it is given."""
        with_tools = self._probe([_HELLO], tools=[_TOOL])
        return with_tools is None or with_tools != self._probe([_HELLO])

    @cached_property
    def _ignores_late_system(self) -> bool:
        late = Message("system", "be quick")
        first = Message("system", "hello")
        answer = Message("assistant", "hello")
        second = self._probe([first, late, _HELLO])
        later = self._probe([first, _HELLO, answer, late, _HELLO])
        return any(text is not None and late.content not in text for text in (second, later))

    @cached_property
    def _takes_calls(self) -> bool:
        result = Message("tool", "rain", _CALL.name, tool_call_id=_CALL.id)
        call = Message("assistant", "", tool_calls=(_CALL,))
        silence = Message("assistant", "")
        with_call = self._probe([_HELLO, call, result], tools=[_TOOL])
        without = self._probe([_HELLO, silence, result], tools=[_TOOL])
        return with_call is None or with_call != without

    def _probe(self, messages: Sequence[Message], **options: Any) -> str | None:
        """Return the rendered text. None: the template refuses these messages."""
        dicts = self.dicts(messages)
        try:
            text: str = self._tokenizer.apply_chat_template(dicts, tokenize=False, **options)
        except (TemplateError, TypeError):
            return None
        return text


def _call_dict(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}


def without_system_between(messages: Sequence[Message]) -> list[Message]:
    """Return the same with one system message at most: for templates that refuse others.

    It is the first. Those that follow one another become one; a later one is said by the user,
    whose neighbouring messages become one too, since such templates want the roles to alternate.
    """
    result: list[Message] = []
    for message in messages:
        role: Role = "system" if message.role == "developer" else message.role
        if role == "system" and any(m.role != "system" for m in result):
            role = "user"
        last = result[-1] if result else None
        speaks_on = last is not None and (last.role, last.name) == (role, message.name)
        if last is not None and speaks_on and role in ("system", "user"):
            result[-1] = Message(role, f"{last.content}\n\n{message.content}", message.name)
        elif role == message.role:
            result.append(message)
        else:
            result.append(Message(role, message.content, message.name))
    return result


def one_call_each(messages: Sequence[Message]) -> list[Message]:
    """Return the same with one tool call at most in a message, and its result after it.

    It is for templates that refuse several.
    """
    split: list[Message] = []
    rest = list(messages)
    while rest:
        message = rest.pop(0)
        if len(message.tool_calls) < 2:
            split.append(message)
            continue
        results = list(takewhile(lambda m: m.role == "tool", rest))  # later, ids may come again
        del rest[: len(results)]
        says = message
        for call in message.tool_calls:
            split.append(replace(says, tool_calls=(call,)))
            split += [result for result in results if result.tool_call_id == call.id]
            says = Message("assistant", "")
        called = {call.id for call in message.tool_calls}
        split += [result for result in results if result.tool_call_id not in called]
    return split


def source_of(tokenizer: Any) -> str:
    """Return the text of a tokenizer's chat template, of all of them where it has several.

    It is empty where there is none.
    """
    template = tokenizer.chat_template
    return "\n".join(template.values()) if isinstance(template, dict) else template or ""


def _read(name: str) -> str:
    """Return a pattern for where a template reads this field of a message."""
    return rf"""\.{name}\b|\[['"]{name}['"]\]|['"]{name}['"] in |\.get\(['"]{name}['"]"""
