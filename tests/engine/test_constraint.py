"""Answers that are held to a grammar: they fit it, and the others' do not change."""

import json

import jsonschema
import pytest

from agentmem.errors import InvalidRequest
from support.chat_tokenizers import QWEN3, chat_tokenizer
from support.constrained import ConstrainedEngine, constrained_engine, json_grammar

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "size": {"enum": ["S", "M", "L"]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["name", "size", "tags"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    home = tmp_path_factory.mktemp("constrained")
    with constrained_engine(home, chat_tokenizer(QWEN3), max_running=16) as engine:
        yield engine
        assert engine.engine.engine.health()["status"] == "ok"


def test_every_complete_answer_fits_its_schema(engine: ConstrainedEngine) -> None:
    asked = [{"grammar": json_grammar(SCHEMA), "seed": i, "max_tokens": 120} for i in range(16)]
    answers = engine.ask_all(*asked)
    complete = [answer for answer in answers if answer.reason == "stop"]
    assert len(complete) > 8
    for answer in complete:
        jsonschema.validate(json.loads(answer.text), SCHEMA)
        # a text of bytes has a token each: none was spent on the end
        assert answer.num_tokens == len(answer.text.encode())


def test_a_grammar_that_can_not_be_read_is_refused(engine: ConstrainedEngine) -> None:
    with pytest.raises(InvalidRequest, match="can't be held to this form"):
        engine.compile(json_grammar({"type": "no such type"}))
