"""POST /v1/completions, as the openai SDK and lm-eval use it, against a real server process."""

import json
import time
from operator import itemgetter

import numpy as np
import openai
import pytest
from openai.types import Completion

from support.chat_http import refused, words
from support.tiny import random_tokens, word_ids


def sdk(server):
    return openai.OpenAI(base_url=server.url, api_key="none", max_retries=0)


def create(server, prompt, **body):
    given = {"model": "default", "temperature": 0, "max_tokens": 6, **body}
    with sdk(server) as client:
        made = client.completions.create(prompt=prompt, **given)
        return list(made) if body.get("stream") else made


def post(server, **body):
    response = server.client.post("/completions", json={"temperature": 0, **body})
    assert response.status_code == 200, response.text
    return response.json()


def scored(server, prompt, **body):
    """The log probabilities of the prompt's tokens, as they are or of each prompt."""
    asked = {"prompt": prompt, "echo": True, "max_tokens": 0, "logprobs": 0, **body}
    [choice] = post(server, **asked)["choices"]
    return choice["logprobs"]["token_logprobs"]


def test_a_text_and_its_token_ids_are_answered_alike(server):
    text = words(20, 1)
    one = create(server, text)
    other = create(server, word_ids(text))
    assert one.object == "text_completion" and one.id.startswith("cmpl-")
    assert one.choices[0].text == other.choices[0].text != ""
    assert (one.usage.prompt_tokens, one.usage.completion_tokens) == (20, 6)
    assert one.choices[0].finish_reason == "length" and one.choices[0].logprobs is None
    Completion.model_validate(one.model_dump(exclude_unset=True))


def test_sixteen_tokens_are_answered_where_nothing_is_said(server):
    asked = {"prompt": words(9, 2), "ignore_eos": True}
    assert post(server, **asked)["usage"]["completion_tokens"] == 16


@pytest.mark.parametrize("stream", [False, True])
def test_several_prompts_have_a_choice_each_in_their_order(server, stream):
    prompts = [word_ids(words(10 + n, n)) for n in range(11)]
    alone = [create(server, prompt).choices[0].text for prompt in prompts]
    made = create(server, prompts, stream=stream, extra_body={"agent_id": "several"})
    if not stream:
        together = [choice.text for choice in made.choices]
        assert [choice.index for choice in made.choices] == list(range(11))
        assert made.usage.prompt_tokens == sum(map(len, prompts))
    else:
        together = [""] * len(prompts)
        ends = []
        for chunk in made:
            [choice] = chunk.choices
            together[choice.index] += choice.text
            ends += [choice.index] if choice.finish_reason else []
        assert sorted(ends) == list(range(11))
    assert together == alone
    texts = [words(10 + n, n) for n in range(2)]
    assert [choice.text for choice in create(server, texts).choices] == alone[:2]


def test_a_stream_adds_up_to_the_whole_answer_and_ends_as_openais_do(server):
    asked = {"echo": True, "logprobs": 2, "max_tokens": 9, "ignore_eos": True}
    prompt = words(40, 3)
    whole = post(server, prompt=prompt, **asked)["choices"][0]
    body = {"prompt": prompt, "temperature": 0, "stream": True, **asked}
    body |= {"stream_options": {"include_usage": True}}
    response = server.client.post("/completions", json=body)
    *lines, done = response.text.strip().split("\n\n")
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines]
    assert done == "data: [DONE]" and len({chunk["id"] for chunk in chunks}) == 1
    *chunks, last = chunks
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 9
    assert all(chunk["usage"] is None for chunk in chunks)
    pieces = [chunk["choices"][0] for chunk in chunks]
    assert "".join(piece["text"] for piece in pieces) == whole["text"]
    for name, column in whole["logprobs"].items():
        told = [value for piece in pieces for value in piece["logprobs"][name]]
        assert told == pytest.approx(column) if name == "token_logprobs" else len(told) == 49
    reasons = [piece["finish_reason"] for piece in pieces]
    assert reasons[-1] == "length" and set(reasons[:-1]) == {None}
    assert pieces[-1]["agentmem"]["agent_id"] == "anonymous"


