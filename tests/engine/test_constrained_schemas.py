"""Every complete answer to 200 schemas validates: of random models, and of the demo model."""

import json

import pytest

from agentmem.models.loading import load_model
from support.chat.families import FAMILIES
from support.constrained import ConstrainedEngine, constrained_engine
from support.grammars import served_tokenizer
from support.schemas import SCHEMAS, check_answers, grammar_of
from support.tiny import tiny_engine


def ask(engine: ConstrainedEngine, schemas: list, **params: object) -> int:
    """How many answers were complete; all of those validate."""
    asked = [
        {"grammar": grammar_of(schema), "seed": i, **params} for i, schema in enumerate(schemas)
    ]
    answers = engine.ask_all(*asked)
    told = [(answer.text, answer.reason) for answer in answers]
    return check_answers((schema, *one) for schema, one in zip(schemas, told, strict=True))


def test_there_are_200() -> None:
    assert len(SCHEMAS) == 200


@pytest.mark.parametrize("family", ["qwen3", "mistral", "gemma3"])
def test_every_complete_answer_of_a_random_model_validates(tmp_path, family):
    assert family in FAMILIES
    settings = {"max_running": 16, "max_queue": 256}
    with constrained_engine(tmp_path, served_tokenizer(family), **settings) as engine:
        assert ask(engine, SCHEMAS, max_tokens=100) > 100


@pytest.mark.demo
def test_every_complete_answer_of_the_demo_model_validates(tmp_path, demo_model_dir):
    """A part of them: it takes about a second each."""

    def load():
        return load_model(str(demo_model_dir), demo_model_dir.parent.parent)

    with tiny_engine(tmp_path, load, block_size=256, max_running=8) as engine:
        text = "An example in JSON:\n"
        prompt = engine.core.model.tokenizer.encode(text)
        held = ConstrainedEngine(engine)
        # its vocabulary lacks bytes of characters that are rare: it can't say all of them
        spelled = [schema for schema in SCHEMAS if "\\u" not in json.dumps(schema)]
        assert ask(held, spelled[:8], prompt=prompt, max_tokens=16) >= 2
