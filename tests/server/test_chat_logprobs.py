"""Log probabilities of chat completions: they line up with the content, byte for byte."""

import asyncio
import json

import httpx
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response, ResponseTextDeltaEvent, ResponseTextDoneEvent

from agentmem.config import Settings
from agentmem.engine.api import Finished, RequestStats, TextDelta, TokenLogprob
from agentmem.engine.output import OutputStream
from agentmem.server.app import create_app
from support.chat.texts import LOOK_ALIKES, UNICODE
from support.chat_http import refused, user
from support.chat_tokenizers import HARMONY, QWEN3, QWEN3_THINKING, chat_tokenizer
from support.fake_engine import FakeEngine

HI = [{"role": "user", "content": "Hi"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
F = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
OUTPUT = "message.output_text.logprobs"
FOX = "Zürich: 🦊 👩‍👩‍👧‍👦, e\u0301"


class TokenEngine(FakeEngine):
    """Answers the tokens of a text, and the one that ends it."""

    def __init__(self, template, text, **options):
        super().__init__(tokenizer=chat_tokenizer(template), max_context=4096, **options)
        tokens = self.tokenizer.encode(text, add_special_tokens=False)
        self.said = [*tokens, self.tokenizer.eos_token_id]

    async def generate(self, request):
        params = request.params
        output = OutputStream(self.tokenizer, stop=params.stop, ignore_eos=True)
        for count, token in enumerate(self.said, start=1):
            is_last = count == len(self.said)
            text, stopped = (output.finish(), True) if is_last else output.feed(token)
            top = [(token, -0.25 * count), (other(token), float("-inf"))][: params.logprobs or 0]
            told = (
                () if params.logprobs is None else (TokenLogprob(token, top_of(top), tuple(top)),)
            )
            yield TextDelta(text, told, num_tokens=count)
            await asyncio.sleep(0)
            if stopped:
                break
        stats = RequestStats(len(request.tokens), count, 0, "cold", 0, 0.0, 0.0, 0.0, 0.0)
        yield Finished("stop", stats, output.stop_string)


def other(token):
    return (token + 1) % 200


def top_of(top):
    return top[0][1] if top else -0.5


def ask(engine, tmp_path, route="/v1/chat/completions", **body):
    async def one():
        app = create_app(engine, Settings(home=tmp_path), None)
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            asked = {"messages": HI, "logprobs": True} if route.startswith("/v1/chat") else {}
            response = await client.post(route, json={**asked, **body})
            assert response.status_code == 200, response.text
            return response

    return asyncio.run(one())


def whole(engine, tmp_path, **body):
    told = ask(engine, tmp_path, **body).json()
    ChatCompletion.model_validate(told)
    [choice] = told["choices"]
    assert choice["logprobs"]["refusal"] is None
    return choice["message"], choice["logprobs"]["content"], told["usage"]


def streamed(engine, tmp_path, **body):
    """The content, and the rows of all chunks, each of which came with a piece of content."""
    lines = ask(engine, tmp_path, stream=True, **body).text.strip().split("\n\n")[:-1]
    content, rows = "", []
    for line in lines:
        chunk = json.loads(line.removeprefix("data: "))
        ChatCompletionChunk.model_validate(chunk)
        [choice] = chunk["choices"]
        piece = choice["delta"].get("content") or ""
        assert bool(piece) == (choice["logprobs"] is not None)
        content += piece
        if choice["logprobs"]:
            rows += choice["logprobs"]["content"]
    return content, rows


def begins_with_reasoning(said):
    return said.startswith(("<think>", "<|channel|>analysis"))


def text_of(rows):
    return b"".join(bytes(row["bytes"]) for row in rows).decode()


@pytest.mark.parametrize(
    ("template", "said", "content"),
    [
        (QWEN3, "Hello, world", None),
        (QWEN3, FOX, None),
        (QWEN3, f"<think>\nHello {FOX}\n</think>\n\nHello {FOX}", f"Hello {FOX}"),
        (QWEN3, "<think>\n\n</think>\n\nHello", "Hello"),
        (QWEN3_THINKING, f"the\n</think>\n\nthe {FOX}", f"the {FOX}"),
        (QWEN3, f"Let me see: {FOX}\n{F}\n{F}", f"Let me see: {FOX}"),
        (QWEN3, f"{F} Done.", " Done."),
        (QWEN3, "See <tool_call>nope</tool_call> end", None),
        (QWEN3, f"<tool_call>{F}", "<tool_call>"),
        (
            HARMONY,
            f"<|channel|>analysis<|message|>{FOX}<|end|><|start|>assistant<|channel|>final"
            f"<|message|>the {FOX}",
            f"the {FOX}",
        ),
        *((QWEN3, answer, None) for _, answer in UNICODE),
        *((QWEN3, text, None) for text in LOOK_ALIKES),
    ],
)
def test_rows_are_of_the_contents_bytes_and_no_others(tmp_path, template, said, content):
    engine = TokenEngine(template, said)
    body = {"tools": [TOOL], "top_logprobs": 1}
    message, rows, usage = whole(engine, tmp_path, **body)
    assert message["content"] == (said if content is None else content)
    assert text_of(rows) == message["content"]
    assert streamed(engine, tmp_path, **body) == (message["content"], rows)
    for row in rows:
        [likeliest] = row.pop("top_logprobs")
        assert likeliest == row
    reasoning = usage["completion_tokens_details"]["reasoning_tokens"]
    assert (reasoning > 0) == (template == QWEN3_THINKING or begins_with_reasoning(said))
    assert reasoning <= usage["completion_tokens"] - len(rows)


def test_reasoning_is_counted_with_its_marks(tmp_path):
    for template, said in ((QWEN3, "<think>abc</think>xy"), (QWEN3_THINKING, "abc</think>xy")):
        _, _, usage = whole(TokenEngine(template, said), tmp_path)
        counted = usage["completion_tokens_details"]["reasoning_tokens"]
        assert counted == len("abc") + (2 if template == QWEN3 else 1)


def test_a_token_that_is_a_part_of_a_character_has_its_bytes(tmp_path):
    _, rows, _ = whole(TokenEngine(QWEN3, "é!"), tmp_path)
    assert [(row["token"], row["bytes"]) for row in rows] == [
        ("bytes:\\xc3", [0xC3]),
        ("bytes:\\xa9", [0xA9]),
        ("!", [ord("!")]),
    ]
    assert [row["top_logprobs"] for row in rows] == [[]] * 3


def test_the_likeliest_are_told_in_order_and_none_is_less_than_json_can_say(tmp_path):
    _, rows, _ = whole(TokenEngine(QWEN3, "ab"), tmp_path, top_logprobs=2)
    assert [[top["logprob"] for top in row["top_logprobs"]] for row in rows] == [
        [-0.25, -9999.0],
        [-0.5, -9999.0],
    ]


@pytest.mark.parametrize("stop", ["two", " t", "o th"])
def test_what_a_stop_string_cuts_off_has_no_rows(tmp_path, stop):
    message, rows, _ = whole(TokenEngine(QWEN3, "one two three"), tmp_path, stop=stop)
    assert message["content"] == "one two three".partition(stop)[0] == text_of(rows)


def test_a_blank_that_the_text_drops_belongs_to_the_first_token(tmp_path):
    message, rows, _ = whole(TokenEngine(QWEN3, " Hi"), tmp_path)
    assert message["content"] == "Hi" == text_of(rows)  # a token of its own: it has no text


def test_calls_alone_have_no_rows_and_nothing_is_told_unasked(tmp_path):
    engine = TokenEngine(QWEN3, F)
    message, rows, _ = whole(engine, tmp_path, tools=[TOOL])
    assert message["content"] is None and message["tool_calls"] and rows == []
    [choice] = ask(engine, tmp_path, tools=[TOOL], logprobs=False).json()["choices"]
    assert choice["logprobs"] is None


@pytest.mark.parametrize("asked", [{"include": [OUTPUT]}, {"include": [OUTPUT], "top_logprobs": 2}])
def test_responses_tell_them_of_their_text(tmp_path, asked):
    engine = TokenEngine(QWEN3, f"<think>\nthe\n</think>\n\nthe {FOX}\n{F}")
    body = {"input": "Hi", "tools": [{"type": "function", "name": "f", "parameters": {}}], **asked}
    told = ask(engine, tmp_path, "/v1/responses", **body).json()
    Response.model_validate(told)
    [text] = [part for item in told["output"] for part in item.get("content", [])][1:]
    rows = text["logprobs"]
    assert text["text"] == f"the {FOX}" == text_of(rows)
    assert {len(row["top_logprobs"]) for row in rows} == {asked.get("top_logprobs", 0)}
    stream = ask(engine, tmp_path, "/v1/responses", stream=True, **body).text
    events = [json.loads(event.split("data: ")[1]) for event in stream.strip().split("\n\n")]
    deltas = [event for event in events if event["type"] == "response.output_text.delta"]
    assert [row for event in deltas for row in event["logprobs"]] == rows
    [done] = [event for event in events if event["type"] == "response.output_text.done"]
    assert done["logprobs"] == rows
    ResponseTextDoneEvent.model_validate(done)
    for event in deltas:
        ResponseTextDeltaEvent.model_validate(event)
    unasked = ask(engine, tmp_path, "/v1/responses", input="Hi").json()
    parts = [part for item in unasked["output"] for part in item.get("content", [])]
    assert all(not part.get("logprobs") for part in parts)


@pytest.mark.parametrize("stream", [False, True])
def test_every_token_of_a_plain_answer_has_a_row(server, stream):
    """A tokenizer of words, whose texts depend on what stands before them."""
    body = {
        "messages": [user(20, 1)],
        "logprobs": True,
        "top_logprobs": 20,
        "max_tokens": 9,
        "temperature": 0,
        "ignore_eos": True,
        "n": 2,
        "stream": stream,
    }
    response = server.client.post("/chat/completions", json=body)
    assert response.status_code == 200, response.text
    told = [("", []), ("", [])]
    if stream:
        for line in response.text.strip().split("\n\n")[:-1]:
            [choice] = json.loads(line.removeprefix("data: "))["choices"]
            content, rows = told[choice["index"]]
            content += choice["delta"].get("content") or ""
            rows = rows + (choice["logprobs"] or {"content": []})["content"]
            told[choice["index"]] = content, rows
    else:
        for choice in response.json()["choices"]:
            said = choice["message"]["content"]
            told[choice["index"]] = said, choice["logprobs"]["content"]
    for content, rows in told:
        assert text_of(rows) == content and len(rows) == 9
        for row in rows:
            first, *others = row["top_logprobs"]
            assert len(others) == 19 and first["token"] == row["token"]
            assert first["logprob"] == row["logprob"] < 0  # greedy
            told_of = [top["logprob"] for top in row["top_logprobs"]]
            assert told_of == sorted(told_of, reverse=True)
    assert told[0] == told[1]


@pytest.mark.parametrize(
    ("param", "body"),
    [
        ("top_logprobs", {"top_logprobs": 3}),
        ("top_logprobs", {"logprobs": False, "top_logprobs": 1}),
        ("top_logprobs", {"logprobs": True, "top_logprobs": 21}),
        ("top_logprobs", {"logprobs": True, "top_logprobs": -1}),
        ("logprobs", {"logprobs": 5}),
    ],
)
def test_what_is_nonsense_is_refused_by_its_name(server, param, body):
    response = server.client.post("/chat/completions", json={"messages": HI, **body})
    assert refused(response)[::2] == (400, param)
