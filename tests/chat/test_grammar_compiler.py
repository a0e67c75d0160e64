"""Grammars become matchers over each family's tokens; what can't be one is refused, with why."""

import asyncio
import json
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from llguidance import LLMatcher
from mlx_lm.tokenizer_utils import TokenizerWrapper

from agentmem.chat.grammar import special_tokens
from agentmem.chat.grammar_compiler import GrammarCompiler
from agentmem.engine.constraint import Constraint
from agentmem.errors import InvalidRequest
from support.chat.families import FAMILIES, tokenizer_of
from support.constrained import json_grammar
from support.fake_engine import tiny_tokenizer

THREADS = ThreadPoolExecutor(2)
SCHEMA = {
    "type": "object",
    "properties": {
        "text": {"type": "string", "maxLength": 20},
        "kind": {"enum": ["one", "other"]},
        "n": {"type": "integer"},
    },
    "required": ["text", "kind", "n"],
    "additionalProperties": False,
}


def compiled(tokenizer: TokenizerWrapper, *grammars: str) -> list[LLMatcher]:
    async def all_of_them() -> list[LLMatcher]:
        compiler = GrammarCompiler(tokenizer)
        return [await compiler.compile(grammar) for grammar in grammars]

    return asyncio.run(all_of_them())


def size_of(tokenizer: TokenizerWrapper) -> int:
    return max(tokenizer.get_vocab().values()) + 1


def allowed(constraint: Constraint, size: int) -> set[int]:
    bits = np.unpackbits(constraint.mask().view(np.uint8), bitorder="little")
    return set(np.flatnonzero(bits[:size]).tolist())


def naively_allowed(matcher: LLMatcher, size: int) -> set[int]:
    return {token for token in range(size) if matcher.validate_tokens([token]) == 1}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mask_is_what_trying_each_token_gives(family):
    """Forced text has one of those: the one that the tokenizer would take."""
    tokenizer = tokenizer_of(family)
    size = size_of(tokenizer)
    [matcher] = compiled(tokenizer, json_grammar(SCHEMA))
    for seed in range(3):
        constraint = Constraint(matcher, size, THREADS)
        naive = matcher.deep_copy()
        chance = np.random.default_rng(seed)
        said: list[int] = []
        while not constraint.is_complete and len(said) < 60:
            found = allowed(constraint, size)
            tried = naively_allowed(naive.deep_copy(), size)
            forced = naive.deep_copy().compute_ff_tokens()
            assert found == ({forced[0]} if forced else tried)
            assert found <= tried
            said.append(int(chance.choice(sorted(found))))
            constraint.accept(said[-1])
            assert constraint.error is None
            assert naive.consume_token(said[-1])
        if constraint.is_complete:
            assert json.loads(tokenizer.decode(said))["kind"] in ("one", "other")


@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_may_end_by_any_of_the_ends_where_its_grammar_may_and_nowhere_else(family):
    tokenizer = tokenizer_of(family)
    size = size_of(tokenizer)
    ends = set(tokenizer.eos_token_ids)
    [matcher] = compiled(tokenizer, LLMatcher.grammar_from_lark('start: "a" /[ab]+/'))
    constraint = Constraint(matcher, size, THREADS)
    for may_end in (False, False, True, True):
        found = allowed(constraint, size)
        assert found & ends == (ends if may_end else set())
        constraint.accept(min(token for token in found if tokenizer.decode([token]) in ("a", "b")))


@pytest.mark.parametrize("family", FAMILIES)
def test_no_special_token_is_text(family):
    """Its name may be said, but in ordinary tokens."""
    tokenizer = tokenizer_of(family)
    size = size_of(tokenizer)
    specials = special_tokens(tokenizer)
    names = [name for name in specials if name.isascii()]
    grammars = [json_grammar({"const": f"a {name} b"}) for name in names]
    for name, matcher in zip(names, compiled(tokenizer, *grammars), strict=True):
        constraint = Constraint(matcher, size, THREADS)
        said: list[int] = []
        while not constraint.is_complete:
            found = allowed(constraint, size)
            assert constraint.error is None
            assert not found & set(specials.values())
            said.append(min(found))
            constraint.accept(said[-1])
        assert tokenizer.decode(said).strip() == f'"a {name} b"'
    [matcher] = compiled(tokenizer, json_grammar({"type": "string"}))
    constraint = Constraint(matcher, size, THREADS)
    chance = np.random.default_rng(0)
    for _ in range(40):
        found = allowed(constraint, size)
        assert not found & set(specials.values())
        inside = [token for token in found if '"' not in tokenizer.decode([token])] or list(found)
        constraint.accept(int(chance.choice(sorted(inside))))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_special_token_comes_where_the_grammar_names_it(family):
    tokenizer = tokenizer_of(family)
    size = size_of(tokenizer)
    ends = set(tokenizer.eos_token_ids)
    for token in set(special_tokens(tokenizer).values()) - ends:
        lark = f'start: /[a-z]/ <[{token}]> "x"'
        [matcher] = compiled(tokenizer, LLMatcher.grammar_from_lark(lark))
        constraint = Constraint(matcher, size, THREADS)
        constraint.accept(
            next(t for t in allowed(constraint, size) if tokenizer.decode([t]) == "q")
        )
        assert allowed(constraint, size) == {token}
        constraint.accept(token)
        assert {tokenizer.decode([t]) for t in allowed(constraint, size)} == {"x"}


@pytest.mark.parametrize(
    "grammar",
    [
        "start: /a",
        "{}",
        "no grammar at all",
        json_grammar({"type": "no such type"}),
        json_grammar({"$ref": "#/$defs/none"}),
        json_grammar({"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}),
        json_grammar({"type": "string", "pattern": "(?=a)b"}),
        json_grammar({"allOf": [{"type": "string", "pattern": f".*{c}.*{c}"} for c in "abcdefgh"]}),
        json_grammar({"description": "x" * (2 << 20)}),
    ],
    ids=lambda grammar: grammar[:20] + grammar[-20:],
)
def test_what_can_not_be_a_grammar_is_refused_soon_with_a_reason_of_one_line(grammar):
    began = time.monotonic()
    with pytest.raises(InvalidRequest, match=r"can't be held to this form: .{10}") as refused:
        compiled(tokenizer_of("qwen3"), grammar)
    assert time.monotonic() - began < 10
    assert len(refused.value.message) < 500
    assert "\n" not in refused.value.message


def test_a_tokenizer_whose_tokens_are_no_bytes_is_named(tmp_path):
    with pytest.raises(InvalidRequest, match="of its tokenizer"):
        compiled(tiny_tokenizer(), json_grammar(SCHEMA))


def test_a_grammar_that_is_known_is_not_compiled_again():
    first, other, again = compiled(
        tokenizer_of("qwen3"),
        json_grammar(SCHEMA),
        json_grammar({"type": "null"}),
        json_grammar(SCHEMA),
    )
    assert again is first
    assert other is not first
