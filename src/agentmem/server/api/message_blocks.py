"""Anthropic's messages and their blocks as messages of a chat.

Clients send back whatever other servers and their own tools left in a conversation. None of it is
refused for its form: what has text is read, what has none is noted, and a tool that Anthropic ran
is called and answered like any other. Only in the last message, and in the newest one of the user,
is a wrong type or what is no text refused, by the name of the field.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NoReturn

from pydantic import WithJsonSchema

from ...chat.messages import check_encodable
from ...chat.normalise import BILLING_LINE
from ...errors import InvalidRequest
from ...transcripts.turns import Messages
from .readable import as_json, is_media, readable, text_of

_ROLES = ("user", "assistant", "system")
_ECHO = 200  # characters of the client's own text that an error repeats
_UNREADABLE = ("redacted_thinking", "fallback")  # of the assistant's blocks; they are left out
_SCHEMA = {
    "type": "object",
    "properties": {
        "role": {"type": "string"},
        "content": {"type": ["string", "array", "null"], "items": {"type": "object"}},
    },
}
InputMessage = Annotated[dict[str, Any], WithJsonSchema(_SCHEMA)]


@dataclass(frozen=True)
class ClientTools:
    """The client's own tools, in the chat format."""

    functions: list[dict[str, Any]]  # that a prompt begins with
    deferred: list[dict[str, Any]]  # that it tells of where a message refers to them


def to_messages(
    messages: Sequence[Mapping[str, Any]],
    system: Any = None,
    deferred: Sequence[dict[str, Any]] = (),
) -> Messages:
    """Return a request's messages in the chat format, the system prompt first.

    A string and a list with that string as its only block give the same. The text of neighbouring
    blocks is joined without anything between. A reference to a `deferred` tool is its definition.
    InvalidRequest names what can't be read, such as messages.3.content.0.text.
    """
    reader = _Reader(deferred)
    reader.system(system, "system", is_new=True)
    newest = {len(messages) - 1, _newest_of_user(messages)}
    for i, message in enumerate(messages):
        reader.read(message, f"messages.{i}", is_new=i in newest)
    return reader.messages


def function_tools(tools: Sequence[Any] | None) -> list[dict[str, Any]]:
    """Return the client's own tools in the chat format; tools that Anthropic runs are left out.

    InvalidRequest names what can't be read, such as tools.0.input_schema.
    """
    found = []
    for i, tool in enumerate(tools or ()):
        param = f"tools.{i}"
        if not isinstance(tool, dict):
            _refuse(param, "must be an object")
        if tool.get("type") in (None, "custom"):
            found.append({"type": "function", "function": _function(tool, param)})
    check_encodable(found, "tools")
    return found


def client_tools(tools: Sequence[Any] | None) -> ClientTools:
    """Return the client's own tools as `function_tools` does, those apart that are deferred.

    Such tools come and go while a conversation lasts. Told of where a message refers to them, as
    Anthropic does it, they leave the beginning of the prompt as it is, and so the cache. Where the
    client leaves it to Anthropic's servers to search for tools, none is deferred.
    """
    functions = function_tools(tools)
    given = [tool for tool in tools or () if isinstance(tool, dict)]
    if any(str(tool.get("type")).startswith("tool_search_tool") for tool in given):
        return ClientTools(functions, [])
    names = {tool.get("name") for tool in given if tool.get("defer_loading")}
    late = [tool for tool in functions if tool["function"]["name"] in names]
    return ClientTools([tool for tool in functions if tool not in late], late)


def _function(tool: dict[str, Any], param: str) -> dict[str, Any]:
    name = tool.get("name")
    description = tool.get("description")
    schema = tool.get("input_schema")
    if not isinstance(description, str | None):
        _refuse(f"{param}.description", "must be a string")
    if not isinstance(schema, dict):
        _refuse(f"{param}.input_schema", "must be a JSON schema, which is an object")
    if not isinstance(name, str) or not name:
        _refuse(f"{param}.name", "must be a string, and not empty", "invalid_type")
    return {"name": name, "description": description or "", "parameters": schema}


