"""Tools and reasoning over HTTP, as the openai SDK sends and reads them."""

import asyncio
import json

import httpx
import openai
import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tool_parsers import glm47
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from agentmem.config import Settings
from agentmem.engine.api import Finished
from agentmem.server import sse
from agentmem.server.app import create_app
from support.chat_tokenizers import LLAMA3, QWEN3, QWEN3_THINKING, chat_tokenizer, save_tokenizer
from support.fake_engine import FakeEngine
from support.server_process import ServerProcess
from support.tiny import VOCAB
from support.tiny_model_dir import write_tiny_model

HELLO = [{"role": "user", "content": "Weather in Paris?"}]
TOOL = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}},
}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich"}}\n</tool_call>'
ARGUMENTS = '{"city": "Zürich"}'


class Engine(FakeEngine):
    """Says `text`, in pieces of `size`, and ends for `reason`."""

    text, size, reason, stop_string, max_context = "", 7, "stop", None, 10_000

    async def generate(self, request):
        self.words = [self.text[i : i + self.size] for i in range(0, len(self.text), self.size)]
        async for event in super().generate(request):
            yield (
                Finished(self.reason, event.stats, self.stop_string)
                if isinstance(event, Finished)
                else event
            )

    def prompt(self):
        return self.tokenizer.decode(self.requests[-1].tokens)


@pytest.fixture
def engine():
    return Engine(tokenizer=chat_tokenizer(QWEN3))


@pytest.fixture
def settings(tmp_path):
    return Settings(home=tmp_path)


@pytest.fixture
def sdk(engine, settings):
    """Runs what is given an SDK client of the app."""

    def run(work):
        async def one():
            transport = httpx.ASGITransport(
                create_app(engine, settings, None), raise_app_exceptions=False
            )
            http = httpx.AsyncClient(transport=transport)
            async with openai.AsyncOpenAI(
                base_url="http://localhost/v1", api_key="none", max_retries=0, http_client=http
            ) as client:
                return await work(client.chat.completions)

        return asyncio.run(one())

    return run


@pytest.fixture
def ask(sdk):
    """An answer, validated against the SDK's own types."""

    def ask(**body):
        answer = sdk(lambda chat: chat.create(model="tiny", **{"messages": HELLO, **body}))
        return ChatCompletion.model_validate(answer.model_dump(exclude_unset=True), strict=True)

    return ask


@pytest.fixture
def stream(sdk):
    """The chunks of an answer."""

    def stream(**body):
        async def chunks(chat):
            answer = await chat.create(model="tiny", stream=True, **{"messages": HELLO, **body})
            return [
                ChatCompletionChunk.model_validate(c.model_dump(exclude_unset=True))
                async for c in answer
            ]

        return sdk(chunks)

    return stream


def deltas(chunks):
    return [c.choices[0].delta.model_dump(exclude_unset=True) for c in chunks if c.choices]


def test_tool_calls_are_read_by_the_sdk_and_may_be_sent_back(engine, ask):
    engine.text = f"I look.\n{CALL}\n{CALL}"
    answer = ask(tools=[TOOL], tool_choice="auto").choices[0]
    assert (answer.finish_reason, answer.message.content) == ("tool_calls", "I look.")
    assert [(c.function.name, c.function.arguments) for c in answer.message.tool_calls] == [
        ("weather", ARGUMENTS)
    ] * 2
    results = [
        {"role": "tool", "tool_call_id": c.id, "content": "rain"} for c in answer.message.tool_calls
    ]
    first, engine.text = engine.prompt(), "It rains."
    again = ask(
        tools=[TOOL], messages=[*HELLO, answer.message.model_dump(exclude_unset=True), *results]
    )
    assert again.choices[0].message.content == "It rains."
    nothing_again = f"{first}I look.\n{CALL}\n{CALL}<|im_end|>"
    assert engine.prompt().startswith(nothing_again)


def test_call_without_a_word_has_null_content(engine, ask):
    engine.text = CALL
    message = ask(tools=[TOOL]).choices[0].message
    assert message.content is None and len(message.tool_calls) == 1
    ask(
        tools=[TOOL],
        messages=[
            *HELLO,
            message.model_dump(),
            {"role": "tool", "tool_call_id": "x", "content": "1"},
        ],
    )


