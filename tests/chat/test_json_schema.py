"""JSON schemas made fit: loose ones are read, what is not supported is named by its path."""

import json
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from agentmem.chat.grammar import json_content, text_grammar
from agentmem.chat.json_schema import fit, refusal
from agentmem.errors import InvalidRequest
from support.grammars import accepts, draw, served_tokenizer


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


TYPES = st.sampled_from(["null", "boolean", "integer", "number", "string", "array", "object"])
NAMES = st.sampled_from(["a", "b", "c d", "ü"])
VALUES = st.one_of(st.none(), st.booleans(), st.integers(-5, 5), st.text(max_size=4))
LEAVES = st.one_of(
    st.fixed_dictionaries({"type": TYPES}),
    st.fixed_dictionaries(
        {"type": st.just("integer")},
        optional={
            "minimum": st.integers(-99, 5),
            "maximum": st.integers(6, 99),
            "multipleOf": st.integers(1, 7),
        },
    ),
    st.fixed_dictionaries(
        {"type": st.just("string")},
        optional={
            "minLength": st.integers(0, 3),
            "maxLength": st.integers(3, 6),
            "pattern": st.sampled_from(["^a+$", "b", "[0-9]{2}"]),
            "format": st.sampled_from(["date", "uuid", "ipv4", "path"]),
        },
    ),
    st.fixed_dictionaries({"enum": st.lists(VALUES, min_size=1, max_size=3)}),
    st.fixed_dictionaries({"const": st.one_of(VALUES, st.lists(st.integers(0, 3), max_size=2))}),
    st.sampled_from([{}, True]),
)


def larger(inner):
    some = st.lists(inner, min_size=1, max_size=3)
    objects = st.fixed_dictionaries(
        {"type": st.just("object"), "properties": st.dictionaries(NAMES, inner, max_size=3)},
        optional={
            "required": st.lists(NAMES, max_size=3, unique=True),
            "additionalProperties": st.one_of(st.booleans(), inner),
        },
    )
    arrays = st.fixed_dictionaries(
        {"type": st.just("array")},
        optional={
            "items": inner,
            "minItems": st.integers(0, 2),
            "maxItems": st.integers(2, 3),
            "prefixItems": st.lists(inner, max_size=2),
        },
    )
    choices = [st.fixed_dictionaries({name: some}) for name in ("anyOf", "oneOf", "allOf")]
    return st.one_of(objects, arrays, *choices, st.just({"$ref": "#/$defs/x"}))


@st.composite
def schemas(given):
    schema = given(st.recursive(LEAVES, larger, max_leaves=6))
    return {**schema, "$defs": {"x": given(LEAVES)}} if isinstance(schema, dict) else schema


@settings(
    max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
@given(schemas())
def test_every_complete_answer_validates_or_the_schema_is_refused(schema):
    try:
        grammar = text_grammar(json_content(schema, "schema"))
    except InvalidRequest as e:
        assert e.message.startswith("schema: #")
        return
    for seed in range(2):
        drawn = draw(served_tokenizer("smollm2"), grammar, seed, most=200)
        if drawn.ended:
            Draft202012Validator(schema).validate(json.loads(drawn.text))
