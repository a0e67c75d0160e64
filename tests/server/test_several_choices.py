"""`n` answers to one prompt, and what streams say of usage, through the openai SDK."""

import json
import time

import openai
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from support.chat_http import path, refused, text, transcript, user, words
from support.server_process import ServerProcess
from support.speaking_model import write_speaking_model

SAMPLED = {"max_tokens": 12, "temperature": 1.0, "seed": 5, "ignore_eos": True}


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=server.url, api_key="none", max_retries=0) as client:
        yield client


def chat(server, messages, **body):
    asked = {"messages": messages, **SAMPLED, **body}
    response = server.client.post("/chat/completions", json=asked)
    assert response.status_code == 200, response.text
    return response.json()


def chunks(server, route, **body):
    """The chunks of a stream, and that it ends as OpenAI's do."""
    response = server.client.post(route, json={**SAMPLED, "stream": True, **body})
    assert response.status_code == 200, response.text
    *lines, done = response.text.strip().split("\n\n")
    assert done == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines if line[0] != ":"]


def counted(server, name):
    """The sum of an engine's counter, over its labels."""
    metrics = server.client.get(server.url.removesuffix("/v1") + "/metrics").text
    lines = [line.split() for line in metrics.splitlines() if line.startswith(name + "_total")]
    return sum(float(line[-1]) for line in lines)


def test_n_answers_are_prefilled_once_and_each_is_what_its_seed_gives_alone(server):
    messages = [user(150, 1)]
    before = counted(server, "agentmem_prefilled_tokens")
    told = chat(server, messages, n=4, agent_id="four")
    prompt_tokens = told["usage"]["prompt_tokens"]
    assert counted(server, "agentmem_prefilled_tokens") - before == prompt_tokens - 1
    assert [choice["index"] for choice in told["choices"]] == [0, 1, 2, 3]
    assert [choice["finish_reason"] for choice in told["choices"]] == ["length"] * 4
    said = [choice["message"]["content"] for choice in told["choices"]]
    assert len(set(said)) == 4
    assert told["usage"]["completion_tokens"] == 4 * 12
    assert told["usage"]["total_tokens"] == prompt_tokens + 4 * 12
    details = {"cached_tokens": 0, "cache_write_tokens": prompt_tokens}
    assert told["usage"]["prompt_tokens_details"] == details
    for i, one in enumerate(said):
        assert text(chat(server, messages, agent_id=f"alone {i}", seed=5 + i)) == one
    assert text(chat(server, messages, agent_id="one", n=1)) == said[0]
    ChatCompletion.model_validate(told)


def test_greedy_answers_are_all_that_of_one(server):
    messages = [user(40, 2)]
    one = text(chat(server, messages, temperature=0))
    told = chat(server, messages, temperature=0, n=3)
    assert [choice["message"]["content"] for choice in told["choices"]] == [one] * 3


def test_a_stream_tells_the_choices_apart_and_adds_up_to_them(server, client):
    messages = [user(60, 3)]
    whole = chat(server, messages, n=3, agent_id="whole")
    asked = {"messages": messages, "n": 3, "agent_id": "streamed"}
    told = chunks(server, "/chat/completions", stream_options={"include_usage": True}, **asked)
    for chunk in told:
        ChatCompletionChunk.model_validate(chunk)
    *told, last = told
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"] == 36
    assert last["usage"]["prompt_tokens"] == whole["usage"]["prompt_tokens"]
    assert all(chunk["usage"] is None for chunk in told)
    said = [""] * 3
    reasons = {}
    for chunk in told:
        [choice] = chunk["choices"]
        said[choice["index"]] += choice["delta"].get("content", "")
        if choice["finish_reason"]:
            reasons[choice["index"]] = choice["finish_reason"]
    assert said == [choice["message"]["content"] for choice in whole["choices"]]
    assert reasons == dict.fromkeys(range(3), "length")
    assert sum("agentmem" in chunk for chunk in told) == 1
    turns = [chunk["choices"][0]["index"] for chunk in told]
    assert turns != sorted(turns), "one after the other"
    made = client.chat.completions.create(
        model="default", messages=messages, n=2, max_tokens=3, stream=True
    )
    assert {chunk.choices[0].index for chunk in made} == {0, 1}


