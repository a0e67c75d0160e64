"""Answers that are held to a grammar: they fit it, and what others say does not change."""

import asyncio
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from llguidance import LLMatcher

from agentmem.errors import InvalidRequest
from support.chat.families import FAMILIES
from support.chat_tokenizers import QWEN3, chat_tokenizer
from support.constrained import Answer, ConstrainedEngine, constrained_engine, json_grammar
from support.grammars import served_tokenizer
from support.tiny import ONE_SEQUENCE, random_tokens

TOKENIZER = chat_tokenizer(QWEN3)
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
LETTERS = LLMatcher.grammar_from_regex("[a-z]{40}")


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ConstrainedEngine]:
    home = tmp_path_factory.mktemp("constrained")
    with constrained_engine(home, TOKENIZER, max_running=16) as engine:
        yield engine
        assert engine.engine.engine.health()["status"] == "ok"


def check_fits(answer: Answer, schema: Any) -> None:
    jsonschema.Draft202012Validator(schema).validate(json.loads(answer.text))


def test_every_complete_answer_fits_its_schema(engine: ConstrainedEngine) -> None:
    asked = [{"grammar": json_grammar(SCHEMA), "seed": i, "max_tokens": 120} for i in range(32)]
    answers = engine.ask_all(*asked)
    complete = [answer for answer in answers if answer.reason == "stop"]
    assert len(complete) > 24
    assert len({answer.text for answer in complete}) == len(complete)
    for answer in complete:
        check_fits(answer, SCHEMA)
        # a byte has a token each: none was spent on the end
        assert answer.num_tokens == len(answer.text.encode())


@pytest.mark.parametrize("family", FAMILIES)
def test_it_does_so_with_every_familys_tokens(tmp_path: Path, family: str) -> None:
    with constrained_engine(tmp_path, served_tokenizer(family), max_running=8) as engine:
        asked = [{"grammar": json_grammar(SCHEMA), "seed": i, "max_tokens": 90} for i in range(8)]
        answers = engine.ask_all(*asked)
    complete = [answer for answer in answers if answer.reason == "stop"]
    assert len(complete) >= 4
    for answer in complete:
        check_fits(answer, SCHEMA)


def test_greedy_answers_are_the_same_alone_and_together(engine: ConstrainedEngine) -> None:
    """Held and free ones, and two that share a grammar."""
    asked: list[dict[str, Any]] = []
    grammars = [None, json_grammar(SCHEMA), LETTERS, None, json_grammar(SCHEMA), None]
    for i, grammar in enumerate(grammars):
        prompt = [i + 3, 5, 9, 11]
        asked.append(
            {
                "grammar": grammar,
                "prompt": prompt,
                "temperature": 0.0,
                "max_tokens": 40,
                "ignore_eos": True,
                # or a tiny model says one letter for ever
                "frequency_penalty": 0.5,
            }
        )
    alone = [engine.ask(f"alone {i}", **one) for i, one in enumerate(asked)]
    together = engine.ask_all(*asked)
    assert [one.text for one in together] == [one.text for one in alone]
    assert [one.reason for one in together] == [one.reason for one in alone]


def test_a_grammar_that_allows_everything_changes_no_token(engine: ConstrainedEngine) -> None:
    anything = LLMatcher.grammar_from_regex("(.|\n)*")
    for seed in range(4):
        free = engine.ask("free", None, seed=seed, max_tokens=12, logit_bias=_text_only())
        held = engine.ask("held", anything, seed=seed, max_tokens=12, logit_bias=_text_only())
        assert held.text == free.text


def _text_only() -> tuple[tuple[int, float], ...]:
    """Letters alone, so that a random model writes UTF-8."""
    letters = set(TOKENIZER.encode("abcdefghijklmnopqrstuvwxyz", add_special_tokens=False))
    return tuple((token, -100.0) for token in range(256) if token not in letters)


def test_a_preempted_answer_goes_on_where_it_was(tmp_path: Path) -> None:
    grammar = LLMatcher.grammar_from_regex("([a-z]{3}[0-9]{3}){60}")
    asked = [
        {"grammar": grammar, "seed": i, "max_tokens": 120, "prompt": random_tokens(240, seed=i)}
        for i in range(6)
    ]
    with constrained_engine(tmp_path / "free", TOKENIZER) as free:
        wanted = free.ask_all(*asked)
        assert free.engine.core.scheduler.preemptions == 0
    settings = {"kv_budget": 4 * ONE_SEQUENCE, "tail_delay": 0.0}
    with constrained_engine(tmp_path / "tight", TOKENIZER, **settings) as tight:
        assert tight.ask_all(*asked) == wanted
        assert tight.engine.core.scheduler.preemptions > 0
    for answer in wanted:
        assert re.fullmatch("([a-z]{3}[0-9]{3}){20}", answer.text)


