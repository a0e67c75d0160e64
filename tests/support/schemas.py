"""A committed set of JSON schemas, all of which are supported, and answers that are checked."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator

from agentmem.chat.grammar import json_content, text_grammar

SCHEMAS: list[Any] = [
    json.loads(line)
    for line in Path(__file__).with_suffix(".jsonl").read_text(encoding="utf-8").splitlines()
]


def grammar_of(schema: Any) -> str:
    """What a request for this schema is held to."""
    return text_grammar(json_content(schema, "schema"))


def check_answers(answers: Iterable[tuple[Any, str, str]]) -> int:
    """Validate the complete ones of (schema, text, reason); return how many those are."""
    complete = 0
    for schema, text, reason in answers:
        if reason == "stop":
            complete += 1
            Draft202012Validator(schema).validate(json.loads(text))
    return complete
