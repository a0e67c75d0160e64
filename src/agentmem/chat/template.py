"""A model's chat template: what it reads of a message, what it ignores, what it refuses."""

import inspect
import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from ..errors import InvalidRequest
from .fitted import (
    in_turn,
    in_words,
    one_call_each,
    paired,
    plain_tools,
    said_before_calls,
    with_names_in_words,
    with_tools_in_words,
    without_system_between,
)
from .marked_text import MarkedText
from .markup import Markup, generic_markup
from .messages import SYSTEM_ROLES, Message, Role, ToolCall, check_encodable

# what templates raise, and what comes of doing with a value what can't be done with it
_REFUSALS = (
    TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)
_RESERVED = {*inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters, "messages"}
_MAX_OPTIONS = 64  # sets of them that are remembered
_WORD = "xylophone"  # that no template says by itself
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

    def __init__(self, tokenizer: Any, *, generic_tools: bool = True):
        """`tokenizer` is an mlx_lm TokenizerWrapper.

        `generic_tools`: where the template knows no tools, they are described in the system's text,
        and calls and results are text.
        """
        self._tokenizer = tokenizer
        self._source = source_of(tokenizer)
        self._generic_tools = generic_tools and bool(self._source)
        self._asked: dict[str, str] = {}  # by the template's options

    @cached_property
    def markup(self) -> Markup:
        """How answers are marked up."""
        own = Markup.of(self._tokenizer)
        return generic_markup(own) if self._describes_tools else own

    def render(
        self,
        messages: Sequence[Message],
        render: Callable[[list[dict[str, Any]], list[dict[str, Any]]], MarkedText],
        tools: Sequence[dict[str, Any]] = (),
    ) -> MarkedText:
        """Return what `render` makes of the messages and tools as the template takes them.

        Where it refuses them, or leaves out what somebody wrote, they are made to fit in one way
        after the other, see fitted.py: the first that shows all is taken, or else the one that
        shows most. InvalidRequest: the template refuses every one of them.
        """
        refused: Exception | None = None
        best: tuple[int, MarkedText] | None = None
        for attempt, given in self._attempts(messages, tools):
            try:
                rendered = render(self.dicts(attempt), given)
            except _REFUSALS as e:
                refused = refused or e
                continue
            missing = self._num_missing(messages, rendered)
            if missing == 0:
                return rendered
            if best is None or missing < best[0]:
                best = missing, rendered
        if best is not None:
            return best[1]
        why = refused.message if isinstance(refused, TemplateError) else str(refused)
        raise InvalidRequest(
            f"The model's chat template refuses these messages: {why or type(refused).__name__}",
            param="messages",
        ) from refused

    def dicts(self, messages: Iterable[Message]) -> list[dict[str, Any]]:
        """Return messages as Hugging Face's templates have them: a call's arguments an object."""
        found: list[dict[str, Any]] = []
        for message in messages:
            if message.role == "tool" and self._reads_responses and _answers(message, found):
                found[-1]["tool_responses"].append(_response(message))
                continue
            found.append(self._dict(message))
            if message.tool_calls and self._reads_responses:
                found[-1]["tool_responses"] = []
        return found

    def check(
        self, messages: Iterable[Message], tools: Collection[Any], options: Mapping[str, Any]
    ) -> None:
        """Raise InvalidRequest where the template ignores something, so no prompt would hold it."""
        if tools and not self.takes_tools:
            why = "This model's chat template ignores tools, so it would not know of them"
            raise InvalidRequest(
                f"{why}; leave them out, or serve with generic_tools.", param="tools"
            )
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

    def _attempts(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]]
    ) -> Iterator[tuple[Sequence[Message], list[dict[str, Any]]]]:
        """Yield messages and tools in one form after the other, each different from the last."""
        given = list(tools)
        words = list(messages) if self._shows_names else with_names_in_words(messages)
        if not self._takes_calls:
            words = in_words(words)
        if self._describes_tools:
            words = with_tools_in_words(words, given)
            given = []
        first = without_system_between(words) if self._loses_system(words) else words
        yield first, given
        if given and (plain := plain_tools(given)) != given:
            yield first, plain
            given = plain
        tried = [first]
        for change in (without_system_between, one_call_each, said_before_calls, paired):
            changed = change(tried[-1])
            if changed != tried[-1]:
                yield changed, given
                tried.append(changed)
        for form in (tried[-1], in_words(tried[-1]), in_words(words)):
            for takes_system in (True, False):
                changed = in_turn(form, takes_system=takes_system)
                if changed not in tried:
                    yield changed, given
                    tried.append(changed)

    @staticmethod
    def _num_missing(messages: Sequence[Message], rendered: MarkedText) -> int:
        """Count the texts of messages, and of arguments of calls, that are not in the prompt.

        An assistant's may hold reasoning, of which templates leave out the older one.
        """
        text = rendered.plain
        missing = 0
        at = 0
        for message in messages:
            if message.role != "assistant" or "</" not in message.content:
                said = [message.content]
            else:
                said = []
            for call in message.tool_calls:
                said += [value for value in call.arguments.values() if isinstance(value, str)]
            for one in said:
                found = _place(one.strip(), text, at)
                missing += found is None
                at = found or at
        return missing

    def _loses_system(self, messages: Sequence[Message]) -> bool:
        """Return whether a system message after the first would not be in the prompt."""
        has_late = any(message.role in SYSTEM_ROLES for message in messages[1:])
        return has_late and self._ignores_late_system

    def _dict(self, message: Message) -> dict[str, Any]:
        role: Role = message.role
        if role == "developer" and "developer" not in self._source:
            role = "system"
        content: Any = message.content
        if self._takes_parts_alone:
            content = [{"type": "text", "text": content}]
        found: dict[str, Any] = {"role": role, "content": content}
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

    @property
    def takes_tools(self) -> bool:
        """Whether a prompt holds the tools that it is given."""
        return self._knows_tools or self._describes_tools

    @property
    def _describes_tools(self) -> bool:
        return self._generic_tools and not self._knows_tools

    @cached_property
    def _knows_tools(self) -> bool:
        with_tools = self._try([_dict_of("user", "hello")], tools=[_TOOL])
        return with_tools is None or with_tools != self._try([_dict_of("user", "hello")])

    @cached_property
    def _takes_parts_alone(self) -> bool:
        """Whether a content must be a list of parts."""
        text = self._try([_dict_of("user", _WORD)])
        if text is not None and _WORD in text:
            return False
        parts = self._try([_dict_of("user", [{"type": "text", "text": _WORD}])])
        return parts is not None and _WORD in parts

    @cached_property
    def _shows_names(self) -> bool:
        """Whether a prompt tells which user speaks."""
        content = [{"type": "text", "text": "hello"}] if self._takes_parts_alone else "hello"
        text = self._try([_dict_of("user", content) | {"name": _WORD}])
        return text is not None and _WORD in text

    @cached_property
    def _reads_responses(self) -> bool:
        """Whether results are to stand beside the calls, in `tool_responses`, as Gemma 4 has it."""
        if "tool_responses" not in self._source:
            return False
        call = _dict_of("assistant", "") | {"tool_calls": [_call_dict(_CALL)]}
        beside = call | {"tool_responses": [{"name": _CALL.name, "response": _WORD}]}
        text = self._try([_dict_of("user", "hello"), beside], tools=[_TOOL])
        return text is not None and _WORD in text

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
        """Whether a prompt shows calls and their results."""
        if self._describes_tools:
            return False
        call = ToolCall(_CALL.id, "ring_bell", {})
        result = Message("tool", _WORD, tool_call_id=call.id)
        said = [_HELLO, Message("assistant", "", tool_calls=(call,)), result]
        text = self._try(self.dicts(said), tools=[_TOOL])
        return text is None or (call.name in text and _WORD in text)

    def _probe(self, messages: Sequence[Message], **options: Any) -> str | None:
        """Return the rendered text. None: the template refuses these messages."""
        tools = options.pop("tools", ())
        if not self._takes_calls:
            messages = in_words(messages)
        if self._describes_tools:
            messages = with_tools_in_words(messages, tools)
            tools = ()
        return self._try(self.dicts(messages), **(options | ({"tools": tools} if tools else {})))

    def _try(self, dicts: list[dict[str, Any]], **options: Any) -> str | None:
        """Return the rendered text of messages as they are. None: the template refuses them."""
        try:
            text: str = self._tokenizer.apply_chat_template(dicts, tokenize=False, **options)
        except (TemplateError, TypeError):
            return None
        return text