def _newest_of_user(messages: Sequence[Mapping[str, Any]]) -> int:
    """Return the place of the user's newest message, or -1 if the assistant has gone on from it."""
    for i in range(len(messages) - 1, -1, -1):
        role = messages[i].get("role")
        if role in ("user", "assistant"):
            return i if role == "user" else -1
    return -1


class _Reader:
    """Makes messages of Anthropic's, one after the other."""

    def __init__(self, deferred: Sequence[dict[str, Any]] = ()) -> None:
        self.messages: Messages = []
        self._deferred = {tool["function"]["name"]: tool for tool in deferred}
        self._open: list[str] = []  # ids of calls that have no result yet
        self._number = 0  # of calls and results so far

    def read(self, message: Mapping[str, Any], param: str, *, is_new: bool) -> None:
        """Go on by a message. One that `is_new` is refused where its parts have wrong types."""
        role = message.get("role")
        if is_new and role not in _ROLES:
            _refuse(f"{param}.role", f"must be one of {', '.join(_ROLES)}", "invalid_value")
        content = message.get("content")
        where = f"{param}.content"
        if role in ("system", "developer"):
            self.system(content, where, is_new=False)
        elif role == "assistant":
            self._assistant(_blocks(content, where, is_new=is_new))
        else:
            self._user(_blocks(content, where, is_new=is_new), is_new=is_new)

    def system(self, content: Any, param: str, *, is_new: bool) -> None:
        """Add a system message; none where there is no text but Claude Code's billing line."""
        if content is None:
            return
        blocks = _blocks(content, param, is_new=is_new)
        texts = [self._system_text(block, where, is_new=is_new) for where, block in blocks]
        text = "".join(BILLING_LINE.sub("", text) for text in texts)
        if text:
            self.messages.append({"role": "system", "content": text})

    def _user(self, blocks: list["Block"], *, is_new: bool) -> None:
        """Add results of tools, and what the user says, in their order."""
        says = None
        before = len(self.messages)
        for where, block in blocks:
            if _is_result(block):
                self._result(block, where, is_new=is_new)
                says = None
                continue
            text = _text(block, where, is_new=is_new)
            if says is None:
                says = {"role": "user", "content": ""}
                self.messages.append(says)
            says["content"] += text
        if len(self.messages) == before:
            self.messages.append({"role": "user", "content": ""})

    def _assistant(self, blocks: list["Block"]) -> None:
        """Add the assistant's message, or several, with results between, of tools that were run."""
        part: list[dict[str, Any]] = []
        before = len(self.messages)
        for where, block in blocks:
            if not _is_result(block):
                part.append(block)
                continue
            self._said(part)
            part = []
            self._result(block, where, is_new=False)
        if part or len(self.messages) == before:
            self._said(part, may_be_empty=True)

    def _said(self, blocks: list[dict[str, Any]], *, may_be_empty: bool = False) -> None:
        texts: list[str] = []
        thoughts: list[str] = []
        calls: list[dict[str, Any]] = []
        for block in blocks:
            kind = str(block.get("type"))
            if kind == "thinking":
                thoughts.append(readable(block.get("thinking")))
            elif kind.endswith("tool_use"):
                calls.append(self._call(block))
            elif kind not in _UNREADABLE:
                texts.append(_text(block, "", is_new=False))
        message: dict[str, Any] = {"role": "assistant", "content": "".join(texts)}
        if thinking := "".join(thoughts):
            message["reasoning_content"] = thinking
        if calls:
            message["content"] = message["content"] or None
            message["tool_calls"] = calls
        if blocks or may_be_empty:
            self.messages.append(message)

    def _call(self, block: Mapping[str, Any]) -> dict[str, Any]:
        self._number += 1
        call_id = str(block.get("id") or f"call_{self._number}")
        self._open.append(call_id)
        given = block.get("input")
        arguments = given if isinstance(given, str) else as_json({} if given is None else given)
        name = str(block.get("name") or "tool")
        return {
            "id": call_id,
            "type": "function",
            "function": {"name": name, "arguments": arguments},
        }

    def _result(self, block: Mapping[str, Any], param: str, *, is_new: bool) -> None:
        """Add the result of a call; without its id it is that of the first that has none yet."""
        self._number += 1
        call_id = block.get("tool_use_id")
        if is_new and not isinstance(call_id, str | None):
            _refuse(f"{param}.tool_use_id", "must be a string", "invalid_type")
        if not call_id:
            call_id = self._open[0] if self._open else f"call_{self._number}"
        call_id = str(call_id)
        if call_id in self._open:
            self._open.remove(call_id)
        content = block.get("content")
        if isinstance(content, str):
            text = content
        elif isinstance(content, dict):  # of a tool that Anthropic ran
            text = readable(content)
        else:
            inner = _blocks(content, f"{param}.content", is_new=False)
            text = "".join(self._result_text(found, where) for where, found in inner)
        if block.get("is_error") and not text:
            text = "error"
        self.messages.append({"role": "tool", "tool_call_id": call_id, "content": text})

    def _system_text(self, block: dict[str, Any], param: str, *, is_new: bool) -> str:
        added = block.get("tool")
        if block.get("type") == "tool_addition" and isinstance(added, dict):
            tool = self._deferred.get(str(added.get("name")))
            return readable([block if tool is None else {**block, "tool": tool}])
        return _text(block, param, is_new=is_new)

    def _result_text(self, block: dict[str, Any], param: str) -> str:
        tool = self._deferred.get(str(block.get("tool_name")))
        if block.get("type") == "tool_reference" and tool is not None:
            return as_json(tool) + "\n"
        return _text(block, param, is_new=False)


