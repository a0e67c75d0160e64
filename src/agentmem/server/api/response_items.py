"""The input items of Responses as messages of a chat.

Clients send back whatever other servers and their own tools left in a conversation. None of it is
refused for its form:

    message                        a message
    reasoning                      the reasoning of the assistant's next message
    ..._call, ..._output           a call of a tool, and its result
    a call that no client ran      the same, both from the one item (web_search_call, mcp_call)
    what holds nothing readable    nothing (compaction, unknown types, references to nothing)

Only in the newest item, and in the newest message of the user, is a wrong type or what is no text
refused, by the name of the field.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from ...errors import InvalidRequest
from ...transcripts.turns import Messages
from .readable import as_json, is_media, note, readable, text_of
from .response_tools import custom_arguments, joined_name, loaded_functions

_ROLES = ("user", "assistant", "system", "developer")
_ECHO = 200  # characters of the client's own text that an error repeats
# what is about an item or for the server that made it, and not what a tool was given
_ENVELOPE = {
    *("type", "id", "call_id", "status", "name", "namespace", "server_label", "role", "caller"),
    *("created_by", "execution", "encrypted_content", "fingerprint", "container_id"),
    *("approval_request_id", "max_output_length", "acknowledged_safety_checks"),
}
_RESULTS = ("output", "outputs", "results", "result", "tools", "error")
# calls and results whose type does not end in _call or _output
_CALLS = ("program", "mcp_approval_request")
_OUTPUTS = ("mcp_approval_response",)
# that a client runs: their results are items of their own
_CLIENT_CALLS = (
    *("function_call", "custom_tool_call", "local_shell_call", "shell_call"),
    *("apply_patch_call", "computer_call"),
)
_PLAIN_OUTPUTS = ("function_call_output", "custom_tool_call_output")

Item = Mapping[str, Any]


def to_messages(items: Sequence[Item]) -> Messages:
    """Return items as messages in the chat format; InvalidRequest names what can't be read.

    Reasoning, a message and calls that follow one another are one message of the assistant's. So is
    text that follows calls: they wait for their results, so that no other answer can have begun.
    """
    reader = _Reader()
    newest = {len(items) - 1, _newest_of_user(items)}
    for i, item in enumerate(items):
        reader.read(item, f"input.{i}", is_new=i in newest)
    return reader.messages


def loaded_tools(items: Sequence[Item]) -> list[Any]:
    """Return the tools that came in the course of a conversation, as their items have them."""
    lists = [item["tools"] for item in items if isinstance(item.get("tools"), list)]
    return [tool for tools in lists for tool in tools]


def is_reference(item: Item) -> bool:
    """Return whether an item stands for another one, which the server may have."""
    return _kind(item) == "item_reference"


def _newest_of_user(items: Sequence[Item]) -> int:
    """Return the place of the user's newest message, or -1 if the assistant has gone on from it."""
    for i in range(len(items) - 1, -1, -1):
        kind = _kind(items[i])
        if kind == "message" and items[i].get("role") == "user":
            return i
        if kind == "reasoning" or _is_call(kind) or items[i].get("role") == "assistant":
            return -1
    return -1


def _kind(item: Item) -> str:
    kind = item.get("type")
    if isinstance(kind, str) and not ("role" in item and "content" in item):
        return kind
    return "message" if "role" in item or "content" in item else "item_reference"


def _is_call(kind: str) -> bool:
    return kind.endswith("_call") or kind in _CALLS


class _Reader:
    """Makes messages of items, one after the other."""

    def __init__(self) -> None:
        self.messages: Messages = []
        self._whole = True  # nothing more belongs to the last message
        self._open: list[str] = []  # ids of calls that have no result yet
        self._number = 0  # of items so far

    def read(self, item: Item, param: str, *, is_new: bool) -> None:
        """Go on by an item. One that `is_new` is refused where it is not what its type says."""
        self._number += 1
        kind = _kind(item)
        if kind == "message":
            self._message(item, param, is_new=is_new)
        elif kind == "reasoning":
            thought = readable(item.get("content")) or readable(item.get("summary"))
            if thought:  # else it is encrypted
                self._of_assistant({"content": None, "reasoning_content": thought})
        elif _is_call(kind):
            if is_new:
                _check_call(item, kind, param)
            self._call(item, kind)
        elif kind.endswith("_output") or kind in _OUTPUTS:
            if is_new:
                _check_output(item, kind, param)
            self._result(item, kind)
        elif kind == "additional_tools":
            text = as_json(loaded_functions(item.get("tools")))
            self._add({"role": "developer", "content": text})

    def _message(self, item: Item, param: str, *, is_new: bool) -> None:
        role = item.get("role")
        if is_new and role not in _ROLES:
            why = "missing, but required" if role is None else f"must be one of {', '.join(_ROLES)}"
            code = "missing_required_parameter" if role is None else "invalid_value"
            _refuse(f"{param}.role", why, code)
        text = _content(item.get("content"), f"{param}.content", is_new=is_new)
        if role == "assistant":
            self._of_assistant({"content": text})
        elif role in ("tool", "function"):
            self._answer(item.get("tool_call_id"), text)
        else:
            self._add({"role": role if role in _ROLES else "user", "content": text})

    def _call(self, item: Item, kind: str) -> None:
        call_id = item.get("call_id")
        was_run = call_id is None and kind not in _CLIENT_CALLS
        call_id = str(call_id or item.get("id") or f"call_{self._number}")
        name = item.get("name") or kind.removesuffix("_call")
        namespace = item.get("namespace") or item.get("server_label")
        function = {"name": joined_name(namespace, str(name)), "arguments": _arguments(item, kind)}
        call = {"id": call_id, "type": "function", "function": function}
        self._of_assistant({"content": None, "tool_calls": [call]})
        self._open.append(call_id)
        if was_run:  # by the server that answered, which knows the result too
            self._answer(call_id, _result(item, kind))

    def _result(self, item: Item, kind: str) -> None:
        call_id = item.get("call_id") or item.get("approval_request_id")
        if call_id is None and item.get("id") in self._open:
            call_id = item["id"]
        self._answer(call_id, _result(item, kind))

    def _answer(self, call_id: Any, text: str) -> None:
        """Add the result of a call; without its id it is that of the first that has none yet."""
        if call_id is None:
            call_id = self._open[0] if self._open else f"call_{self._number}"
        call_id = str(call_id)
        if call_id in self._open:
            self._open.remove(call_id)
        self._add({"role": "tool", "tool_call_id": call_id, "content": text})

    def _add(self, message: dict[str, Any]) -> None:
        self.messages.append(message)
        self._whole = True

    def _of_assistant(self, news: dict[str, Any]) -> None:
        if self._whole or _says_more(self.messages[-1], news):
            self.messages.append({"role": "assistant", "content": None})
        _extend(self.messages[-1], news)
        self._whole = False


