"""Ollama's messages in the shape of OpenAI's chat, whatever a client has left in them.

Only what the user's newest message holds is refused. What else is not what it should be is read as
the text that it has.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import InvalidRequest
from ...transcripts.turns import Messages
from .readable import as_json, note, readable

_LONE = re.compile("[\ud800-\udfff]")  # surrogates, which no prompt can hold


class CallIds:
    """Gives tool calls their ids.

    Clients of Ollama send calls back without ids. So an id follows from what is called, and how
    often that was called before: a call has the same id in the answer and in each later request.
    """

    def __init__(self) -> None:
        self._called: Counter[str] = Counter()

    def next(self, name: str, arguments: Any) -> str:
        """Return the id of the next call, whose arguments may be an object or one as JSON."""
        try:
            called = json.dumps([name, _parsed(arguments)], sort_keys=True)
        except RecursionError:
            called = name  # deeper than any prompt
        self._called[called] += 1
        said = f"{self._called[called]} {called}".encode()
        return f"call_{hashlib.blake2b(said, digest_size=8).hexdigest()}"


def _parsed(arguments: Any) -> Any:
    try:
        return json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError):
        return arguments


def to_messages(messages: Sequence[Mapping[str, Any]], ids: CallIds) -> Messages:
    """Return messages in the shape of OpenAI's chat; `ids` has seen their calls then.

    A tool's result without an id is that of the first call of its tool that has none yet, or of
    the first call of any tool. InvalidRequest: there are images in the user's newest message; in
    older ones a note stands in their place.
    """
    result: Messages = []
    unanswered: dict[str, str] = {}  # names of called tools, by the calls' ids
    roles = [_clean(message.get("role")).lower() or "user" for message in messages]
    num_answered = max((i + 1 for i, role in enumerate(roles) if role == "assistant"), default=0)
    for i, (role, message) in enumerate(zip(roles, messages, strict=True)):
        if message.get("images") and role == "user" and i >= num_answered:
            param = f"messages.{i}.images"
            raise InvalidRequest(f"{param}: this server's model reads only text", param=param)
        calls, unread = _calls(message.get("tool_calls"), ids)
        said: dict[str, Any] = {"role": role, "content": _content(message, unread)}
        if thinking := _clean(message.get("thinking")):
            said["reasoning_content"] = thinking
        if calls:
            said["tool_calls"] = calls
            unanswered |= {call["id"]: call["function"]["name"] for call in calls}
        if role == "tool":
            tool = _clean(message.get("tool_name") or message.get("name"))
            call_id = _clean(message.get("tool_call_id")) or _answered(tool, unanswered)
            unanswered.pop(call_id, None)
            said |= {"tool_call_id": call_id} | ({"name": tool} if tool else {})
        result.append(said)
    return result


def _clean(value: Any) -> str:
    """Return a value as a text that a prompt can hold."""
    return _LONE.sub("\N{REPLACEMENT CHARACTER}", readable(value))


def _content(message: Mapping[str, Any], unread: Sequence[str]) -> Any:
    """Return what a message says; `unread` are lines that it says as well."""
    content = message.get("content")
    if not isinstance(content, str | list):
        content = readable(content)
    images = message.get("images") or ()
    notes = [note("image") for _ in images] if isinstance(images, list) else [note("image")]
    lines = [*unread, *(notes if images else ())]
    if not lines:
        return content
    return "\n".join(filter(None, [readable(content), *lines]))


def _calls(calls: Any, ids: CallIds) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the calls of a message, and as text those that name no function."""
    found: list[dict[str, Any]] = []
    unread: list[str] = []
    given = calls if isinstance(calls, list) else [calls]
    for call in given if calls else ():
        function = call.get("function") if isinstance(call, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(function, dict) or not isinstance(name, str) or not name:
            unread.append(as_json(call))
            continue
        arguments = {} if function.get("arguments") is None else function["arguments"]
        new_id = ids.next(name, arguments)
        named = {"name": _clean(name), "arguments": arguments}
        call_id = _clean(call.get("id")) or new_id
        found.append({"id": call_id, "type": "function", "function": named})
    return found, unread


def _answered(name: str, unanswered: dict[str, str]) -> str:
    """Return the id of the call that a result of the tool `name` answers."""
    same = [call_id for call_id, called in unanswered.items() if called == name]
    found = [*same, *unanswered]
    return found[0] if found else "call_unknown"