def test_streamed_calls_come_as_name_then_arguments(engine, stream):
    engine.text = f"I look.\n{CALL}\n{CALL}"
    chunks = stream(tools=[TOOL], stream_options={"include_usage": True})
    role, *said, finish = deltas(chunks)
    assert (role, finish, chunks[-2].choices[0].finish_reason) == (
        {"role": "assistant", "content": ""},
        {},
        "tool_calls",
    )
    texts = [d["content"] for d in said if "content" in d]
    calls = [d["tool_calls"] for d in said if "content" not in d]
    assert "".join(texts) == "I look."
    for i, ((head,), (rest,)) in enumerate([calls[:2], calls[2:]]):
        assert (head["index"], head["type"], bool(head["id"])) == (i, "function", True)
        assert head["function"] == {"name": "weather", "arguments": ""}
        assert rest == {"index": i, "function": {"arguments": ARGUMENTS}}
    assert len({calls[0][0]["id"], calls[2][0]["id"]}) == 2


def test_sdks_own_accumulator_puts_a_stream_together(engine, sdk):
    engine.text = f"<think>\nhm\n</think>\n\nI look.\n{CALL}"

    async def final(chat):
        async with chat.stream(model="tiny", messages=HELLO, tools=[TOOL]) as events:
            async for _ in events:
                pass
            return await events.get_final_completion()

    choice = sdk(final).choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "I look.")
    assert choice.message.tool_calls[0].function.arguments == ARGUMENTS


def test_markup_that_is_no_call_is_given_back_as_text(engine, ask, stream):
    engine.text = "<tool_call>\nweather(Paris)\n</tool_call>"
    answer = ask(tools=[TOOL]).choices[0]
    assert (answer.finish_reason, answer.message.content, answer.message.tool_calls) == (
        "stop",
        engine.text,
        None,
    )
    assert "".join(d.get("content", "") for d in deltas(stream(tools=[TOOL]))) == engine.text
    engine.text, engine.reason = CALL[:-15], "length"
    answer = ask(tools=[TOOL]).choices[0]
    assert (answer.finish_reason, answer.message.content) == ("length", engine.text)


@pytest.mark.parametrize("cut", [{"reason": "length"}, {"stop_string": "\n\n"}])
def test_half_a_call_is_no_call_whatever_cut_it(engine, ask, stream, cut):
    """GLM's parser makes a call of half a one, without the arguments that are missing."""
    plain, marks = chat_tokenizer(QWEN3)._tokenizer, (glm47.tool_call_start, glm47.tool_call_end)
    engine.tokenizer = TokenizerWrapper(
        plain, tool_parser=glm47.parse_tool_call, tool_call_start=marks[0], tool_call_end=marks[1]
    )
    engine.text = "<tool_call>weather<arg_key>city"
    vars(engine).update(cut)
    (choice,) = ask(tools=[TOOL]).choices
    assert (choice.message.tool_calls, choice.message.content) == (None, engine.text)
    assert choice.finish_reason == engine.reason
    assert "".join(d.get("content") or "" for d in deltas(stream(tools=[TOOL]))) == engine.text
    engine.reason, engine.stop_string = "stop", None
    assert ask(tools=[TOOL]).choices[0].message.tool_calls[0].function.name == "weather"


def test_tools_that_may_not_be_called_stay_in_the_prompt_and_calls_are_text(engine, ask):
    engine.text = CALL
    assert ask(tools=[TOOL], tool_choice="none").choices[0].message.content == CALL
    prompt = engine.prompt()
    ask(tools=[TOOL])
    assert prompt == engine.prompt()


def test_without_tools_their_markup_is_text(engine, ask):
    engine.text = CALL
    for tools in ([], [{"type": "web_search"}, {"type": "custom", "custom": {"name": "x"}}]):
        assert ask(tools=tools).choices[0].message.content == CALL
        assert "<tools>" not in engine.prompt()


def test_one_call_at_most_where_parallel_calls_are_not_wanted(engine, ask, stream):
    engine.text = f"{CALL}\n{CALL}"
    assert len(ask(tools=[TOOL], parallel_tool_calls=False).choices[0].message.tool_calls) == 1
    assert (
        len(
            [
                d
                for d in deltas(stream(tools=[TOOL], parallel_tool_calls=False))
                if "tool_calls" in d
            ]
        )
        == 2
    )


@pytest.mark.parametrize("choice", ["weather", {"type": "file_search"}, [], 7])
def test_choices_that_say_nothing_known_are_refused(engine, ask, choice):
    with pytest.raises(openai.BadRequestError) as e:
        ask(tools=[TOOL], tool_choice=choice)
    assert (e.value.param, e.value.code) == ("tool_choice", "unsupported_parameter")
    assert engine.requests == []


def test_model_whose_calls_cannot_be_read_still_gets_the_tools(engine, ask):
    engine.tokenizer, engine.text = chat_tokenizer(LLAMA3), "weather(Paris)"
    assert ask(tools=[TOOL]).choices[0].message.content == engine.text
    assert '"weather"' in engine.prompt()