def _dict_of(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def _answers(message: Message, said: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether a result is one of the calls that were said last."""
    calls = said[-1].get("tool_calls", ()) if said else ()
    return any(call["id"] == message.tool_call_id for call in calls)


def _response(message: Message) -> dict[str, Any]:
    try:
        found = json.loads(message.content)
    except (ValueError, RecursionError):
        found = message.content
    return {"name": message.name or "unknown", "response": found}


def _place(said: str, text: str, at: int) -> int | None:
    """Return where a text stands in a prompt, from `at` on if it can; None: nowhere.

    It may stand there as JSON has it, and an object in another layout of that.
    """
    forms = [said, json.dumps(said)[1:-1], json.dumps(said, ensure_ascii=False)[1:-1]]
    if said.startswith(("{", "[")):
        try:
            found = json.loads(said)
            forms += [json.dumps(found), json.dumps(found, ensure_ascii=False)]
        except (ValueError, RecursionError):
            pass
    for start in (at, 0):
        for form in dict.fromkeys(forms):
            if (place := text.find(form, start)) >= 0:
                return place
    return None


def _call_dict(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}


def source_of(tokenizer: Any) -> str:
    """Return the text of a tokenizer's chat template, of all of them where it has several.

    It is empty where there is none.
    """
    template = tokenizer.chat_template
    return "\n".join(template.values()) if isinstance(template, dict) else template or ""


def _read(name: str) -> str:
    """Return a pattern for where a template reads this field of a message."""
    return rf"""\.{name}\b|\[['"]{name}['"]\]|['"]{name}['"] in |\.get\(['"]{name}['"]"""
