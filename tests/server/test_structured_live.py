"""Structured output and forced calls of a real model, by the SDKs: a tiny one of random weights.

It says whatever it may, so that what comes back is what the masks leave.
"""

import json
from contextlib import contextmanager
from typing import Literal

import anthropic
import openai
import pytest
from jsonschema import Draft202012Validator
from pydantic import BaseModel

from support.chat_http import FLAGS
from support.chat_tokenizers import LLAMA3, QWEN3, save_tokenizer
from support.server_process import ServerProcess
from support.tiny_model_dir import write_tiny_model

HELLO = [{"role": "user", "content": "hello"}]


class Stop(BaseModel):
    city: Literal["Paris", "Zürich"]
    nights: Literal[1, 2, 30]
    tags: list[Literal["a", "b"]] | None = None


class Trip(BaseModel):
    first: Stop
    last: Stop
    by: Literal["train", "boat"]


SCHEMA = Trip.model_json_schema()
TOOLS = [
    {"type": "function", "function": {"name": "book", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "none"}},
]


@contextmanager
def served(home, template):
    model = write_tiny_model(home / "model", max_context=4096)
    save_tokenizer(model, template)
    with ServerProcess(home / "home", *FLAGS, model=model) as server:
        yield server
        assert server.stop() == 0


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with served(tmp_path_factory.mktemp("structured"), QWEN3) as server:
        yield server


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=server.url, api_key="none", max_retries=0) as client:
        yield client


def complete(client, seed, **body):
    return client.chat.completions.create(
        model="default", messages=HELLO, seed=seed, max_tokens=700, **body
    ).choices[0]


def test_content_validates(client):
    form = {"type": "json_schema", "json_schema": {"name": "trip", "schema": SCHEMA}}
    num_whole = 0
    for seed in range(4):
        choice = complete(client, seed, response_format=form)
        if choice.finish_reason == "stop":
            num_whole += 1
            Draft202012Validator(SCHEMA).validate(json.loads(choice.message.content))
    assert num_whole >= 2


def test_forced_calls_validate(client):
    num_whole = 0
    for seed in range(8):
        named = {"type": "function", "function": {"name": "book"}}
        choice = complete(client, seed, tools=TOOLS, tool_choice=named)
        if choice.finish_reason == "tool_calls":
            num_whole += 1
            assert choice.message.content is None
            (call,) = choice.message.tool_calls
            Draft202012Validator(SCHEMA).validate(json.loads(call.function.arguments))
    assert num_whole >= 2


def test_a_forced_call_is_in_the_cache_when_it_comes_back(tmp_path):
    with (
        served(tmp_path, LLAMA3) as server,
        openai.OpenAI(base_url=server.url, api_key="none", max_retries=0) as client,
    ):
        more = {"tools": TOOLS, "extra_body": {"agent_id": "a"}}
        choice = complete(client, 0, tool_choice="required", **more)
        (call,) = choice.message.tool_calls
        history = [
            *HELLO,
            choice.message.model_dump(exclude_unset=True),
            {"role": "tool", "tool_call_id": call.id, "content": "ok"},
        ]
        again = client.chat.completions.create(
            model="default", messages=history, max_tokens=4, **more
        )
        cached = again.usage.prompt_tokens_details.cached_tokens
        assert again.usage.prompt_tokens - cached < 32  # the result, and the headers around it


def parsed(parse):
    """What comes of the first of some answers that are not cut."""
    for seed in range(20):
        if (found := parse(seed)) is not None:
            return found
    raise AssertionError("all were cut")


def test_openais_parse(client):
    def parse(seed):
        try:
            answer = client.chat.completions.parse(
                model="default", messages=HELLO, response_format=Trip, seed=seed, max_tokens=700
            )
        except openai.LengthFinishReasonError:
            return None
        return answer.choices[0].message.parsed

    assert isinstance(parsed(parse), Trip)


def test_openais_responses_parse(client):
    def parse(seed):
        answer = client.responses.parse(
            model="default", input=f"hello {seed}", text_format=Trip, max_output_tokens=700
        )
        return answer.output_parsed if answer.status == "completed" else None

    assert isinstance(parsed(parse), Trip)


def test_anthropics_parse_and_forced_tool(server):
    url = server.url.removesuffix("/v1")
    with anthropic.Anthropic(base_url=url, api_key="none", max_retries=0) as client:

        def parse(seed):
            asked = [{"role": "user", "content": f"hello {seed}"}]
            answer = client.messages.create(
                model="default",
                messages=asked,
                max_tokens=700,
                output_config={"format": {"type": "json_schema", "schema": SCHEMA}},
            )
            if answer.stop_reason != "end_turn":
                return None
            answer = client.messages.parse(
                model="default", messages=asked, max_tokens=700, output_format=Stop
            )
            return answer.parsed_output if answer.stop_reason == "end_turn" else None

        assert isinstance(parsed(parse), Stop)

        def call(seed):
            answer = client.messages.create(
                model="default",
                messages=[{"role": "user", "content": f"hello {seed}"}],
                max_tokens=700,
                tools=[{"name": "book", "input_schema": SCHEMA}],
                tool_choice={"type": "tool", "name": "book"},
            )
            if answer.stop_reason != "tool_use":
                return None
            return [block for block in answer.content if block.type == "tool_use"]

        (block,) = parsed(call)
        Trip.model_validate(block.input)


def test_answers_side_by_side_keep_to_their_own_forms(client):
    body = {"structured_outputs": {"choice": ["yes", "no"]}, "n": 4, "agent_id": "side"}
    answer = client.chat.completions.create(
        model="default", messages=HELLO, max_tokens=300, extra_body=body
    )
    for choice in answer.choices:
        if choice.finish_reason == "stop":
            assert choice.message.content in ("yes", "no")
    free = complete(client, 1)
    assert free.finish_reason in ("stop", "length")
