"""The way a model marks what it says: its reasoning, its tool calls.

It is read off the model's tokenizer, as mlx-lm does it.
"""

import json
import re
import secrets
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mlx_lm.tool_parsers import json_tools

from ..errors import InvalidRequest
from .messages import ToolCall, arguments_of

# start: nothing is said yet, so that reasoning may begin;
# header: before a part of the answer, whose kind it tells
State = Literal["start", "content", "reasoning", "tool", "header"]
Edges = Mapping[State, tuple[tuple[str, State], ...]]
ToolParser = Callable[[str, list[dict[str, Any]]], Any]
# mlx-lm's parsers read what a model wrote, and fail in as many ways; RecursionError, MemoryError:
# at deep nesting
_UNPARSED = (ValueError, TypeError, LookupError, AttributeError, SyntaxError, ArithmeticError)
_TOO_DEEP = (RecursionError, MemoryError)
_STATES: Mapping[str, State] = {
    "header": "header",
    "reasoning": "reasoning",
    "normal": "content",
    "tool": "tool",
}
_HARMONY_CALL = re.compile(r"([\w.-]+)[^{]*?<\|message\|>(.*)", re.DOTALL)


@dataclass(frozen=True)
class Markup:
    """A state machine over text: which text leads from which state to which other one.

    That text is no part of what is said.
    """

    edges: Edges = field(default_factory=dict)
    initial: State = "start"
    think_start: str | None = None
    # of what stands in a span of tool calls: one, or a list of them
    parse: ToolParser | None = None

    @staticmethod
    def of(tokenizer: Any) -> "Markup":
        """Return the markup of a tokenizer, an mlx_lm TokenizerWrapper."""
        vocabulary = set(tokenizer.get_vocab())
        if not tokenizer.has_thinking:
            if {"<|channel|>", "<|message|>", "<|start|>"} <= vocabulary:
                return _harmony()
            if not tokenizer.has_tool_calling and "<|python_tag|>" in vocabulary:
                return _llama()
        edges: dict[State, list[tuple[str, State]]] = {"start": [], "content": []}
        if tokenizer.has_thinking:
            edges["start"].append((tokenizer.think_start, "reasoning"))
            edges["reasoning"] = [(tokenizer.think_end, "start")]
        for source, pairs in tokenizer.response_transitions.items():
            edges.setdefault(_STATES[source], []).extend((text, _STATES[to]) for text, to in pairs)
        if tokenizer.has_tool_calling:
            sources: list[State] = ["start", "content", "reasoning"]
            if "header" in edges:
                sources = ["reasoning"]
            for state in sources:
                edges.setdefault(state, []).append((tokenizer.tool_call_start, "tool"))
            edges["tool"] = [(tokenizer.tool_call_end, "start")] if tokenizer.tool_call_end else []
        for state in ("start", "content"):
            edges[state].extend((text, state) for text in tokenizer.structural_markers)
        return Markup(
            {state: tuple(pairs) for state, pairs in edges.items()},
            _STATES.get(tokenizer.response_initial_state or "", "start"),
            tokenizer.think_start,
            tokenizer.tool_parser,
        )

    def tool_calls(self, text: str, tools: list[dict[str, Any]]) -> list[ToolCall]:
        """Return the calls in a span of them, at least one. ValueError: they can't be read."""
        assert self.parse is not None
        try:
            parsed = self.parse(text, tools)
            found = parsed if isinstance(parsed, list) else [parsed]
            calls = [self._tool_call(call, tools) for call in found]
        except (*_UNPARSED, *_TOO_DEEP, InvalidRequest) as e:
            raise ValueError(f"no tool calls: {e}") from e
        if not calls:
            raise ValueError("no tool calls")
        return calls

    def _tool_call(self, call: Any, tools: list[dict[str, Any]]) -> ToolCall:
        name = call["name"]
        said = call.get("arguments", call.get("parameters"))
        arguments = {} if said is None else arguments_of(said, "arguments")
        if not isinstance(name, str) or not name:
            raise ValueError("a tool has a name")
        if set(arguments) == {"raw"} and name not in {tool["function"]["name"] for tool in tools}:
            raise ValueError("mlx-lm's parser for GLM makes a call of any text")
        found = ToolCall(call.get("id") or self._new_id(), name, arguments)
        (found.id + name + found.arguments_json).encode()  # what can't be sent fails here
        return found

    def _new_id(self) -> str:
        """Return an id for a call. Mistral's templates take nine letters and digits only."""
        if any(text == "[TOOL_CALLS]" for text, _ in self.edges["content"]):
            letters = string.ascii_letters + string.digits
            return "".join(secrets.choice(letters) for _ in range(9))
        return f"call_{secrets.token_hex(12)}"


def generic_markup(own: Markup) -> Markup:
    """Return the markup of a model whose template knows no tools, so that it was told the form.

    That is the form of Hermes' models; the reasoning is as `own` has it.
    """
    edges: dict[State, list[tuple[str, State]]] = {"start": [], "content": []}
    for state, pairs in own.edges.items():
        edges[state] = [(text, to) for text, to in pairs if to != "tool"]
    for state in edges.keys() & {"start", "content", "reasoning"}:
        edges[state].append((json_tools.tool_call_start, "tool"))
    edges["tool"] = [(json_tools.tool_call_end, "start")]
    kept = {state: tuple(pairs) for state, pairs in edges.items()}
    return Markup(kept, own.initial, own.think_start, json_tools.parse_tool_call)


def _llama() -> Markup:
    """Return the markup of Llama 3.1 and later, which mlx-lm does not read.

    An answer that is JSON with a tool's name is a call.
    """
    edges: tuple[tuple[str, State], ...] = (("<|python_tag|>", "tool"), ("{", "tool"))
    return Markup({"start": edges, "content": ()}, parse=_llama_call)


def _llama_call(text: str, tools: list[dict[str, Any]]) -> Any:
    """Read a call, with its first brace or without.

    For example `{"name": "get_weather", "parameters": {"city": "Paris"}}`.
    """
    call = json.loads(text if text.lstrip().startswith("{") else "{" + text)
    if call["name"] not in {tool["function"]["name"] for tool in tools}:
        raise ValueError("not every object with a name is a call")
    return call


def _harmony() -> Markup:
    """Return the markup of gpt-oss.

    Every part of an answer is a message of its own, whose header names a channel and who it is for.
    """
    ends: tuple[tuple[str, State], ...] = (("<|end|>", "header"), ("<|call|>", "header"))
    header: tuple[tuple[str, State], ...] = (
        ("<|channel|>analysis<|message|>", "reasoning"),
        ("<|channel|>commentary<|message|>", "content"),
        ("<|channel|>final<|message|>", "content"),
        ("<|start|>assistant", "header"),
        ("to=functions.", "tool"),
    )
    return Markup(
        {"header": header, "reasoning": ends, "content": ends, "tool": ends},
        initial="header",
        parse=_harmony_call,
    )


def _harmony_call(text: str, tools: list[dict[str, Any]]) -> dict[str, Any]:
    """Read a call.

    For example `get_weather <|channel|>commentary <|constrain|>json<|message|>{"city": "Paris"}`.
    """
    match = _HARMONY_CALL.fullmatch(text)
    if match is None:
        raise ValueError("no tool call")
    return {"name": match.group(1), "arguments": match.group(2)}