def test_any_end_is_said_where_the_grammar_may_end_even_where_ends_are_ignored(
    engine: ConstrainedEngine,
) -> None:
    grammar = LLMatcher.grammar_from_regex("[ab]{1,200}")
    for ignore_eos in (False, True):
        answers = engine.ask_all(
            *[
                {"grammar": grammar, "seed": i, "max_tokens": 200, "ignore_eos": ignore_eos}
                for i in range(8)
            ]
        )
        ended = [one for one in answers if one.reason == "stop"]
        assert ended
        for one in ended:
            assert set(one.text) <= {"a", "b"}
            assert one.text
            assert one.num_tokens == len(one.text) + (len(one.text) < 200)


def test_a_grammar_that_is_complete_ends_the_answer_with_its_last_token(
    engine: ConstrainedEngine,
) -> None:
    for ignore_eos in (False, True):
        answer = engine.ask("a", LETTERS, max_tokens=40, seed=1, ignore_eos=ignore_eos)
        assert (answer.reason, answer.num_tokens, len(answer.text)) == ("stop", 40, 40)


def test_an_answer_that_is_cut_says_length(engine: ConstrainedEngine) -> None:
    answer = engine.ask("a", LETTERS, max_tokens=39, seed=1)
    assert (answer.reason, len(answer.text)) == ("length", 39)


def test_stop_strings_and_stop_tokens_end_it_as_without(engine: ConstrainedEngine) -> None:
    grammar = LLMatcher.grammar_from_regex("[a-y]{6}zz[a-y]{9}")
    answer = engine.ask("a", grammar, seed=2, stop=("zz",))
    assert (answer.reason, len(answer.text)) == ("stop", 6)
    [z] = TOKENIZER.encode("z", add_special_tokens=False)
    answer = engine.ask("b", grammar, seed=2, stop_token_ids=(z,))
    assert (answer.reason, len(answer.text)) == ("stop", 6)
    # what may begin a stop string, and is the answer's end, belongs to it
    answer = engine.ask("c", LLMatcher.grammar_from_regex("[a-y]{4}zz"), seed=2, stop=("zzz",))
    assert (answer.reason, answer.text[4:]) == ("stop", "zz")


def test_bias_chooses_among_what_is_allowed_and_lifts_nothing_else(
    engine: ConstrainedEngine,
) -> None:
    [a, b, z] = [TOKENIZER.encode(c, add_special_tokens=False)[0] for c in "abz"]
    grammar = LLMatcher.grammar_from_regex("[ab]{20}")
    for wanted, token, other in (("a", a, b), ("b", b, a)):
        bias = ((token, 100.0), (z, 1000.0), (other, -100.0))
        assert engine.ask("x", grammar, seed=3, logit_bias=bias).text == wanted * 20


def test_log_probabilities_are_the_models_own(engine: ConstrainedEngine) -> None:
    free = engine.ask("free", None, temperature=0.0, max_tokens=1, logprobs=5, ignore_eos=True)
    grammar = LLMatcher.grammar_from_regex("[0-9]{3}")
    held = engine.ask("held", grammar, temperature=0.0, logprobs=5)
    assert dict(held.logprobs[0].top) == pytest.approx(dict(free.logprobs[0].top))
    assert held.text.isdigit()
    assert len(held.logprobs) == 3
    likeliest, _ = held.logprobs[0].top[0]
    assert likeliest == free.logprobs[0].token


def test_an_answer_that_its_grammar_lets_down_fails_alone(engine: ConstrainedEngine) -> None:
    """No token is the byte that comes after the letters: it is in no UTF-8."""
    missing = LLMatcher.grammar_from_lark(
        '%llguidance {"allow_invalid_utf8": true}\nstart: /[a-z]{8}/ /\\xff/'
    )
    try:
        engine.compile(missing)
    except InvalidRequest:
        pytest.skip("llguidance sees it ahead")
    before = engine.engine.engine.metrics().decode()
    assert "agentmem_failed_grammars_total 0.0" in before
    wanted = engine.ask("other", LETTERS, seed=5)

    async def both() -> Answer:
        failing = asyncio.ensure_future(engine.answer("failing", missing, seed=1))
        other = await engine.answer("beside", LETTERS, seed=5)
        with pytest.raises(InvalidRequest, match="can't go on under its grammar") as failed:
            await failing
        assert failed.value.code == "grammar_failed"
        return other

    assert engine.engine.call(both()) == wanted
    assert "agentmem_failed_grammars_total 1.0" in engine.engine.engine.metrics().decode()
    # what the agent had is kept, and it answers again
    assert engine.ask("failing", LETTERS, seed=5).text == wanted.text
    assert engine.engine.engine.health()["status"] == "ok"


def test_a_grammar_that_can_not_be_read_is_refused(engine: ConstrainedEngine) -> None:
    with pytest.raises(InvalidRequest, match="can't be held to this form"):
        engine.compile(json_grammar({"type": "no such type"}))


def test_many_grammars_are_compiled_while_others_answer(engine: ConstrainedEngine) -> None:
    """The oldest are forgotten, and the event loop is never held up."""

    async def compile_many() -> float:
        worst = 0.0
        for i in range(80):
            began = time.perf_counter()
            await engine.compiler.compile(json_grammar({"const": f"value {i}"}))
            worst = max(worst, time.perf_counter() - began)
        return worst

    assert engine.engine.call(compile_many()) < 5
    assert len(engine.compiler._compiled) == 64
