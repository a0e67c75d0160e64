"""Chats made to fit a template that can't take them as they are.

Each function here returns messages that say the same in another form, and leaves alone what needs
no change, so that a chat that is longer by one message begins like the one before.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import takewhile
from typing import Any

from .messages import SYSTEM_ROLES, Message, Role, ToolCall

FILLER = "."  # of a turn that a template wants and nobody took
_NO_RESULT = "(no result)"
_NINE = re.compile("[A-Za-z0-9]{9}")  # what Mistral's templates take for the id of a call
_CALLING = """\
# Tools

You may call these functions:

{tools}

To call one, write its name and its arguments as JSON, like this:

<tool_call>
{{"name": "the_name", "arguments": {{"an_argument": "a value"}}}}
</tool_call>

What it returns comes between <tool_response> and </tool_response>."""


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


def said_before_calls(messages: Sequence[Message]) -> list[Message]:
    """Return the same with what is said beside calls in a message before theirs.

    It is for templates that show of a message with calls nothing but these.
    """
    split: list[Message] = []
    for message in messages:
        if message.tool_calls and message.content:
            split.append(replace(message, tool_calls=()))
            message = replace(message, content="", reasoning=None)
        split.append(message)
    return split


def paired(messages: Sequence[Message]) -> list[Message]:
    """Return the same with exactly one result right after the calls for each of them.

    Ids get nine letters and digits. A result that answers no call is said by the user; of a call
    that was not answered it is said that there is none.
    """
    result: list[Message] = []
    rest = list(messages)
    while rest:
        message = rest.pop(0)
        if message.role == "tool":
            result.append(_as_users(message))
        elif not message.tool_calls:
            result.append(message)
        else:
            answers = list(takewhile(lambda m: m.role == "tool", rest))
            del rest[: len(answers)]
            result += _with_answers(message, answers)
    return result


def _with_answers(message: Message, answers: list[Message]) -> list[Message]:
    """Return a message with calls, a result for each, and what else was said in their place."""
    ids = {call.id: _nine_letters(call.id) for call in message.tool_calls}
    calls = tuple(ToolCall(ids[call.id], call.name, call.arguments) for call in message.tool_calls)
    found = [replace(message, tool_calls=calls)]
    left = list(answers)
    for call in message.tool_calls:
        answer = next((a for a in left if a.tool_call_id == call.id), None)
        if answer is not None:
            left.remove(answer)
        else:
            answer = Message("tool", _NO_RESULT, call.name, tool_call_id=call.id)
        found.append(replace(answer, tool_call_id=ids[call.id]))
    return [*found, *(_as_users(answer) for answer in left)]


def _nine_letters(call_id: str) -> str:
    if _NINE.fullmatch(call_id):
        return call_id
    return hashlib.sha256(call_id.encode()).hexdigest()[:9]


def _as_users(result: Message) -> Message:
    return Message("user", _response(result))


def _response(result: Message) -> str:
    return f"<tool_response>\n{result.content}\n</tool_response>"


def with_names_in_words(messages: Sequence[Message]) -> list[Message]:
    """Return the same with who speaks, of users that have names, in front of what they say."""
    return [
        replace(message, content=f"{message.name}: {message.content}", name=None)
        if message.role == "user" and message.name is not None
        else message
        for message in messages
    ]


def in_words(messages: Sequence[Message]) -> list[Message]:
    """Return the same with calls and results as text, for templates that know none.

    A call is written as Hermes' models write it, its result is said by the user.
    """
    result: list[Message] = []
    for message in messages:
        if message.tool_calls:
            said = [message.content] if message.content else []
            said += [_call_text(call) for call in message.tool_calls]
            result.append(replace(message, content="\n".join(said), tool_calls=()))
        elif message.role != "tool":
            result.append(message)
        elif result and result[-1].role == "user" and _is_response(result[-1]):
            content = f"{result[-1].content}\n{_response(message)}"
            result[-1] = Message("user", content)
        else:
            result.append(_as_users(message))
    return result


def _is_response(message: Message) -> bool:
    return message.content.endswith("</tool_response>")


def _call_text(call: ToolCall) -> str:
    said = json.dumps({"name": call.name, "arguments": call.arguments}, ensure_ascii=False)
    return f"<tool_call>\n{said}\n</tool_call>"


def with_tools_in_words(
    messages: Sequence[Message], tools: Sequence[dict[str, Any]]
) -> list[Message]:
    """Return the same with the tools described behind what the system says first."""
    if not tools:
        return list(messages)
    functions = (json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    described = _CALLING.format(tools="\n".join(functions))
    if messages and messages[0].role in SYSTEM_ROLES:
        first = messages[0]
        content = f"{first.content}\n\n{described}" if first.content else described
        return [replace(first, content=content), *messages[1:]]
    return [Message("system", described), *messages]


def in_turn(messages: Sequence[Message], *, takes_system: bool) -> list[Message]:
    """Return the same with user and assistant in turn, the user first and, where need be, alone.

    Neighbours of one role become one. What the system says is one message in front or, where the
    template takes none, the beginning of what the user says first; later it is the user's. Tools'
    results stay where they are.
    """
    said = without_system_between(messages)
    before: list[Message] = []
    if said and said[0].role == "system":
        before = [said.pop(0)]
    result: list[Message] = []
    for message in said:
        last = result[-1] if result else None
        if last is None and message.role != "user":
            result.append(Message("user", FILLER))
            last = result[-1]
        if last is not None and _speaks_on(last, message):
            parts = [part for part in (last.content, message.content) if part]
            result[-1] = replace(message, content="\n\n".join(parts), name=last.name)
        else:
            if last is not None and last.role == "tool" and message.role == "user":
                result.append(Message("assistant", FILLER))
            result.append(message)
    if not result:
        result = [Message("user", "" if before and not takes_system else FILLER)]
    if before and not takes_system:
        parts = [part for part in (before[0].content, result[0].content) if part]
        return [replace(result[0], content="\n\n".join(parts)), *result[1:]]
    return [*before, *result]


def _speaks_on(last: Message, message: Message) -> bool:
    """Return whether a message can be one with the one before."""
    if last.role != message.role or last.role not in ("user", "assistant"):
        return False
    return not last.tool_calls


def plain_tools(tools: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return tools whose schemas hold a type everywhere, and no other way to say one.

    It is for templates that walk through a schema as if every one were so.
    """
    plain = []
    for tool in tools:
        function = tool["function"]
        parameters = _plain_schema(function["parameters"])
        properties = parameters.setdefault("properties", {})
        parameters = {**parameters, "type": "object", "properties": properties}
        plain.append({**tool, "function": {**function, "parameters": parameters}})
    return plain


def _plain_schema(schema: Any) -> dict[str, Any]:
    if not isinstance(schema, dict):
        return {"type": "string", "description": ""}
    variants = next((schema[k] for k in ("anyOf", "oneOf", "allOf") if schema.get(k)), None)
    if "type" not in schema and isinstance(variants, list):
        one = next((v for v in variants if isinstance(v, dict) and v.get("type") != "null"), {})
        schema = {**one, **schema}
    plain = {"description": "", **schema}
    kind = schema.get("type")
    if isinstance(kind, list):
        kind = next((name for name in kind if name != "null"), None)
    if not isinstance(kind, str):
        kind = "object" if isinstance(schema.get("properties"), dict) else "string"
    plain["type"] = kind
    if "properties" in schema or kind == "object":
        properties = schema.get("properties")
        if not isinstance(properties, dict):
            properties = {}
        plain["properties"] = {str(k): _plain_schema(v) for k, v in properties.items()}
    if "items" in schema or kind == "array":
        plain["items"] = _plain_schema(schema.get("items"))
    if "enum" in schema and not isinstance(schema["enum"], list):
        del plain["enum"]
    if not isinstance(schema.get("required", []), list):
        del plain["required"]
    return plain