def test_the_first_answer_is_the_agents_turn_and_the_others_can_be_gone_on_from(server):
    question = [user(70, 4)]
    told = chat(server, question, n=3, agent_id="tree")
    said = [choice["message"]["content"] for choice in told["choices"]]
    kept = transcript(server, "tree")
    assert kept["turn"] == told["agentmem"]["turn"]
    assert [message["content"] for message in kept["messages"]][-1] == said[0]
    used = told["usage"]["prompt_tokens"]
    history = [*question, {"role": "assistant", "content": said[2]}, user(9, 5)]
    second = chat(server, history, agent_id="tree")
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] >= used + 12 - 1
    shown = server.client.get(path("tree")).json()
    assert 1 < len(shown["branches"]) <= 4


@pytest.mark.parametrize("stream", [False, True])
def test_completions_have_n_choices_for_each_prompt(server, stream):
    prompts = [words(20, 6), words(30, 7)]
    alone = []
    for i, prompt in enumerate(prompts):
        for j in range(3):
            body = {"prompt": prompt, **SAMPLED, "seed": 5 + j, "agent_id": f"c{i}{j}"}
            alone.append(server.client.post("/completions", json=body).json()["choices"][0]["text"])
    asked = {"prompt": prompts, "n": 3, "best_of": 3, "echo": True, "agent_id": "completed"}
    wanted = [prompts[i // 3] + answer for i, answer in enumerate(alone)]
    if stream:
        said = [""] * 6
        for chunk in chunks(server, "/completions", **asked):
            said[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
        assert said == wanted
        return
    told = server.client.post("/completions", json={**SAMPLED, **asked}).json()
    assert [choice["text"] for choice in told["choices"]] == wanted
    assert [choice["index"] for choice in told["choices"]] == list(range(6))
    assert told["usage"]["prompt_tokens"] == 50 and told["usage"]["completion_tokens"] == 6 * 12
    Completion.model_validate(told)


def test_each_choice_has_the_log_probabilities_of_the_prompt_that_it_echoes(server):
    asked = {"prompt": words(20, 8), "n": 2, "echo": True, "logprobs": 1}
    told = server.client.post("/completions", json={**SAMPLED, **asked}).json()
    tables = [choice["logprobs"] for choice in told["choices"]]
    assert [len(table["tokens"]) for table in tables] == [32, 32]
    assert tables[0]["token_logprobs"][:20] == tables[1]["token_logprobs"][:20]
    assert tables[0]["token_logprobs"][20:] != tables[1]["token_logprobs"][20:]


@pytest.mark.parametrize("route", ["/chat/completions", "/completions"])
def test_every_chunk_carries_the_usage_so_far_where_it_is_asked_for(server, route):
    prompt = {"messages": [user(30, 9)]} if route.startswith("/chat") else {"prompt": words(30, 9)}
    options = {"include_usage": True, "continuous_usage_stats": True}
    told = chunks(server, route, n=2, stream_options=options, **prompt)
    *told, last = told
    counts = [chunk["usage"]["completion_tokens"] for chunk in told]
    assert counts == sorted(counts) and counts[-1] == last["usage"]["completion_tokens"] == 24
    assert {chunk["usage"]["prompt_tokens"] for chunk in told} == {last["usage"]["prompt_tokens"]}
    assert all(
        chunk["usage"]["total_tokens"]
        == chunk["usage"]["prompt_tokens"] + chunk["usage"]["completion_tokens"]
        for chunk in told
    )


def test_options_of_a_stream_pass_where_there_is_none(server):
    options = {"include_usage": True, "continuous_usage_stats": True}
    assert chat(server, [user(9, 1)], stream_options=options)["usage"]["completion_tokens"] == 12


def test_the_smaller_of_two_limits_counts(server):
    told = chat(server, [user(9, 1)], max_tokens=5, max_completion_tokens=3)
    assert told["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize("n", [0, 17, "two", 1.5])
def test_a_number_of_answers_that_is_none_is_refused_by_its_name(server, n):
    body = {"messages": [user(9, 1)], "n": n}
    status, _, param, _ = refused(server.client.post("/chat/completions", json=body))
    assert (status, param) == (400, "n")


@pytest.fixture(scope="module")
def bytewise(tmp_path_factory):
    """A server whose model reads and writes bytes, and calls tools as Qwen 3 does."""
    home = tmp_path_factory.mktemp("bytewise")
    model = write_speaking_model(home / "model", ("Oslo", " is", " far"))
    with ServerProcess(home / "home", model=model) as server:
        yield server
        assert server.stop() == 0


@pytest.mark.parametrize("stream", [False, True])
def test_each_answer_is_held_to_the_form_by_itself(bytewise, stream):
    colours = {"enum": ["red", "green", "blue", "grey"]}
    schema = {
        "type": "object",
        "properties": {"colours": {"type": "array", "items": colours, "maxItems": 4}},
        "required": ["colours"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "c", "schema": schema, "strict": True}}
    body = {"messages": [{"role": "user", "content": "Hi"}], "n": 6, "response_format": form}
    body |= {"logprobs": True, "max_tokens": 500, "ignore_eos": False, "temperature": 2}
    body |= {"chat_template_kwargs": {"enable_thinking": False}}
    said = [""] * 6
    spelled = [b""] * 6
    if stream:
        pieces = [chunk["choices"][0] for chunk in chunks(bytewise, "/chat/completions", **body)]
    else:
        pieces = chat(bytewise, **body)["choices"]
    for piece in pieces:
        message = piece.get("message") or piece["delta"]
        said[piece["index"]] += message.get("content") or ""
        for row in (piece["logprobs"] or {"content": []})["content"]:
            spelled[piece["index"]] += bytes(row["bytes"])
    for one in map(json.loads, said):
        assert set(one["colours"]) <= set(colours["enum"])
    assert len(set(said)) > 1 and [one.decode() for one in spelled] == said


def test_each_answer_makes_the_call_that_is_forced(bytewise):
    tool = {"name": "f", "parameters": {"type": "object", "properties": {"a": {"enum": [1, 2]}}}}
    body = {"messages": [{"role": "user", "content": "Hi"}], "n": 3, "max_tokens": 300}
    body |= {"tools": [{"type": "function", "function": tool}], "tool_choice": "required"}
    told = chat(bytewise, **body, ignore_eos=False, logprobs=True)
    for choice in told["choices"]:
        assert choice["finish_reason"] == "tool_calls" and choice["logprobs"]["content"] == []
        assert {call["function"]["name"] for call in choice["message"]["tool_calls"]} == {"f"}
    calls = [call["id"] for choice in told["choices"] for call in choice["message"]["tool_calls"]]
    assert len(set(calls)) == len(calls)
    parts = [
        choice["delta"]["tool_calls"][0]
        for chunk in chunks(bytewise, "/chat/completions", **body, parallel_tool_calls=False)
        for choice in chunk["choices"]
        if choice["delta"].get("tool_calls")
    ]
    assert {part["index"] for part in parts} == {0} and len(parts) == 2 * 3


@pytest.mark.parametrize("route", ["/chat/completions", "/completions"])
def test_a_client_that_goes_away_ends_all_its_answers(server, route):
    prompt = {"messages": [user(30, 9)]} if route.startswith("/chat") else {"prompt": words(30, 9)}
    body = {**prompt, "n": 12, "stream": True, "max_tokens": 900, "ignore_eos": True}
    with server.client.stream("POST", route, json=body) as response:
        assert next(response.iter_lines()).startswith("data: ")
    deadline = time.monotonic() + 10
    health = server.url.removesuffix("/v1") + "/health"
    while (now := server.client.get(health).json())["running"] or now["waiting"]:
        assert time.monotonic() < deadline, now
        time.sleep(0.05)