def test_an_echo_has_the_prompt_before_the_answer_and_a_place_for_each_token(server):
    prompt = words(12, 4)
    plain = create(server, prompt).choices[0].text
    for asked in (prompt, word_ids(prompt)):
        choice = create(server, asked, echo=True, logprobs=3).choices[0]
        table = choice.logprobs
        assert choice.text == prompt + plain and plain.startswith(" ")
        assert table.token_logprobs[0] is None and table.top_logprobs[0] is None
        assert len(table.tokens) == len(table.token_logprobs) == len(table.text_offset) == 18
        for token, offset in zip(table.tokens, table.text_offset, strict=True):
            assert choice.text[offset:].startswith(token)
        assert "".join(table.tokens) == choice.text
        assert all(3 <= len(top) <= 4 for top in table.top_logprobs[1:])
        rows = zip(table.tokens[1:], table.token_logprobs[1:], table.top_logprobs[1:], strict=True)
        assert all(top[token] == logprob for token, logprob, top in rows)
    told = create(server, prompt, logprobs=0).choices[0].logprobs
    assert told.token_logprobs == pytest.approx(table.token_logprobs[12:], abs=1e-4)
    assert told.tokens == table.tokens[12:] and told.top_logprobs[0].keys() <= {told.tokens[0]}
    assert told.text_offset == [offset - len(prompt) for offset in table.text_offset[12:]]


def test_an_agents_cache_is_used_and_left_as_everywhere_else(server):
    agent = {"extra_body": {"agent_id": "completions"}}
    prompt = word_ids(words(90, 5))
    first = create(server, prompt, **agent)
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    longer = [*prompt, *word_ids(first.choices[0].text), *word_ids(words(9, 6))]
    second = create(server, longer, **agent)
    assert second.usage.prompt_tokens_details.cached_tokens == 90 + 6 - 1
    scored_again = create(server, longer, echo=True, logprobs=1, **agent)
    assert scored_again.usage.prompt_tokens_details.cached_tokens == 0
    assert scored_again.choices[0].agentmem["cause"] == "scored"
    third = create(server, longer, **agent)
    assert third.usage.prompt_tokens_details.cached_tokens == len(longer) - 1
    assert third.choices[0].text == second.choices[0].text


