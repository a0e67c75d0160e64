"""Histories as agents really keep them: whatever of them is odd, the next request holds it too."""

from typing import Any

SYSTEM = {"role": "system", "content": "Be brief, said the system."}
ASK = {"role": "user", "content": "What is the weather?"}
YES = {"role": "assistant", "content": "Surely, said I."}
GO_ON = {"role": "user", "content": "And what then?"}
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}
SURROGATE = "cut here: \ud83d ..."


def call(id: Any = "c1", arguments: Any = '{"city": "Oslo"}', **more: Any) -> dict[str, Any]:
    """A call of the tool; `id` ... leaves the id out, as `arguments` ... does with these."""
    function: dict[str, Any] = {"name": "get_weather"}
    if arguments is not ...:
        function["arguments"] = arguments
    made = {"type": "function", "function": function, **more}
    return made if id is ... else {"id": id, **made}


def result(id: Any = "c1", content: Any = "rain over Bergen", **more: Any) -> dict[str, Any]:
    made = {"role": "tool", "content": content, **more}
    return made if id is ... else {**made, "tool_call_id": id}


def calling(*calls: dict[str, Any], content: Any = None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, "tool_calls": list(calls), **more}


def image(url: str = "data:image/png;base64,AA==") -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


ROLES: dict[str, list[dict[str, Any]]] = {
    "in turn": [SYSTEM, ASK, YES, GO_ON],
    "two users": [ASK, GO_ON],
    "two users later": [ASK, YES, GO_ON, {"role": "user", "content": "Hurry up."}],
    "two assistants": [ASK, YES, {"role": "assistant", "content": "Or not."}, GO_ON],
    "assistant first": [YES, ASK],
    "system, assistant first": [SYSTEM, YES, ASK],
    "system late": [ASK, YES, SYSTEM, GO_ON],
    "system last": [ASK, SYSTEM],
    "system alone": [SYSTEM],
    "two systems": [SYSTEM, {"role": "system", "content": "Be kind."}, ASK],
    "developer": [{"role": "developer", "content": "Be quick."}, ASK],
    "system and developer": [SYSTEM, {"role": "developer", "content": "Be quick."}, ASK],
    "no user": [SYSTEM, YES],
    "assistant alone": [YES],
    "ends in assistant": [ASK, YES],
    "empty answer": [ASK, {"role": "assistant", "content": ""}, GO_ON],
    "null answer": [ASK, {"role": "assistant", "content": None}, GO_ON],
    "no content": [ASK, {"role": "assistant"}, GO_ON],
    "unknown role": [{"role": "narrator", "content": "It was night."}, ASK],
    "other names of roles": [
        {"role": "human", "content": "Hello from a human."},
        {"role": "model", "content": "Hello from a model."},
        GO_ON,
    ],
    "named users": [{**ASK, "name": "ann"}, {**GO_ON, "name": "bob"}],
    "named assistant": [ASK, {**YES, "name": "clerk"}, GO_ON],
}
CALLS: dict[str, list[dict[str, Any]]] = {
    "call and result": [ASK, calling(call()), result()],
    "call, result, more": [SYSTEM, ASK, calling(call()), result(), YES, GO_ON],
    "said and called": [ASK, calling(call(), content="I look it up."), result(), GO_ON],
    "two calls": [ASK, calling(call("a"), call("b")), result("a"), result("b", "sun"), GO_ON],
    "results out of order": [ASK, calling(call("a"), call("b")), result("b", "sun"), result("a")],
    "same id twice": [ASK, calling(call(), call()), result(), result(content="sun")],
    "result without call": [ASK, result("gone")],
    "call without result": [ASK, calling(call()), GO_ON],
    "two calls, one result": [ASK, calling(call("a"), call("b")), result("a"), GO_ON],
    "result twice": [ASK, calling(call()), result(), result(content="sun")],
    "user after result": [ASK, calling(call()), result(), GO_ON],
    "result after the user": [ASK, calling(call()), GO_ON, result()],
    "ends in a call": [ASK, calling(call())],
    "call first": [calling(call()), result(), ASK],
    "id missing": [ASK, calling(call(...)), result()],
    "id null": [ASK, calling(call(None)), result()],
    "id empty": [ASK, calling(call("")), result("")],
    "tool_call_id missing": [ASK, calling(call()), result(...)],
    "tool_call_id null": [ASK, calling(call()), result(None)],
    "id of nine letters": [ASK, calling(call("abcdefghi")), result("abcdefghi")],
    "long id": [ASK, calling(call("call_" + "x" * 40)), result("call_" + "x" * 40)],
    "no type": [ASK, calling({k: v for k, v in call().items() if k != "type"}), result()],
    "index": [ASK, calling(call(index=0)), result()],
    "role function": [ASK, {"role": "function", "name": "get_weather", "content": "snow"}],
    "function_call": [
        ASK,
        {
            "role": "assistant",
            "content": None,
            "function_call": {"name": "get_weather", "arguments": "{}"},
        },
        {"role": "function", "name": "get_weather", "content": "snow"},
    ],
    "empty result": [ASK, calling(call()), result(content="")],
    "null result": [ASK, calling(call()), result(content=None)],
    "result of parts": [
        ASK,
        calling(call()),
        result(content=[{"type": "text", "text": "rain in parts"}]),
    ],
    "result is JSON": [ASK, calling(call()), result(content='{"sky": "grey", "wet": true}')],
    **{
        f"arguments {name}": [ASK, calling(call(arguments=arguments)), result(), GO_ON]
        for name, arguments in {
            "cut": '{"city": "Os',
            "a brace": "{",
            "empty": "",
            "of Python": "{'city': 'Oslo'}",
            "a list": '["Oslo"]',
            "null as text": "null",
            "null": None,
            "missing": ...,
            "an object": {"city": "Oslo"},
            "two": '{"a":1}{"b":2}',
            "a newline in a string": '{"city": "Os\nlo"}',
            "a number": 7,
        }.items()
    },
}
FORMS: dict[str, list[dict[str, Any]]] = {
    "parts": [{"role": "user", "content": [{"type": "text", "text": "Hello in parts."}]}],
    "parts of other names": [
        {"role": "user", "content": [{"type": "input_text", "text": "Hello, input."}]},
        {"role": "assistant", "content": [{"type": "output_text", "text": "Hello, output."}]},
        GO_ON,
    ],
    "texts in a list": [{"role": "user", "content": ["Hello ", "in a list."]}, YES, GO_ON],
    "refusal": [ASK, {"role": "assistant", "content": None, "refusal": "I will not."}, GO_ON],
    "refusal in a part": [
        ASK,
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "I shall not."}]},
        GO_ON,
    ],
    "fields of others": [
        {**ASK, "timestamp": 1, "cache_control": {"type": "ephemeral"}, "images": []},
        {
            **YES,
            "id": "msg_1",
            "annotations": [{"type": "url_citation"}],
            "reasoning_details": [{"type": "reasoning.text", "text": "hm"}],
            "provider_specific_fields": {"refusal": None},
            "thinking_blocks": [{"type": "thinking", "thinking": "hm", "signature": ""}],
            "function_call": None,
            "audio": None,
            "parsed": None,
        },
        GO_ON,
    ],
    "reasoning": [ASK, {**YES, "reasoning_content": "I wonder."}, GO_ON],
    "an old image": [{"role": "user", "content": [image(), ASK]}, YES, GO_ON],
    "an image in a result": [
        ASK,
        calling(call()),
        result(content=[image(), {"type": "text", "text": "a picture of rain"}]),
        GO_ON,
    ],
    "half an emoji": [{"role": "user", "content": SURROGATE}, YES, GO_ON],
    "half an emoji in a result": [ASK, calling(call()), result(content=SURROGATE), GO_ON],
    "half an emoji in arguments": [
        ASK,
        calling(call(arguments={"city": SURROGATE})),
        result(),
        GO_ON,
    ],
    "an unknown part": [
        {"role": "user", "content": [{"type": "poll", "choices": ["tea"]}]},
        YES,
        GO_ON,
    ],
    "a number for a content": [{"role": "user", "content": 5}, YES, GO_ON],
}
FORMS["an old image"][0] = {
    "role": "user",
    "content": [image(), {"type": "text", "text": "What is in this picture?"}],
}
SHAPES = ROLES | CALLS | FORMS
