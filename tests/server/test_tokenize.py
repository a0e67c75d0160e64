"""/tokenize and /detokenize, as vLLM has them, and chats whose last message is gone on with."""

import pytest

from support.chat_http import KEYS, refused, user, words, write_keys
from support.server_process import ServerProcess
from support.speaking_model import write_speaking_model
from support.tiny import word_ids

PIECES = ("Oslo", " is", " the", " capital")
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


@pytest.fixture(scope="module")
def spoken(tmp_path_factory):
    """A server whose model reads bytes, knows tools and says PIECES."""
    home = tmp_path_factory.mktemp("spoken")
    model = write_speaking_model(home / "model", PIECES)
    with ServerProcess(home / "home", model=model) as server:
        yield server
        assert server.stop() == 0


def post(server, route, status=200, **body):
    response = server.client.post(server.url.removesuffix("/v1") + route, json=body)
    assert response.status_code == status, response.text
    return response


@pytest.mark.parametrize("prefix", ["", "/v1"])
def test_a_text_becomes_tokens_and_tokens_the_text(server, prefix):
    text = words(20, 1)
    told = post(server, f"{prefix}/tokenize", model=None, prompt=text).json()
    tokens = word_ids(text)
    assert told == {"count": 20, "max_model_len": 1024, "tokens": tokens, "token_strs": None}
    back = post(server, f"{prefix}/detokenize", model="default", tokens=tokens).json()
    assert back == {"prompt": text}


@pytest.mark.parametrize(
    "text", ["", "Zürich: 🦊", "<think>a</think>", "<|im_start|>user\nHi<|im_end|>\n", " a  b\n"]
)
def test_every_text_comes_back(spoken, text):
    told = post(spoken, "/tokenize", prompt=text, return_token_strs=True).json()
    assert len(told["token_strs"]) == len(told["tokens"]) == told["count"]
    assert post(spoken, "/detokenize", tokens=told["tokens"]).json() == {"prompt": text}
    if text.startswith("<think>"):
        assert told["token_strs"] == ["<think>", "a", "</think>"]


def test_a_text_is_counted_that_the_context_does_not_hold(server):
    assert post(server, "/tokenize", prompt=words(3000, 2)).json()["count"] == 3000


@pytest.mark.parametrize("tools", [None, [TOOL]])
def test_a_chat_has_as_many_tokens_as_its_prompt(spoken, tools):
    chat = {"messages": [{"role": "user", "content": "Zürich <|im_end|> 🦊"}], "tools": tools}
    chat["chat_template_kwargs"] = {"enable_thinking": False}
    told = post(spoken, "/tokenize", **chat).json()
    made = post(spoken, "/v1/chat/completions", **chat, max_tokens=1).json()
    assert told["count"] == len(told["tokens"]) == made["usage"]["prompt_tokens"]
    text = post(spoken, "/detokenize", tokens=told["tokens"]).json()["prompt"]
    assert "Zürich <|im_end|> 🦊" in text and text.endswith("</think>\n\n")
    assert ("<tools>" in text) == bool(tools)
    names = post(spoken, "/tokenize", **chat, return_token_strs=True).json()["token_strs"]
    written = text.count("<|im_end|>")  # one of them by the user, whose text has no special tokens
    assert names.count("<|im_end|>") == written - 1


def test_a_chat_can_end_with_its_last_message_or_within_it(spoken):
    messages = [
        {"role": "user", "content": "Where?"},
        {"role": "assistant", "content": "In Oslo,"},
    ]

    def text(**body):
        tokens = post(spoken, "/tokenize", messages=messages, **body).json()["tokens"]
        return post(spoken, "/detokenize", tokens=tokens).json()["prompt"]

    assert text().endswith("In Oslo,<|im_end|>\n<|im_start|>assistant\n")
    assert text(add_generation_prompt=False).endswith("In Oslo,<|im_end|>\n")
    ended = {"add_generation_prompt": False, "continue_final_message": True}
    assert text(**ended).endswith("assistant\nIn Oslo,")
    made = post(spoken, "/v1/chat/completions", messages=messages, **ended, logprobs=True).json()
    assert made["usage"]["prompt_tokens"] == len(
        post(spoken, "/tokenize", messages=messages, **ended).json()["tokens"]
    )
    [choice] = made["choices"]
    assert choice["message"]["content"] == "".join(PIECES)
    assert [row["token"] for row in choice["logprobs"]["content"]] == list(PIECES)


@pytest.mark.parametrize(
    ("route", "param", "body"),
    [
        ("/tokenize", None, {}),
        ("/tokenize", None, {"prompt": "w9", "messages": [user(3, 1)]}),
        ("/tokenize", "prompt", {"prompt": ["w9"]}),
        ("/tokenize", "prompt", {"prompt": "w9" * 8193}),
        ("/tokenize", "messages", {"messages": []}),
        ("/tokenize", "model", {"model": "gpt-9", "prompt": "w9"}),
        (
            "/tokenize",
            "continue_final_message",
            {"messages": [user(3, 1)], "continue_final_message": True},
        ),
        (
            "/tokenize",
            "continue_final_message",
            {
                "messages": [user(3, 1)],
                "continue_final_message": True,
                "add_generation_prompt": False,
            },
        ),
        ("/detokenize", "tokens", {}),
        ("/detokenize", "tokens", {"tokens": [999]}),
        ("/detokenize", "tokens.0", {"tokens": [-1]}),
        ("/detokenize", "tokens.0", {"tokens": ["9"]}),
        ("/detokenize", "tokens", {"tokens": [9] * 1025}),
        (
            "/v1/chat/completions",
            "continue_final_message",
            {"messages": [user(3, 1)], "continue_final_message": True},
        ),
        (
            "/v1/chat/completions",
            "add_generation_prompt",
            {"messages": [user(3, 1)], "add_generation_prompt": False},
        ),
    ],
)
def test_what_is_nonsense_is_refused_by_its_name(server, route, param, body):
    status = 404 if param == "model" else 400
    assert refused(post(server, route, status=status, **body))[2] == param


def test_a_key_is_needed_where_one_is_anywhere(tmp_path, model):
    flags = ("--api-keys", str(write_keys(tmp_path / "keys.toml")))
    with ServerProcess(tmp_path / "home", *flags, model=model) as server:
        for prefix in ("", "/v1"):
            post(server, f"{prefix}/tokenize", status=401, prompt="w9")
            post(server, f"{prefix}/detokenize", status=401, tokens=[9])
        server.client.headers["authorization"] = f"Bearer {KEYS['a']}"
        assert post(server, "/tokenize", prompt="w9").json()["tokens"] == [9]