def test_reasoning_is_apart_from_content(engine, ask, stream):
    engine.text = "<think>\nhm, \nso\n</think>\n\nParis."
    message = ask().choices[0].message
    assert (message.content, message.reasoning_content, hasattr(message, "reasoning")) == (
        "Paris.",
        "hm, \nso",
        False,
    )
    said = deltas(stream())
    assert "".join(d.get("reasoning_content", "") for d in said) == "hm, \nso"
    assert "".join(d.get("content", "") for d in said) == "Paris."


def test_reasoning_goes_by_both_names_where_the_setting_says_so(engine, settings, ask, stream):
    engine.text, settings.reasoning_alias = "<think>hm</think>Paris.", True
    message = ask().choices[0].message
    assert message.reasoning == message.reasoning_content == "hm"
    assert "".join(d.get("reasoning", "") for d in deltas(stream())) == "hm"


def test_answer_begins_within_the_reasoning_where_the_template_opens_it(engine, ask):
    engine.tokenizer, engine.text = chat_tokenizer(QWEN3_THINKING), "hm\n</think>\n\nParis."
    message = ask().choices[0].message
    assert (message.reasoning_content, message.content) == ("hm", "Paris.")
    engine.tokenizer = chat_tokenizer(QWEN3)
    assert ask().choices[0].message.content == engine.text
    user = [{"role": "user", "content": "What is <think>"}]
    assert ask(messages=user).choices[0].message.content == engine.text
    # its template closes what it opens
    kwargs = {"chat_template_kwargs": {"enable_thinking": False}}
    assert ask(extra_body=kwargs).choices[0].message.content == engine.text


def test_prewarm_with_tools_fills_the_cache_for_the_request_that_follows(engine, settings, ask):
    transport = httpx.ASGITransport(create_app(engine, settings, None))
    body = {"messages": HELLO, "tools": [TOOL], "chat_template_kwargs": {"enable_thinking": False}}

    async def prewarm():
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.post("/v1/agents/alice/prewarm", json=body)

    assert asyncio.run(prewarm()).status_code == 200
    ask(tools=[TOOL], extra_body={"chat_template_kwargs": {"enable_thinking": False}})
    first, second = engine.requests
    assert first.tokens == second.tokens and "weather" in engine.prompt()


def test_agent_is_who_the_client_says_it_is_in_its_own_way(engine, ask):
    assert ask(user="u").agentmem["agent_id"] == "u"
    assert ask(user="u", extra_headers={"X-Session-Id": "s"}).agentmem["agent_id"] == "s"
    assert ask(prompt_cache_key="k", metadata={"agent_id": "m"}).agentmem["agent_id"] == "k"
    assert ask(metadata={"agent_id": ""}, user="u").agentmem["agent_id"] == "u"
    hashed = ask(metadata={"agent_id": "x" * 300}, user="u").agentmem["agent_id"]
    assert hashed.startswith("sha256-")


def test_long_tool_call_is_accompanied_by_pings(engine, settings, monkeypatch):
    monkeypatch.setattr(sse, "PING_INTERVAL", 0.05)
    engine.text, engine.delay = CALL, 0.02
    transport = httpx.ASGITransport(create_app(engine, settings, None))

    async def raw():
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            body = {"messages": HELLO, "tools": [TOOL], "stream": True}
            return (await client.post("/v1/chat/completions", json=body)).text

    text = asyncio.run(raw())
    assert text.count(": ping\n\n") >= 2
    assert (
        json.loads(text.split("data: ")[2])["choices"][0]["delta"]["tool_calls"][0]["function"][
            "name"
        ]
        == "weather"
    )


def test_a_served_model_answers_tools_within_the_reasoning_that_its_template_opens(tmp_path):
    model = write_tiny_model(tmp_path / "tiny", max_context=1024)
    save_tokenizer(model, QWEN3_THINKING)
    tokenizer = chat_tokenizer(QWEN3_THINKING)
    assert len(tokenizer) <= VOCAB
    always_a = {str(tokenizer.convert_tokens_to_ids("a")): 100}
    with ServerProcess(tmp_path / "home", "--reasoning-alias", model=model) as server:
        body = {
            "messages": HELLO,
            "tools": [TOOL],
            "max_tokens": 4,
            "logit_bias": always_a,
            "user": "u",
        }
        answer = server.client.post("/chat/completions", json=body).json()
        assert server.stop() == 0
    message = answer["choices"][0]["message"]
    assert (message["content"], message["reasoning"], message["reasoning_content"]) == (
        "",
        "aaaa",
        "aaaa",
    )
    assert answer["agentmem"]["agent_id"] == "u"
