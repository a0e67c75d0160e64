"""Tools: what a request offers, as templates want it."""

from collections.abc import Sequence
from typing import Any, NoReturn

from ..errors import InvalidRequest
from .messages import check_encodable

_NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}}


def function_tools(
    tools: Sequence[Any] | None, param: str = "tools", *, nested: bool = True
) -> list[dict[str, Any]]:
    """The tools of type 'function', in OpenAI's chat format, each with name, description and
    parameters.

    They come in that format too, or, if not `nested`, in that of Responses: these three beside the
    type.

    Other types, which a client may offer to servers that have them, are left out. A `strict` schema
    is not enforced. InvalidRequest names what can't be read, such as tools.0.function.name.
    """
    found = []
    for i, tool in enumerate(tools or ()):
        kind = tool.get("type") if isinstance(tool, dict) else None
        if not isinstance(kind, str):
            _refuse(f"{param}.{i}", "must be an object with a type")
        if kind == "function":
            where = f"{param}.{i}"
            function = (
                _function(tool.get("function"), f"{where}.function")
                if nested
                else _function(tool, where)
            )
            found.append({"type": "function", "function": function})
    check_encodable(found, param)
    return found


def _function(function: Any, param: str) -> dict[str, Any]:
    if not isinstance(function, dict):
        _refuse(param, "must be an object")
    name, description = function.get("name"), function.get("description")
    parameters = function.get("parameters")
    if not isinstance(name, str) or not name:
        _refuse(f"{param}.name", "must be a string, and not empty")
    if not isinstance(description, str | None):
        _refuse(f"{param}.description", "must be a string")
    if not isinstance(parameters, dict | None):
        _refuse(f"{param}.parameters", "must be a JSON schema, which is an object")
    return {
        "name": name,
        "description": description or "",
        "parameters": parameters or _NO_PARAMETERS,
    }


def _refuse(param: str, message: str) -> NoReturn:
    raise InvalidRequest(f"{param}: {message}", param=param)