Block = tuple[str, dict[str, Any]]  # what an error calls it, and the block


def _is_result(block: Mapping[str, Any]) -> bool:
    """Return whether it is a tool_result, or what a tool that Anthropic ran has answered."""
    return str(block.get("type")).endswith("tool_result")


def _blocks(content: Any, param: str, *, is_new: bool) -> list[Block]:
    """Return the blocks of a content, each with what an error calls it."""
    if isinstance(content, str):
        return [(param, {"type": "text", "text": content})]
    if is_new and not isinstance(content, list):
        _refuse(param, "must be a string or a list of blocks", "invalid_type")
    blocks = content if isinstance(content, list) else [content]
    if not is_new:
        return [(f"{param}.{i}", _as_block(block)) for i, block in enumerate(blocks)]
    for i, block in enumerate(blocks):
        if not isinstance(block, dict) or not isinstance(block.get("type"), str):
            _refuse(f"{param}.{i}", "must be an object with a type")
    return [(f"{param}.{i}", block) for i, block in enumerate(blocks)]


def _as_block(value: Any) -> dict[str, Any]:
    """Return a block of history, whatever a client kept of it."""
    return value if isinstance(value, dict) else {"type": "text", "text": readable(value)}


def _text(block: dict[str, Any], param: str, *, is_new: bool) -> str:
    """Return the text of a block. One without text is refused where it is new, else noted."""
    kind = block.get("type")
    source = block.get("source")
    if kind == "search_result":
        inner = _blocks(block.get("content") or [], f"{param}.content", is_new=is_new)
        texts = [_text(found, where, is_new=is_new) for where, found in inner]
        return "\n".join([readable(block.get("title")), readable(source), *texts, ""])
    if (
        kind == "document"
        and isinstance(source, dict)
        and source.get("type") in ("text", "content")
    ):
        title = readable(block.get("title"))
        text = readable(source.get("data") or source.get("content"))
        return f"{title}\n{text}" if title else text
    if kind == "compaction":
        return readable(block.get("content"))
    if not is_new:
        return readable([block])
    if kind == "text" and text_of(block) is None:
        _refuse(f"{param}.text", "must be a string", "invalid_type")
    if is_media(block):
        _refuse(param, f"is of type {str(kind)[:_ECHO]!r}; this server reads only text")
    return readable([block])


def _refuse(param: str, message: str, code: str | None = None) -> NoReturn:
    raise InvalidRequest(f"{param}: {message}", param=param, code=code)