def test_nothing_is_answered_where_no_token_may_be(server):
    body = {"prompt": words(30, 7), "max_tokens": 0, "agent_id": "prewarmed"}
    [choice] = post(server, **body)["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("", "length")
    made = post(server, **body | {"max_tokens": 1})
    assert made["usage"]["prompt_tokens_details"]["cached_tokens"] == 29


def test_log_probabilities_obey_the_chain_rule_over_token_ids(server):
    """log p(AB) = log p(A) + log p(B | A), where B is asked for token by token after A."""
    a, b = random_tokens(70, 8), random_tokens(40, 9)
    both = scored(server, [*a, *b])
    assert sum(both[1:70]) == pytest.approx(sum(scored(server, a)[1:]), abs=1e-3)
    after = 0.0
    for i, token in enumerate(b):
        given = [*a, *b[:i]]
        bias = {str(token): 100}
        body = {"prompt": given, "max_tokens": 1, "logprobs": 0, "logit_bias": bias}
        table = post(server, **body, agent_id="chain")["choices"][0]["logprobs"]
        after += table["token_logprobs"][0]
    assert sum(both[70:]) == pytest.approx(after, abs=1e-3)
    assert sum(both[1:]) == pytest.approx(sum(scored(server, a)[1:]) + after, abs=1e-3)


def lm_eval(server, contexts, continuations):
    """What lm-eval's local-completions sends for log-likelihoods, and makes of the answer."""
    inputs = [c + k for c, k in zip(contexts, continuations, strict=True)]
    body = {"model": "default", "prompt": inputs, "temperature": 0, "max_tokens": 1}
    outputs = post(server, **body, logprobs=1, seed=1234, echo=True)
    found = []
    choices = sorted(outputs["choices"], key=itemgetter("index"))
    for choice, ctxlen in zip(choices, map(len, contexts), strict=True):
        logprobs = choice["logprobs"]["token_logprobs"][ctxlen:-1]
        top = choice["logprobs"]["top_logprobs"][ctxlen:-1]
        is_greedy = all(tok == max(tops.values()) for tok, tops in zip(logprobs, top, strict=True))
        found.append((len(logprobs), sum(logprobs), is_greedy))
    return found


def test_lm_eval_is_told_the_likelihood_of_continuations(server):
    contexts = [random_tokens(n, n) for n in (5, 33, 80, 150)]
    wrong = [random_tokens(n, n + 1) for n in (1, 2, 9, 31)]
    likely = [
        word_ids(
            create(server, context, max_tokens=8, extra_body={"ignore_eos": True}).choices[0].text
        )
        for context in contexts
    ]
    for continuations, greedy in ((likely, True), (wrong, False)):
        found = lm_eval(server, contexts, continuations)
        for context, continuation, (n, total, is_greedy) in zip(
            contexts, continuations, found, strict=True
        ):
            assert (n, is_greedy) == (len(continuation), greedy)
            alone = scored(server, context + continuation)[len(context) :]
            assert total == pytest.approx(sum(alone), abs=1e-3)
    assert np.mean([t for _, t, _ in lm_eval(server, contexts, likely)]) > -100


def test_an_answer_ends_at_a_stop_string(server):
    text = create(server, words(20, 10), max_tokens=8, extra_body={"ignore_eos": True})
    stop = text.choices[0].text.split()[3]
    cut = create(server, words(20, 10), max_tokens=8, stop=stop)
    assert cut.choices[0].finish_reason == "stop" and stop not in cut.choices[0].text


@pytest.mark.parametrize(
    ("param", "body"),
    [
        ("suffix", {"suffix": "w9"}),
        ("n", {"n": 17}),
        ("n", {"n": 0}),
        ("best_of", {"best_of": 3}),
        ("best_of", {"best_of": 3, "n": 2}),
        ("prompt", {"prompt": ["w9"] * 129, "n": 16}),
        ("logprobs", {"logprobs": 6}),
        ("logprobs", {"logprobs": True}),
        ("max_tokens", {"max_tokens": -2}),
        ("prompt", {"prompt": []}),
        ("prompt", {"prompt": [[]]}),
        ("prompt", {"prompt": ""}),
        ("prompt", {"prompt": ["w9", [9]]}),
        ("prompt", {"prompt": [1.5]}),
        ("prompt", {"prompt": [True]}),
        ("prompt", {"prompt": None}),
        ("prompt", {"prompt": [9, 256]}),
        ("prompt", {"prompt": [-1]}),
        ("prompt", {"prompt": "\ud800"}),
        ("prompt", {"prompt": [9] * 2000}),
        ("agentmem.continue", {"agentmem": {"continue": True}}),
        ("model", {"model": "gpt-9"}),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_not_honoured_or_nonsense_is_refused_by_its_name(server, param, body, stream):
    asked = {"prompt": "w9", "stream": stream, **body}
    response = server.client.post(
        "/completions",
        content=json.dumps(asked).encode(),
        headers={"content-type": "application/json"},
    )
    assert refused(response)[2] == param
    assert response.status_code == (404 if param == "model" else 400)


def test_one_prompt_that_is_refused_refuses_them_all(server):
    response = server.client.post("/completions", json={"prompt": [[9, 10], [9, 999]]})
    assert refused(response)[2] == "prompt"
    with sdk(server) as client, pytest.raises(openai.BadRequestError) as e:
        client.completions.create(model="default", prompt="w9", suffix="w10")
    assert (e.value.param, e.value.code) == ("suffix", "unsupported_parameter")
    assert e.value.request_id


def test_a_client_that_goes_away_leaves_nothing_running(server):
    prompts = [random_tokens(20, n) for n in range(10)]
    body = {"prompt": prompts, "stream": True, "max_tokens": 900, "ignore_eos": True}
    with server.client.stream("POST", "/completions", json=body) as response:
        assert next(response.iter_lines()).startswith("data: ")
    deadline = time.monotonic() + 10
    health = server.url.removesuffix("/v1") + "/health"
    while (now := server.client.get(health).json())["running"] or now["waiting"]:
        assert time.monotonic() < deadline, now
        time.sleep(0.05)
