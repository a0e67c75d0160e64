"""The tools of a Responses request as functions, which is all that a model knows.

A `custom` tool is offered as a function of one text, and a namespace's functions under names that
begin with the namespace's. How the client wants to hear of a call is remembered by that name.
Tools of other types, which a client may offer to servers that have them, are left out.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...chat.messages import ToolCall
from ...chat.normalise import function_tools

_INPUT = "input"  # the one argument of a custom tool


@dataclass(frozen=True)
class ClientTool:
    """What a client calls a tool."""

    name: str
    namespace: str | None = None
    is_custom: bool = False

    def item(self, call: ToolCall) -> dict[str, Any]:
        """Return the fields of an output item that tell of a call to this tool."""
        item: dict[str, Any] = {"name": self.name}
        if self.namespace is not None:
            item["namespace"] = self.namespace
        if not self.is_custom:
            return item | {"type": "function_call", "arguments": call.arguments_json}
        text = call.arguments.get(_INPUT)
        given = text if isinstance(text, str) else call.arguments_json
        return item | {"type": "custom_tool_call", "input": given}


@dataclass(frozen=True)
class OfferedTools:
    functions: list[dict[str, Any]]  # in the chat format
    clients: Mapping[str, ClientTool]  # by the name that the model knows

    def called(self, name: str) -> ClientTool:
        """Return what the client calls the tool that the model calls `name`."""
        return self.clients.get(name) or ClientTool(name)


def offered_tools(tools: Sequence[Any] | None, loaded: Sequence[Any] = ()) -> OfferedTools:
    """Return what a model is offered of a request's tools.

    `loaded` came in the course of the conversation, which tells the model of them; calls of them
    are answered all the same. InvalidRequest names what can't be read, such as tools.0.name.
    """
    tools = tools or ()
    functions = function_tools(
        [_custom_function(tool) if _is(tool, "custom") else tool for tool in tools], nested=False
    )
    for i, tool in enumerate(tools):
        if _is(tool, "namespace"):
            inner = [_in_namespace(tool.get("name"), one) for one in _tools_in(tool)]
            functions += function_tools(inner, f"tools.{i}.tools", nested=False)
    return OfferedTools(functions, dict(_clients([*tools, *loaded])))


def joined_name(namespace: Any, name: str) -> str:
    """Return the name that a model knows a function by, in a namespace or in none."""
    if not isinstance(namespace, str) or not namespace:
        return name
    return f"{namespace.removesuffix('__')}__{name}"


def custom_arguments(text: Any) -> str:
    """Return the arguments by which a model calls a custom tool with `text`, as JSON."""
    return json.dumps({_INPUT: text}, ensure_ascii=False)


def flat_tools(tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return tools of the chat format in the format of Responses."""
    return [{"type": "function", **tool["function"], "strict": False} for tool in tools]


def loaded_functions(tools: Any) -> list[Any]:
    """Return tools that a conversation tells of, as far as they can be read, by a model's names."""
    found: list[Any] = []
    for tool in tools if isinstance(tools, list) else ():
        if _is(tool, "namespace"):
            found += [_in_namespace(tool.get("name"), one) for one in _tools_in(tool)]
        else:
            found.append(_custom_function(tool) if _is(tool, "custom") else tool)
    return found


def _is(tool: Any, kind: str) -> bool:
    return isinstance(tool, dict) and tool.get("type") == kind


def _tools_in(namespace: Mapping[str, Any]) -> list[Any]:
    tools = namespace.get("tools")
    return tools if isinstance(tools, list) else []


def _in_namespace(namespace: Any, tool: Any) -> Any:
    if not isinstance(tool, dict) or not isinstance(tool.get("name"), str):
        return tool
    inner = _custom_function(tool) if _is(tool, "custom") else tool
    return {**inner, "name": joined_name(namespace, tool["name"])}


def _custom_function(tool: dict[str, Any]) -> dict[str, Any]:
    """Return a custom tool as a function; the model is told of the grammar of its input."""
    given: dict[str, Any] = {"type": "string"}
    form = tool.get("format")
    if isinstance(form, dict) and isinstance(form.get("definition"), str):
        given["description"] = f"By this {form.get('syntax')} grammar:\n{form['definition']}"
    return {
        "type": "function",
        "name": tool.get("name"),
        "description": tool.get("description"),
        "parameters": {"type": "object", "properties": {_INPUT: given}, "required": [_INPUT]},
    }


def _clients(
    tools: Sequence[Any], namespace: str | None = None
) -> Iterator[tuple[str, ClientTool]]:
    for tool in tools:
        name = tool.get("name") if isinstance(tool, dict) else None
        if not isinstance(name, str):
            continue
        if _is(tool, "namespace"):
            yield from _clients(_tools_in(tool), name)
        elif namespace is not None or _is(tool, "custom"):
            client = ClientTool(name, namespace, is_custom=_is(tool, "custom"))
            yield joined_name(namespace, name), client
