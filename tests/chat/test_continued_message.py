"""A prompt that ends within the assistant's last message, which the answer goes on with."""

import asyncio

import pytest

from agentmem.chat.messages import Chat
from agentmem.chat.renderer import ChatRenderer, Prompt
from agentmem.errors import InvalidRequest
from support.chat.families import FAMILIES, decode, tokenizer_of

ASK = {"role": "user", "content": "Name a river."}
MORE = {"role": "user", "content": "And another?"}


def prompt(family: str, messages: list[dict], **how) -> Prompt:
    renderer = ChatRenderer(tokenizer_of(family), 100_000)
    return asyncio.run(renderer.prompt(Chat(messages, **how)))


def text(family: str, messages: list[dict], **how) -> str:
    return decode(family, prompt(family, messages, **how).tokens)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("said", ["The riv", "<|im_end", "end", "A list:\n1."])
def test_the_prompt_ends_with_what_was_said_so_far(family, said):
    begun = {"role": "assistant", "content": said}
    rendered = text(family, [ASK, begun], continues=True)
    whole = text(family, [ASK, begun], generation_prompt=False)
    assert rendered.endswith(said)
    assert whole.startswith(rendered)
    assert whole != rendered or family == "glm"  # its messages have no end of their own


@pytest.mark.parametrize("family", FAMILIES)
def test_what_was_said_before_is_as_in_any_prompt(family):
    rest = [ASK, {"role": "assistant", "content": "The Volta."}, MORE]
    rendered = text(family, [*rest, {"role": "assistant", "content": "The P"}], continues=True)
    whole = text(family, rest, generation_prompt=False)
    assert rendered.startswith(whole)


def test_blanks_at_the_end_stay_where_the_client_put_them():
    begun = {"role": "assistant", "content": "It is "}
    assert text("llama3", [ASK, begun], continues=True).endswith("It is ")


def test_an_answer_that_goes_on_within_its_reasoning_says_so():
    for said, in_reasoning in (
        ("<think>\nhm", True),
        ("<think>\nhm\n</think>\n\nThe", False),
        ("The", False),
    ):
        begun = {"role": "assistant", "content": said}
        assert prompt("smollm2", [ASK, begun], continues=True).continues_text
        found = prompt("deepseek", [ASK, begun], continues=True)
        assert found.in_reasoning == in_reasoning


def test_what_is_no_text_of_the_assistants_can_not_go_on():
    function = {"name": "f", "arguments": "{}"}
    calls = [{"id": "c1", "type": "function", "function": function}]
    for last in (MORE, {"role": "assistant", "content": "", "tool_calls": calls}):
        with pytest.raises(InvalidRequest, match="go on"):
            prompt("qwen3", [ASK, last], continues=True)