def _says_more(message: dict[str, Any], news: dict[str, Any]) -> bool:
    """Return whether text comes after text, with no call between: it is another message."""
    both_say = message["content"] is not None and news["content"] is not None
    return both_say and not message.get("tool_calls")


def _extend(message: dict[str, Any], news: dict[str, Any]) -> None:
    if news["content"] is not None:
        message["content"] = (message["content"] or "") + news["content"]
    if thought := news.get("reasoning_content"):
        message["reasoning_content"] = message.get("reasoning_content", "") + thought
    if "tool_calls" in news:
        message["tool_calls"] = [*message.get("tool_calls", ()), *news["tool_calls"]]


def _arguments(item: Item, kind: str) -> str:
    """Return what a tool was called with, as JSON, or as the text that stands in its place."""
    if kind == "custom_tool_call":
        return custom_arguments(item.get("input"))
    if item.get("arguments") is not None or kind == "function_call":
        given = item.get("arguments")
        return given if isinstance(given, str) else as_json({} if given is None else given)
    unread = {*_ENVELOPE, *_RESULTS, "arguments"}
    given = {name: value for name, value in item.items() if name not in unread}
    first = next(iter(given.values()), None)
    return as_json(first if len(given) == 1 and isinstance(first, dict) else given)


def _result(item: Item, kind: str) -> str:
    """Return what came of a call; of one that tells nothing else, how it ended."""
    if kind in _PLAIN_OUTPUTS:
        return readable(item.get("output"))
    if kind == "image_generation_call":
        return note("image")
    if kind == "tool_search_output":
        return as_json(loaded_functions(item.get("tools")))
    for name in _RESULTS:
        if item.get(name):
            return readable(item[name])
    given = {name: value for name, value in item.items() if name not in {*_ENVELOPE, *_RESULTS}}
    if given and not _is_call(kind):
        return as_json(given)
    return str(item.get("status") or "")


def _content(content: Any, param: str, *, is_new: bool) -> str:
    """Return the text of a message. What is no text is refused where it is new, else noted."""
    if not is_new:
        return readable(content)
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        _refuse(param, "must be a string or a list of parts with text", "invalid_type")
    for i, part in enumerate(content):
        if not isinstance(part, dict) or text_of(part) is not None:
            continue
        if "text" in part:
            _refuse(f"{param}.{i}.text", "must be a string", "invalid_type")
        if is_media(part):
            message = f"is of type {part['type'][:_ECHO]!r}; this server reads only text"
            _refuse(f"{param}.{i}", message)
    return readable(content)


def _check_call(item: Item, kind: str, param: str) -> None:
    if not isinstance(item.get("call_id"), str | None):
        _refuse(f"{param}.call_id", "must be a string", "invalid_type")
    if kind != "function_call":
        return
    if not isinstance(item.get("name"), str) or not item["name"]:
        _refuse(f"{param}.name", "must be a string, and not empty", "invalid_type")
    if not isinstance(item.get("arguments"), str | None):
        _refuse(f"{param}.arguments", "must be a string that holds JSON", "invalid_type")


def _check_output(item: Item, kind: str, param: str) -> None:
    if not isinstance(item.get("call_id"), str | None):
        _refuse(f"{param}.call_id", "must be a string", "invalid_type")
    if kind in _PLAIN_OUTPUTS and not isinstance(item.get("output"), str | list | None):
        _refuse(f"{param}.output", "must be a string or a list of parts", "invalid_type")


def _refuse(param: str, message: str, code: str = "unsupported_parameter") -> NoReturn:
    raise InvalidRequest(f"{param}: {message}", param=param, code=code)
