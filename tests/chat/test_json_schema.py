"""JSON schemas made fit: loose ones are read, what is not supported is named by its path."""

import json
import time

import pytest

from agentmem.chat.grammar import json_content, text_grammar
from agentmem.chat.json_schema import fit, refusal
from agentmem.errors import InvalidRequest
from support.grammars import accepts, served_tokenizer


def of(**properties):
    return {"type": "object", "properties": properties}


def takes(schema, value):
    grammar = text_grammar(json_content(schema, "schema"))
    return accepts(served_tokenizer("smollm2"), grammar, json.dumps(value, ensure_ascii=False))


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"type": "object", "properties": None, "required": None}, {"a": 1}, []),
        (of(a={"type": "STRING"}), {"a": "x"}, {"a": 1}),
        (of(a={"type": "int"}, b={"type": "any"}), {"a": 1, "b": [2]}, {"a": "x"}),
        (of(a={"type": "string", "nullable": True}), {"a": None}, {"a": 1}),
        (of(a={"enum": ["x"], "nullable": True}), {"a": None}, {"a": "y"}),
        (of(a={"type": "integer", "format": "int32"}), {"a": 1}, {"a": 1.5}),
        (of(a={"type": "string", "format": "path"}), {"a": "x"}, {"a": 1}),
        (of(a={"type": "string", "required": True}), {"a": "x"}, {"a": 1}),
        (of(a={"minimum": 0, "exclusiveMinimum": True, "type": "integer"}), {"a": 1}, {"a": 0}),
        ({"type": "array", "items": [{"type": "integer"}]}, [1], ["x"]),
        (of(a={"type": "array", "uniqueItems": False}), {"a": [1, 1]}, {"a": 1}),
        ({"$schema": "http://json-schema.org/draft-07/schema#", **of(a={})}, {"a": 1}, [1]),
        ({"$schema": "http://example.org/mine", "$id": "urn:x", **of(a={})}, {"a": 1}, [1]),
        ({"$ref": "#/$defs/n", "$defs": {"n": of(n={"$ref": "#/$defs/n"})}}, {"n": {}}, [1]),
        (
            {"$ref": "#/definitions/n", "definitions": {"n": {"type": "integer"}}},
            1,
            "x",
        ),
        (of(**{'süß "q" 🦊': {"type": "integer"}}), {'süß "q" 🦊': 1}, {"süß": 1}),
        ({"properties": {"a": True}, "x-guidance": {"lenient": True}}, {"a": 1}, {"b": 1}),
        (of(a={"type": "integer"}), {"a": 1}, {"b": 1}),  # no others unless it says so
        (of(a={}) | {"additionalProperties": True}, {"a": 1, "b": 2}, [1]),
        (of(a={}) | {"required": ["b"]}, {"a": 1, "b": 2}, {"a": 1}),
        ({"allOf": [of(a={"type": "integer"}), of(b={})]}, {"a": 1, "b": 2}, {"a": "x"}),
        (True, [1], None),
    ],
)
def test_loose_schemas_are_read_as_they_are_meant(schema, good, bad):
    assert takes(schema, good)
    assert bad is None or not takes(schema, bad)


def test_choices_that_exclude_each_other_may_be_references():
    def kind(name):
        return of(kind={"const": name}, n={"type": "integer"}) | {"required": ["kind"]}

    schema = {
        "oneOf": [{"$ref": "#/$defs/Cat"}, {"$ref": "#/$defs/Dog"}],
        "discriminator": {"propertyName": "kind"},
        "$defs": {"Cat": kind("cat"), "Dog": kind("dog")},
    }
    assert takes(schema, {"kind": "dog", "n": 1})
    assert not takes(schema, {"kind": "cow"})
    schema["$defs"]["Dog"] = kind("cat")
    assert refusal(fit(schema, "schema")) is not None


@pytest.mark.parametrize(
    ("schema", "path"),
    [
        (of(a={"not": {"type": "null"}}), "#/properties/a/not"),
        (of(a=of(b={"type": "array", "uniqueItems": True})),
         "#/properties/a/properties/b/uniqueItems"),
        (of(a={"type": "array", "items": {"contains": {}}}), "#/properties/a/items/contains"),
        ({"anyOf": [{"type": "null"}, {"if": {}, "then": {}}]}, "#/anyOf/1/if"),
        ({"$ref": "#/$defs/a~b", "$defs": {"a~b": {"propertyNames": {}}}},
         "#/$defs/a~0b/propertyNames"),
        (of(**{"ü/x y%": {"dependentRequired": {}}}), "#/properties/ü~1x y%/dependentRequired"),
        (of(a={"type": "string", "pattern": "(?=x)"}), "#/properties/a"),
        (of(a={"type": "strnig"}), "#/properties/a"),
        (of(a={"$ref": "#/$defs/gone"}), "#/properties/a"),
        (of(a={"$ref": "https://example.com/x.json"}), "#/properties/a"),
        (of(a={"type": "integer", "minimum": 3, "maximum": 1}) | {"required": ["a"]},
         "#/properties/a"),
        ({"enum": []}, "#"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "#"),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_named_by_its_path(schema, path):
    with pytest.raises(InvalidRequest) as e:
        json_content(schema, "response_format.json_schema.schema")
    assert e.value.param == "response_format.json_schema.schema"
    assert f" {path}: " in e.value.message and "\n" not in e.value.message


def deep(depth):
    schema = {"type": "integer"}
    for _ in range(depth):
        schema = of(a=schema)
    return schema


@pytest.mark.parametrize(
    "schema",
    [
        deep(60),
        deep(5000),
        of(a={"enum": ["x" * 1000] * 1000}),
        of(a={"$ref": "#/properties/a"}) | {"required": ["a"]},
        {"allOf": [{"$ref": "#"}, of(a={})]},
        "nothing",
        {"type": {"a": 1}},
        {"properties": [1]},
        {"required": "a", "properties": {"a": {}}},
        {"$defs": {"a": {"not": {}}}, "type": "object", "properties": {}},
        {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
    ],
)
def test_schemas_without_end_or_sense_are_soon_taken_or_refused(schema):
    began = time.monotonic()
    try:
        json_content(schema, "schema")
    except InvalidRequest as e:
        assert e.param == "schema" and len(e.message) < 1000
    assert time.monotonic() - began < 2
