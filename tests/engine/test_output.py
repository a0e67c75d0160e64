"""Tokens become text, at the end of a prompt and at stop strings too."""

import pytest

from agentmem.engine.output import OutputStream
from support.chat_tokenizers import CHATML, chat_tokenizer
from support.fake_engine import tiny_tokenizer

BYTES = chat_tokenizer(CHATML)


def said(output, tokens):
    texts = []
    for token in tokens:
        text, stopped = output.feed(token)
        texts.append(text)
        if stopped:
            return "".join(texts)
    return "".join(texts) + output.finish()


@pytest.mark.parametrize("text", [" Paris, of course", "Paris", "  two blanks", " ", "é 🦊"])
def test_an_answer_that_goes_on_with_a_text_keeps_the_blank_that_it_begins_with(text):
    answer = BYTES.encode(text, add_special_tokens=False)
    assert said(OutputStream(BYTES, continues_text=True), answer) == text
    assert said(OutputStream(BYTES), answer) == text.removeprefix(" ")


def test_words_that_go_on_with_a_text_are_set_apart_from_it():
    tokenizer = tiny_tokenizer(size=20)
    assert said(OutputStream(tokenizer, continues_text=True), [9, 10]) == " w9 w10"
    assert said(OutputStream(tokenizer), [9, 10]) == "w9 w10"


@pytest.mark.parametrize(
    ("stops", "stop", "text"),
    [
        (("END", "X"), "END", "one two "),
        (("two", "one two"), "one two", ""),
        (("three E", "E"), "three E", "one two "),
        (("nothing",), None, "one two END three E"),
        ((), None, "one two END three E"),
    ],
)
def test_the_first_stop_string_ends_an_answer_and_is_told(stops, stop, text):
    words = "one two three E" if "three E" in stops else "one two END three E"
    output = OutputStream(BYTES, stop=stops)
    assert said(output, BYTES.encode(words, add_special_tokens=False)) == text
    assert output.stop_string == stop
