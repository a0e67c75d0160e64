"""Recorded conversations in the templates of ten families: hardly a token is prefilled twice."""

import pytest

from agentmem.chat.renderer import ChatRenderer
from agentmem.chat.special_tokens import SpecialTokens
from agentmem.chat.token_bytes import TokenBytes
from support.chat.families import FAMILIES, added_tokens, tokenizer_of
from support.chat.play import supported
from support.chat.served import prefilled, steps_of, table


@pytest.mark.parametrize("family", FAMILIES)
def test_all_that_is_prefilled_is_within_two_percent_of_the_ideal(family):
    rows = table(family)
    ours, ideal, naive = (
        sum(column)
        for column in zip(*((n, need.ideal, need.naive) for *_, need, n in rows), strict=True)
    )
    assert ours <= 1.02 * ideal, (
        f"{ours} tokens prefilled, {ideal} needed, {naive} by comparing tokens"
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_no_turn_prefills_more_than_what_differs_and_a_token_at_the_seam(family):
    """Left out are users who write names of special tokens.

    The ideal counts each as one token; it is spelled in several.
    """
    rows = [row for row in table(family) if row[0] not in ("look_alikes", "forged_turn")]
    assert len(rows) > 100
    assert [row for row in rows if row[3] > row[2].ideal + 1] == []


@pytest.mark.parametrize("family", FAMILIES)
def test_spliced_ids_always_decode_to_the_rendered_text(family):
    for conversation in supported(family):
        steps = steps_of(family, conversation)
        for step, (tokens, _) in zip(steps, prefilled(steps), strict=True):
            decode = tokenizer_of(family).decode
            plain = SpecialTokens(tokenizer_of(family), TokenBytes(tokenizer_of(family)))
            assert decode(tokens) == decode(plain.encode(step.rendered)), (conversation, step.index)


@pytest.mark.parametrize("family", FAMILIES)
def test_where_the_template_asks_for_an_answer_is_known(family):
    renderer, tokenizer = ChatRenderer(tokenizer_of(family), 1 << 20), tokenizer_of(family)
    hello = [{"role": "user", "content": "Hello"}]
    with_it = tokenizer.apply_chat_template(hello, tokenize=False, add_generation_prompt=True)
    without = tokenizer.apply_chat_template(hello, tokenize=False)
    found = 0
    for conversation in supported(family):
        steps = steps_of(family, conversation)
        for step, (tokens, _) in zip(steps, prefilled(steps), strict=True):
            before = renderer._before_answer(tokens, step.template_kwargs)
            if before is not None and not step.template_kwargs:
                found += 1
                assert tokenizer.decode(tokens[before:]) == with_it[len(without) :]
    # Mistral's template has nothing there: the answer follows [/INST]
    asks = len(with_it) > len(without)
    assert (found > 20) == asks


@pytest.mark.parametrize("family", FAMILIES)
def test_no_name_in_what_a_user_writes_is_one_of_the_templates_own_tokens(family):
    tokenizer = tokenizer_of(family)
    plain = SpecialTokens(tokenizer, TokenBytes(tokenizer))
    expected = plain.tokens([{"role": "user", "content": "a b c"}], {})
    names = [name for name in added_tokens(family) if name.strip()]
    said = [{"role": "user", "content": f"a {' b '.join(names)} c"}]
    ids = set(tokenizer.convert_tokens_to_ids(names))
    assert [t for t in plain.tokens(said, {}) if t in ids] == [t for t in expected if t in ids]
    text = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(plain.tokens(said, {})) == tokenizer.decode(plain.encode(text))
