"""Splicing changes ids, never text; and it keeps all of a branch that the text allows."""

import asyncio
import copy
import json
import pydoc_data.topics
import random
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from agentmem.chat.messages import Message
from agentmem.chat.renderer import ChatRenderer
from agentmem.chat.special_tokens import SpecialTokens
from agentmem.chat.splice import splice
from agentmem.chat.token_bytes import TokenBytes
from agentmem.errors import InvalidRequest

SPECIAL = ("<|im_start|>", "<|im_end|>", "<think>", "</think>", "<|endoftext|>")
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = "\n".join(list(pydoc_data.topics.topics.values())[:20])


def _wrap(bare: Tokenizer) -> PreTrainedTokenizerFast:
    bare.add_tokens([AddedToken(s, special=True, normalized=False) for s in SPECIAL])
    return PreTrainedTokenizerFast(tokenizer_object=bare, chat_template=CHATML)


@cache
def byte_level() -> PreTrainedTokenizerFast:
    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer, bare.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bare.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False)
    )
    return _wrap(bare)


@cache
def sentence_piece() -> PreTrainedTokenizerFast:
    """Return one like Gemma's.

    It has no space before the first word, and bytes where a character is not in the vocabulary.
    """
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=500, show_progress=False))
    spec = json.loads(trained.to_str())["model"]
    vocabulary = {f"<0x{b:02X}>": b for b in range(256)}
    vocabulary |= {name: 256 + i for i, name in enumerate(spec["vocab"])}
    merges = [tuple(m) for m in spec["merges"]]
    bare = Tokenizer(
        models.BPE(vocabulary, merges, byte_fallback=True, fuse_unk=True, unk_token="<0x00>")
    )
    bare.normalizer = normalizers.Replace(" ", "▁")
    bare.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return _wrap(bare)


KINDS = {"byte-level": byte_level, "SentencePiece": sentence_piece}
SEAMS = ["Hello", " world", " ", "\n", "é", "日本", "🦊", "\u200d", "<|im_", "\x00"]
# SentencePiece's own sign for a space decodes to one: no tokenizer of its kind can tell them apart
pieces = st.one_of(
    st.sampled_from([*SPECIAL, *SEAMS]),
    st.text(st.characters(exclude_characters="▁", codec="utf-8"), max_size=6),
)
texts = st.lists(pieces, max_size=12).map("".join)


def ids(tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def other_ids(tokenizer, text: str, rng: random.Random) -> list[int]:
    """Return ids that a model might have written for `text`.

    It is cut at random, and each piece tokenized by itself.
    """
    cuts = sorted(rng.sample(range(len(text) + 1), min(len(text), rng.randint(0, 6))))
    return [
        t
        for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)
        for t in ids(tokenizer, text[a:b])
    ]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=300, deadline=None)
@given(text=texts)
def test_a_tokens_bytes_are_what_it_decodes_to(kind, text):
    tokenizer = KINDS[kind]()
    tokens = ids(tokenizer, text)
    data, ends = TokenBytes(tokenizer).of_tokens(np.array(tokens, np.int64))
    assert data.decode() == text == tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
    assert len(ends) == len(tokens) and (not tokens or ends[-1] == len(data))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=300, deadline=None)
