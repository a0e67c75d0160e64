"""Log probabilities that the engine tells, against those of a plain pass over all tokens."""

import mlx.core as mx
import numpy as np
import pytest

from agentmem.agent_key import AgentKey
from agentmem.engine import model_runner
from agentmem.engine.api import Finished, GenerateRequest, SamplingParams, TextDelta
from support.tiny import BLOCK, KINDS, random_tokens, tiny_engine, tiny_loader

PROMPT = random_tokens(3 * BLOCK + 11, seed=1)


def ask(engine, tokens, max_tokens=8, agent="alice", **params):
    """The log probabilities that come, what the answer cost, and how it ended."""

    async def collect():
        given = {"seed": 7, "ignore_eos": True, **params}
        request = GenerateRequest(
            AgentKey("default", agent), tokens, SamplingParams(max_tokens, **given)
        )
        told = []
        async for event in engine.engine.generate(request):
            if isinstance(event, TextDelta):
                told += event.logprobs
                assert event.text or event.logprobs
            if isinstance(event, Finished):
                return told, event
        raise AssertionError("the stream ended without Finished")

    return engine.call(collect())


def expected(engine, tokens):
    """Log softmax [len(tokens) - 1, vocab] of one pass over the tokens, of what follows each."""

    def forward():
        runner = engine.core.runner
        logits, _ = runner.forward(mx.array([tokens[:-1]]), [runner.new_cache()])
        logits = logits[0, :, : engine.core.vocab_size].astype(mx.float32)
        return np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))

    return engine.on_engine(forward)


def chosen(told):
    return np.array([t.logprob for t in told])


@pytest.mark.parametrize("kind", KINDS)
def test_prompt_and_answer_have_the_models_own_log_probabilities(tmp_path, kind):
    with tiny_engine(tmp_path, tiny_loader(kind)) as engine:
        told, end = ask(engine, PROMPT, temperature=0.5, logprobs=2, prompt_logprobs=2)
        tokens = [PROMPT[0], *(t.token for t in told)]
        assert tokens[: len(PROMPT)] == PROMPT and end.stats.completion_tokens == 8
        assert len(tokens) == len(PROMPT) + 8
        want = expected(engine, tokens)
    rows = np.arange(len(want))
    np.testing.assert_allclose(chosen(told), want[rows, tokens[1:]], atol=1e-4)
    for row, t in zip(want, told, strict=True):
        np.testing.assert_allclose([p for _, p in t.top], np.sort(row)[:-3:-1], atol=1e-4)
        assert all(abs(row[token] - p) < 1e-4 for token, p in t.top)


def test_bias_and_temperature_do_not_change_what_is_told(tmp_path):
    with tiny_engine(tmp_path) as engine:
        told, _ = ask(engine, PROMPT, 4, logprobs=0, logit_bias=((9, 50.0),), temperature=0.1)
        want = expected(engine, [*PROMPT, *(t.token for t in told)])[-4:]
    assert {t.token for t in told} == {9} and not any(t.top for t in told)
    np.testing.assert_allclose(chosen(told), want[:, 9], atol=1e-4)


def test_the_likeliest_token_is_exactly_the_first_of_the_likeliest(tmp_path):
    with tiny_engine(tmp_path) as engine:
        for num_top in (1, 5):
            told, _ = ask(engine, PROMPT, temperature=0, logprobs=num_top, agent=f"a{num_top}")
            assert all((t.token, t.logprob) == t.top[0] and len(t.top) == num_top for t in told)


def test_an_answer_that_is_sent_as_a_prompt_has_the_same_log_probabilities(tmp_path):
    with tiny_engine(tmp_path) as engine:
        said, _ = ask(engine, PROMPT, 20, logprobs=0)
        tokens = [*PROMPT, *(t.token for t in said)]
        told, _ = ask(engine, tokens, 0, prompt_logprobs=0, agent="bob")
    assert len(told) == len(tokens) - 1
    np.testing.assert_allclose(chosen(told)[-20:], chosen(said), atol=1e-4)


def test_a_prompt_is_scored_as_if_nothing_were_cached_and_is_cached_afterwards(tmp_path):
    with tiny_engine(tmp_path) as engine:
        first, cold = ask(engine, PROMPT, prompt_logprobs=1)
        again, hot = ask(engine, PROMPT, prompt_logprobs=1)
        _, plain = ask(engine, PROMPT)
    assert first == again
    assert (cold.stats.cached_tokens, hot.stats.cached_tokens) == (0, 0)
    assert (plain.stats.cached_tokens, hot.stats.cause) == (len(PROMPT) - 1, "scored")


@pytest.mark.parametrize("passes", [1, 7, 50])
def test_the_logits_of_a_few_tokens_at_a_time_are_held(tmp_path, monkeypatch, passes):
    with tiny_engine(tmp_path) as engine:
        told, _ = ask(engine, PROMPT, 0, prompt_logprobs=3)
        largest, log_probabilities = [], model_runner.log_probabilities

        def watched(logits, *rest):
            largest.append(len(logits))
            return log_probabilities(logits, *rest)

        monkeypatch.setattr(model_runner, "log_probabilities", watched)
        monkeypatch.setattr(
            model_runner, "_LOGITS_BYTES", passes * 4 * engine.core.runner.vocab_size
        )
        again, _ = ask(engine, PROMPT, 0, prompt_logprobs=3, agent="bob")
    assert max(largest) == passes
    np.testing.assert_allclose(chosen(again), chosen(told), atol=1e-4)


def test_a_prompt_that_was_preempted_is_scored_once(tmp_path):
    with tiny_engine(tmp_path, prefill_chunk=16) as engine:
        want, _ = ask(engine, PROMPT, 0, prompt_logprobs=0, agent="bob")
        stepper, suspended = engine.core.stepper, []
        prefill = stepper._prefill

        def suspending(step):
            prefill(step)
            seq = step.prefill
            if (
                seq is not None
                and len(suspended) < 2
                and seq.num_scored > 40 * (len(suspended) + 1)
            ):
                suspended.append(seq.num_scored)
                engine.core.admission._preempt(seq)

        stepper._prefill = suspending
        told, _ = ask(engine, PROMPT, 3, prompt_logprobs=0, logprobs=0)
    assert len(suspended) == 2
    assert [t.token for t in told[: len(PROMPT) - 1]] == PROMPT[1:]
    assert len(told) == len(PROMPT) - 1 + 3
    np.testing.assert_allclose(chosen(told)[: len(want)], chosen(want), atol=1e-4)


def test_only_those_who_ask_are_told(tmp_path):
    with tiny_engine(tmp_path) as engine:
        told, _ = ask(engine, PROMPT)
        one, end = ask(engine, [8], 0, prompt_logprobs=1)
    assert told == [] and one == [] and end.reason == "length"


def test_the_string_that_ended_an_answer_is_told(tmp_path):
    with tiny_engine(tmp_path) as engine:
        said, _ = ask(engine, PROMPT, 8, logprobs=0)
        word = f"w{said[4].token}"
        _, end = ask(engine, PROMPT, 8, stop=("nothing", word, word + "x"))
        _, plain = ask(engine, PROMPT, 8, stop=("nothing",))
    assert (end.reason, end.stop_string, end.cut) == ("stop", word, True)
    assert (plain.reason, plain.stop_string) == ("length", None)
