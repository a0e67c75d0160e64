"""What a request says of the form of its answer: the content's, and which tools it must call.

Each API has its own words for it, which are read here. What they come to is in chat/grammar.py.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn

from ...chat.grammar import (
    ContentFormat,
    ToolChoice,
    any_json_content,
    choice_content,
    json_content,
    lark_content,
    regex_content,
)
from ...errors import InvalidRequest

_KINDS = ("json", "regex", "choice", "grammar", "json_object")
# wishes of vLLM's about how it is done
_STRUCTURED_HINTS = {
    "disable_fallback",
    "disable_any_whitespace",
    "disable_additional_properties",
    "whitespace_pattern",
    "_backend",
    "_backend_was_auto",
    "backend",
}
_ECHO = 200  # characters of the client's own text that an error repeats


def tool_choice(
    choice: Any,
    tools: Sequence[Any] | None,
    *,
    parallel: bool | None = None,
    param: str = "tool_choice",
) -> ToolChoice:
    """Return what OpenAI's `tool_choice` says, in chat completions or in Responses.

    `tools` are the request's own. Of a named function one call is made, and one at most where
    `parallel` ones are not wanted. InvalidRequest: it can't be read.
    """
    found = _choice(choice, param)
    max_calls = 1 if parallel is False else found.max_calls
    return replace(found, strict=frozenset(_strict_names(tools)), max_calls=max_calls)


def _choice(choice: Any, param: str) -> ToolChoice:
    kind = choice.get("type") if isinstance(choice, dict) else choice
    if kind in (None, "auto") and choice in (None, "auto", {"type": "auto"}):
        return ToolChoice(param=param)
    if kind == "none":
        return ToolChoice("none", param=param)
    if kind in ("required", "any"):
        return ToolChoice("required", param=param)
    if isinstance(choice, dict) and kind in ("function", "tool", "custom"):
        return ToolChoice("required", (_name(choice, param),), max_calls=1, param=param)
    if isinstance(choice, dict) and kind == "allowed_tools":
        allowed = choice.get("allowed_tools", choice)
        return _allowed(allowed, f"{param}.allowed_tools" if allowed is not choice else param)
    use = "'none', 'auto', 'required', a function, or allowed_tools"
    _refuse(param, f"this is not supported by this server; use {use}", "unsupported_parameter")


def _allowed(allowed: Any, param: str) -> ToolChoice:
    mode = allowed.get("mode", "auto") if isinstance(allowed, dict) else None
    tools = allowed.get("tools") if isinstance(allowed, dict) else None
    if mode not in ("auto", "required"):
        _refuse(f"{param}.mode", "must be 'auto' or 'required'")
    if not isinstance(tools, list) or not tools:
        _refuse(f"{param}.tools", "must be a list of functions, and not empty")
    # other types of tools are none that this server has: the model can't call them anyway
    functions = [tool for tool in tools if not isinstance(tool, dict) or _is_function(tool)]
    names = tuple(_name(tool, f"{param}.tools.{i}") for i, tool in enumerate(functions))
    return ToolChoice(mode, names, param=param)


def _is_function(tool: Mapping[str, Any]) -> bool:
    return tool.get("type", "function") in ("function", "custom")


def _name(tool: Any, param: str) -> str:
    """Return the name of a function, in the format of chat completions or of Responses."""
    inner = tool.get("function", tool.get("custom", tool)) if isinstance(tool, dict) else None
    name = inner.get("name") if isinstance(inner, dict) else None
    if not isinstance(name, str) or not name:
        _refuse(param, "must name a function")
    return name


def _strict_names(tools: Sequence[Any] | None) -> list[str]:
    names = []
    for tool in tools or ():
        inner = tool.get("function", tool) if isinstance(tool, dict) else None
        if isinstance(inner, dict) and (inner.get("strict") is True or tool.get("strict") is True):
            names.append(str(inner.get("name")))
    return names


def response_format(given: Any, param: str = "response_format") -> ContentFormat | None:
    """Return what OpenAI's `response_format` says, or `text.format` of Responses; None: free text.

    `strict` makes no difference: a schema is always held to. InvalidRequest: it can't be.
    """
    if given is None:
        return None
    kind = given.get("type") if isinstance(given, dict) else None
    if kind == "text":
        return None
    if kind == "json_object":
        if given.get("schema") is not None:  # as llama.cpp has it
            return json_content(given["schema"], f"{param}.schema")
        return any_json_content(param)
    if kind == "json_schema":
        inner = given.get("json_schema")
        if isinstance(inner, dict):
            return _named_schema(inner, f"{param}.json_schema")
        return _named_schema(given, param)
    if kind in ("regex", "grammar"):
        make = regex_content if kind == "regex" else lark_content
        value = given.get("value", given.get("pattern", given.get("grammar")))
        return make(value, f"{param}.{kind}")
    kinds = "'text', 'json_object' and 'json_schema'"
    message = f"this server knows the types {kinds}"
    _refuse(param, message, "unsupported_parameter")


def _named_schema(given: Mapping[str, Any], param: str) -> ContentFormat:
    schema = given.get("schema")
    if schema is None:  # OpenAI: any object
        return any_json_content(param)
    return json_content(schema, f"{param}.schema")


def output_format(given: Any, param: str) -> ContentFormat | None:
    """Return what Anthropic's `output_config.format` says. InvalidRequest: it can't be held to."""
    if given is None:
        return None
    kind = given.get("type") if isinstance(given, dict) else None
    if not isinstance(given, dict) or kind != "json_schema":
        _refuse(param, "this server knows the type 'json_schema'", "unsupported_parameter")
    if given.get("schema") is None:
        _refuse(f"{param}.schema", "missing, but required", "missing_required_parameter")
    return json_content(given["schema"], f"{param}.schema")


def structured_outputs(given: Any, param: str = "structured_outputs") -> ContentFormat | None:
    """Return what vLLM's `structured_outputs` says: one of json, regex, choice, grammar.

    InvalidRequest: it can't be held to, or there are several.
    """
    if given is None:
        return None
    if not isinstance(given, dict):
        _refuse(param, "must be an object")
    said = {name: value for name, value in given.items() if value not in (None, False)}
    unknown = set(said) - {*_KINDS, *_STRUCTURED_HINTS}
    if unknown:
        name = min(unknown)[:_ECHO]
        message = "this is not supported by this server; leave it out"
        _refuse(f"{param}.{name}", message, "unsupported_parameter")
    kinds = [kind for kind in _KINDS if kind in said]
    if not kinds:
        return None
    if len(kinds) > 1:
        _refuse(param, f"has both {kinds[0]} and {kinds[1]}; one says what the answer is")
    compact = bool(said.get("disable_any_whitespace"))
    return _structured(kinds[0], said[kinds[0]], f"{param}.{kinds[0]}", compact=compact)


def _structured(kind: str, value: Any, param: str, *, compact: bool = False) -> ContentFormat:
    if kind == "json_object":
        return any_json_content(param)
    if kind == "json":
        return json_content(_parsed(value, param), param, compact=compact)
    makers = {"regex": regex_content, "choice": choice_content, "grammar": lark_content}
    return makers[kind](value, param)


def _parsed(schema: Any, param: str) -> Any:
    """Return a schema that may come as JSON in a string."""
    if not isinstance(schema, str):
        return schema
    try:
        return json.loads(schema)
    except (ValueError, RecursionError):
        _refuse(param, "must be a JSON schema, as such or in a string")


def content_format(body: Any) -> ContentFormat | None:
    """Return what a body of OpenAI's chat completions or completions says of the content.

    It may say so in OpenAI's words or in one of vLLM's, not in two. InvalidRequest as above.
    """
    found = [
        ("response_format", response_format(body.response_format)),
        ("structured_outputs", structured_outputs(body.structured_outputs)),
    ]
    for kind in ("json", "regex", "choice", "grammar"):
        name = f"guided_{kind}"
        value = getattr(body, name)
        found.append((name, None if value is None else _structured(kind, value, name)))
    said = [(name, one) for name, one in found if one is not None]
    if len(said) > 1:
        _refuse(said[1][0], f"the request has {said[0][0]} too; one says what the answer is")
    return said[0][1] if said else None


def _refuse(param: str, message: str, code: str | None = None) -> NoReturn:
    raise InvalidRequest(f"{param}: {message}", param=param, code=code)
