"""The text of each token, against the text that a tokenizer makes of all of them."""

import asyncio

import pytest
from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing

from agentmem.chat.renderer import ChatRenderer
from support.chat_tokenizers import CHATML, LLAMA3, chat_tokenizer
from support.fake_engine import tiny_tokenizer

TEXT = "Zürich, 🦊 and\n<|im_start|>user"


def run(renderer, work):
    return asyncio.run(work(renderer))


def test_texts_of_bytes_begin_where_their_characters_do():
    tokenizer = chat_tokenizer(CHATML)

    async def work(renderer):
        return await renderer.text_tokens(TEXT), await renderer.token_texts()

    tokens, texts = run(ChatRenderer(tokenizer, 1000), work)
    told, offsets = [], []
    for token in tokens:
        told.append(texts.text(token))
        offsets.append(texts.offset)
        texts.add(token)
    assert texts.offset == len(TEXT) and texts.whole(tokens) == TEXT
    for token_text, offset in zip(told, offsets, strict=True):
        assert token_text.startswith("bytes:\\x") or TEXT[offset:].startswith(token_text)
    assert told[:3] == ["Z", "bytes:\\xc3", "bytes:\\xbc"] and offsets[:4] == [0, 1, 1, 2]
    assert told.count("<|im_start|>") == 1


def test_texts_of_words_have_the_blanks_that_stand_before_them():
    tokenizer = tiny_tokenizer(size=20)

    async def work(renderer):
        return await renderer.text_tokens("w8 w9  w8"), await renderer.token_texts()

    tokens, texts = run(ChatRenderer(tokenizer, 1000), work)
    told = []
    for token in tokens:
        told.append((texts.text(token), texts.offset))
        texts.add(token)
    assert told == [("w8", 0), (" w9", 2), (" w8", 5)]
    assert texts.whole(tokens) == "w8 w9 w8"


@pytest.mark.parametrize("text", ["hello", "<|begin_of_text|>hello", ""])
def test_a_text_begins_as_the_models_prompts_do_once(text):
    tokenizer = chat_tokenizer(LLAMA3)
    bos = "<|begin_of_text|>"
    backend = tokenizer._tokenizer.backend_tokenizer
    backend.add_special_tokens([AddedToken(bos, special=True)])
    begin = (bos, backend.token_to_id(bos))
    saved = backend.post_processor
    backend.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=[begin])
    tokenizer._tokenizer.bos_token = bos
    try:

        async def work(renderer):
            plain = await renderer.text_tokens(text)
            return plain, await renderer.text_tokens(text, begins=True)

        plain, begun = run(ChatRenderer(tokenizer, 1000), work)
    finally:
        backend.post_processor, tokenizer._tokenizer.bos_token = saved, None
    assert begun.count(begin[1]) == 1 and begun[0] == begin[1]
    assert begun[-len(plain) :] == plain if plain else begun == [begin[1]]
