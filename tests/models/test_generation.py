"""What a model's files say of its answers: which tokens end one, and how tokens are chosen."""

import json

import pytest

from agentmem.models.generation import end_tokens, read_generation_config, sampling_defaults
from agentmem.models.loading import load_model
from support.chat.families import FAMILIES, tokenizer_of
from support.chat_tokenizers import CHATML, chat_tokenizer
from support.server_process import ServerProcess
from support.tiny_model_dir import write_tiny_model

END, OTHER, THIRD = "<|im_end|>", "<|im_start|>", "a"


def ids(*names):
    return {chat_tokenizer(CHATML).convert_tokens_to_ids(name) for name in names}


@pytest.mark.parametrize(
    ("config", "generation"),
    [
        ({}, {}),
        ({"eos_token_id": None}, {"eos_token_id": None}),
        ({"eos_token_id": ids(THIRD).pop()}, {}),
        ({"eos_token_id": [*ids(THIRD)]}, {}),
        ({}, {"eos_token_id": ids(THIRD).pop()}),
        ({}, {"eos_token_id": [*ids(THIRD)]}),
        ({"text_config": {"eos_token_id": [*ids(THIRD)]}}, {}),
        ({"text_config": 7, "eos_token_id": "x"}, {"eos_token_id": [True, -1, "y"]}),
    ],
)
def test_whoever_names_an_end_names_one_more(config, generation):
    named = {str(section) for section in (config, generation)}
    expected = {END, THIRD} if any(str(*ids(THIRD)) in text for text in named) else {END}
    assert end_tokens(chat_tokenizer(CHATML), config, generation) == ids(*expected)


def test_what_the_template_closes_a_turn_with_is_an_end_where_nobody_says_so():
    tokenizer = chat_tokenizer(CHATML)
    said = tokenizer._tokenizer.eos_token
    ends = tokenizer.eos_token_ids
    try:
        tokenizer._tokenizer.eos_token = OTHER
        tokenizer.eos_token_ids = ids(OTHER)
        assert end_tokens(tokenizer, {}, {}) == ids(OTHER, END)
    finally:
        tokenizer._tokenizer.eos_token = said
        tokenizer.eos_token_ids = ends


@pytest.mark.parametrize("family", FAMILIES)
def test_no_family_gets_an_end_in_the_middle_of_an_answer(family):
    """A part of an answer of gpt-oss ends with <|end|>, and no answer does."""
    tokenizer = tokenizer_of(family)
    known = set(tokenizer.eos_token_ids) | {tokenizer.eos_token_id}
    assert end_tokens(tokenizer, {}, {}) == known


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        ({}, {}),
        ({"temperature": 0.6, "top_p": 0.95, "top_k": 20, "do_sample": True}, ...),
        ({"min_p": 0.1, "repetition_penalty": 1.05}, ...),
        ({"do_sample": False, "temperature": 0.6}, {"temperature": 0.0}),
        ({"temperature": "warm", "top_p": 7, "top_k": -1, "min_p": True}, {}),
        ({"temperature": None, "top_k": 0, "max_length": 20}, {}),
    ],
)
def test_sampling_is_what_the_file_says_where_it_says_what_can_be(generation, expected):
    if expected is ...:
        expected = {name: v for name, v in generation.items() if name != "do_sample"}
    assert sampling_defaults(generation) == expected


@pytest.mark.parametrize("text", [None, "[]", "7", "{", "", "null", b"\xff"])
def test_a_file_that_is_no_object_says_nothing(tmp_path, text):
    if text is not None:
        data = text if isinstance(text, bytes) else text.encode()
        (tmp_path / "generation_config.json").write_bytes(data)
    assert read_generation_config(tmp_path) == {}


def test_a_served_model_chooses_as_its_file_says_unless_it_is_told_not_to(tmp_path):
    model = write_tiny_model(tmp_path / "model")
    (model / "generation_config.json").write_text(json.dumps({"do_sample": False}))
    assert load_model(str(model), tmp_path).sampling == {"temperature": 0.0}
    asked = {"messages": [{"role": "user", "content": "w9 w10"}], "max_tokens": 12}
    requests = [
        ("/chat/completions", asked),
        ("/completions", {"prompt": "w9 w10", "max_tokens": 12}),
        ("/messages", {**asked, "model": "default"}),
        ("/responses", {"input": "w9 w10", "max_output_tokens": 12}),
    ]
    for flags, varies in (((), False), (("--no-model-sampling",), True)):
        with ServerProcess(tmp_path / f"home{varies}", *flags, model=model) as server:
            for path, body in requests:
                answers = {text_of(server.client.post(path, json=body).json()) for _ in range(4)}
                assert (len(answers) > 1) is varies, path
            greedy = {"temperature": 0} | asked
            assert text_of(server.client.post("/chat/completions", json=greedy).json())


def text_of(answer):
    if "choices" in answer:
        choice = answer["choices"][0]
        return choice["text"] if "text" in choice else choice["message"]["content"]
    blocks = answer["content"] if "content" in answer else answer["output"][0]["content"]
    return blocks[0]["text"]
