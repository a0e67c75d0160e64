"""benchmarks/schemas/: what `agentmem bench NAME --json` writes."""

import importlib
import json
import pkgutil
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator, ValidationError

import agentmem.bench
from agentmem.bench.harness.result import Result
from agentmem.bench.harness.schemas import RESULTS, result_class, schema

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SCHEMAS = sorted((BENCHMARKS / "schemas").glob("*.json"))
COMMITTED = [
    path
    for path in sorted((BENCHMARKS / "results").glob("*.json"))
    if "agentmem" in json.loads(path.read_text())
]


def test_the_committed_schemas_are_those_of_the_classes():
    committed = {path.stem: json.loads(path.read_text()) for path in SCHEMAS}
    assert committed == {name: schema(name) for name in RESULTS}, (
        "python -m agentmem.bench.harness.schemas benchmarks/schemas"
    )


def test_every_kind_of_result_has_a_schema():
    for module in pkgutil.iter_modules(agentmem.bench.__path__):
        importlib.import_module(f"agentmem.bench.{module.name}")
    assert {of.__name__ for of in Result.__subclasses__()} == {
        result_class(name).__name__ for name in RESULTS
    }


@pytest.mark.parametrize("path", SCHEMAS, ids=lambda path: path.stem)
def test_a_schema_wants_every_key_and_no_other(path):
    found = json.loads(path.read_text())
    Draft202012Validator.check_schema(found)
    for part in (found, *found["$defs"].values()):
        if part["type"] == "object":
            assert part["additionalProperties"] is False
            assert set(part["required"]) == set(part["properties"])


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_committed_results_that_name_their_agentmem_are_valid(path):
    result = json.loads(path.read_text())
    validator = Draft202012Validator(schema(result["benchmark"]))
    validator.validate(result)
    with pytest.raises(ValidationError):
        validator.validate(result | {"surprise": 1})
    del result["noise"]["quiet"]
    with pytest.raises(ValidationError):
        validator.validate(result)