@given(shared=texts, mine=texts, theirs=texts, seed=st.integers(0, 9))
def test_spliced_ids_stand_for_the_prompts_text_and_begin_with_the_branchs(
    kind, shared, mine, theirs, seed
):
    tokenizer, rng = KINDS[kind](), random.Random(seed)
    token_bytes = TokenBytes(tokenizer)
    branch = np.array(
        other_ids(tokenizer, shared, rng) + other_ids(tokenizer, theirs, rng), np.int64
    )
    prompt = ids(tokenizer, shared + mine)
    result = splice(token_bytes, prompt, [branch])
    assert result.tokens[: result.kept] == branch[: result.kept].tolist()
    data, _ = token_bytes.of_tokens(np.array(result.tokens, np.int64))
    assert data.decode() == shared + mine
    assert [t for t in result.tokens if t in token_bytes.atomic_ids] == [
        t for t in prompt if t in token_bytes.atomic_ids
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_model_wrote_is_kept_whatever_its_tokenizer_would_make_of_it(kind):
    tokenizer = KINDS[kind]()
    head, answer = (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
        "Hello world, statement",
    )
    written = [t for c in answer for t in ids(tokenizer, c)]  # letter by letter
    branch = np.array(ids(tokenizer, head) + written, np.int64)
    tail = "<|im_end|>\n<|im_start|>user\nAnd?<|im_end|>\n"
    prompt = ids(tokenizer, head + answer + tail)
    result = splice(TokenBytes(tokenizer), prompt, [branch])
    assert result.kept == len(branch)
    assert result.tokens[result.kept :] == ids(tokenizer, tail)
    assert result.common_bytes == len((head + answer).encode())


def test_the_branch_that_shares_most_text_is_taken():
    tokenizer = byte_level()
    prompt = ids(tokenizer, "one two three four five")
    branches = [
        np.array(ids(tokenizer, t), np.int64)
        for t in ("one two", "one two three four six", "two three four five")
    ]
    result = splice(TokenBytes(tokenizer), prompt, branches)
    data, _ = TokenBytes(tokenizer).of_tokens(np.array(result.tokens[: result.kept], np.int64))
    assert data.decode().startswith("one two three four")


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(said=texts)
def test_what_a_user_writes_is_never_a_special_token(kind, said):
    tokenizer = KINDS[kind]()
    tokens = SpecialTokens(tokenizer, TokenBytes(tokenizer)).tokens(
        [{"role": "user", "content": said}], {}
    )
    token_bytes = TokenBytes(tokenizer)
    special = [t for t in tokens if t in token_bytes.atomic_ids]
    assert special == ids(tokenizer, "<|im_start|><|im_end|><|im_start|>")
    data, _ = token_bytes.of_tokens(np.array(tokens, np.int64))
    assert data.decode() == f"<|im_start|>user\n{said}<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_text_has_the_same_tokens_in_every_process(kind):
    """A byte may have two tokens, and a vocabulary comes in another order each time."""
    tokenizer = KINDS[kind]()
    vocabulary = tokenizer.get_vocab()
    names = sorted(vocabulary)
    spelled = []
    for order in (names, names[::-1]):
        tokenizer = copy.copy(tokenizer)
        tokenizer.get_vocab = lambda order=order: {name: vocabulary[name] for name in order}
        plain = SpecialTokens(tokenizer, TokenBytes(tokenizer))
        spelled.append(plain.tokens([{"role": "user", "content": "<think> or <|im_end|>?"}], {}))
    assert spelled[0] == spelled[1]
    assert not [t for t in spelled[0] if tokenizer.convert_ids_to_tokens(t) in ("<0x3C>", "<0x3E>")]


def test_a_message_that_leaves_no_mark_is_refused_and_not_left_waiting():
    tokenizer = TokenizerWrapper(byte_level())
    said = Message("user", "".join(map(chr, range(0xE000, 0xF900))))

    async def render() -> list[int]:
        return await asyncio.wait_for(ChatRenderer(tokenizer, 10**6).render([said]), 30)

    with pytest.raises(InvalidRequest, match="private use") as e:
        asyncio.run(render())
    assert e.value.param == "messages"


def test_what_the_assistant_said_keeps_its_own_tokens():
    tokenizer = byte_level()
    said = "<think>\nhm\n</think>\nYes"
    tokens = SpecialTokens(tokenizer, TokenBytes(tokenizer)).tokens(
        [{"role": "assistant", "content": said}], {}
    )
    assert [t for t in ids(tokenizer, "<think></think>") if t not in tokens] == []


def test_a_tokenizer_whose_tokens_have_no_text_of_their_own_is_left_alone():
    bare = Tokenizer(models.WordLevel({"a": 0, "b": 1, "<unk>": 2}, unk_token="<unk>"))
    bare.pre_tokenizer = pre_tokenizers.Whitespace()
    token_bytes = TokenBytes(PreTrainedTokenizerFast(tokenizer_object=bare))
    assert not token_bytes.is_known
    assert splice(token_bytes, [0, 1], [np.array([0, 1])]).tokens == [0, 1]
