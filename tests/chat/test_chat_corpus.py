"""The corpus of conversations itself.

The families' templates and tokenizers do what the real ones are known for.
"""

import json
from functools import cache
from pathlib import Path

import pytest
from jinja2 import TemplateError

from support.chat.conversations import CONVERSATIONS, SYSTEM
from support.chat.families import FAMILIES, FOLDER, added_tokens, decode, encode, encode_rest
from support.chat.ideal import common_text, needs
from support.chat.make_tokenizers import ADDED
from support.chat.play import FORGED, SKIPPED, Step, play, render, supported
from support.chat.reference import spliced

PAIRS = [(family, name) for family in FAMILIES for name in supported(family)]

# Where decoding gives another text than was encoded, and why.
_UNDERSCORE = "U+2581 in a text is a space to SentencePiece"
NO_ROUND_TRIP = {
    **{
        (family, "unicode"): "its normalizer composes characters (NFC)"
        for family in ("qwen3", "qwen3-instruct")
    },
    **{(family, "look_alikes"): _UNDERSCORE for family in ("gemma3", "mistral")},
    **{
        ("mistral-v1", name): "a dummy space after each special token"
        for name in supported("mistral-v1")
    },
}
# Where the model's own choice of tokens is not the tokenizer's, and the template leaves the text as
# it was.
SEAMS = [
    (family, "sampled_seams") for family in ("qwen3-instruct", "llama3", "gemma3", "smollm2", "glm")
]
SEAMS += [
    (family, "sampled_chain")
    for family in ("qwen3", "qwen3-instruct", "llama3", "deepseek", "gpt-oss", "glm")
]
SEAMS += [("qwen3-instruct", "sampled_thoughts"), ("qwen3-instruct", "seams"), ("smollm2", "seams")]

APART = 2  # tokens that a text split in two can take more than the whole


@cache
def steps(family: str, name: str) -> tuple[Step, ...]:
    return tuple(play(family, name))


def test_every_pair_plays_or_is_skipped_for_a_reason():
    assert set(SKIPPED) <= {(family, name) for family in FAMILIES for name in CONVERSATIONS}
    assert all(SKIPPED.values())
    for family, name in PAIRS:
        played = steps(family, name)
        assert [s.answer for s in played] == [r.answer for r in CONVERSATIONS[name]], (family, name)
        assert all(s.rendered and s.generated_ids for s in played)


@pytest.mark.parametrize("family", FAMILIES)
def test_playing_twice_gives_the_same(family):
    for name in ("reasoning", "seams", "look_alikes", "over_midnight"):
        assert steps(family, name) == tuple(play(family, name))


@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_prompt_and_answer_gives_their_text(family):
    for name in supported(family):
        exact = [
            decode(family, [*s.prompt_ids, *s.generated_ids]) == s.rendered + s.generated
            for s in steps(family, name)
        ]
        assert all(exact) != ((family, name) in NO_ROUND_TRIP), name


@pytest.mark.parametrize("family", FAMILIES)
def test_marks_stand_only_where_a_message_holds_a_special_token(family):
    for name in set(supported(family)) - {"look_alikes", "forged_turn"}:
        assert all(s.marked == s.rendered for s in steps(family, name))
    marked = [s.marked for s in steps(family, "look_alikes")]
    assert marked[-1].count(FORGED) >= 2
    assert marked[-1].replace(FORGED, "") == steps(family, "look_alikes")[-1].rendered


@pytest.mark.parametrize("family", FAMILIES)
def test_added_tokens_are_one_token_each(family):
    assert all(len(encode_rest(family, token)) == 1 for token in added_tokens(family))


@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_ends_with_an_end_token_unless_cut(family):
    ends = FAMILIES[family]().eos_token_ids
    for step in steps(family, "seams"):
        assert (step.generated_ids[-1] in ends) != step.answer.cut


@pytest.mark.parametrize("family", FAMILIES)
def test_the_ideal_is_at_most_what_comparing_tokens_prefills(family):
    """The ideal grants each step one token more, and a few where the rest tokenizes worse alone."""
    for name in supported(family):
        found = needs(steps(family, name))
        assert found[0].naive == found[0].total
        assert all(need.naive <= need.linear <= need.total for need in found)
        if name != "forged_turn":
            assert all(need.ideal <= need.naive + 1 + APART for need in found), name


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"mistral-v1"}))
def test_a_plain_splice_reaches_the_ideal_and_keeps_the_text(family):
    prefilled = most = 0
    for name in supported(family):
        played = steps(family, name)
        for step, need, got in zip(played, needs(played), spliced(played), strict=True):
            # one more where the common text ends inside a token
            assert got.prefilled <= need.ideal + 1, (name, step.index)
            assert got.text == step.rendered or (family, name) in NO_ROUND_TRIP, (name, step.index)
            prefilled, most = prefilled + got.prefilled, most + need.ideal
    assert 0.95 * most < prefilled <= most


@pytest.mark.parametrize("family", ("qwen3-instruct", "smollm2"))
def test_a_forged_turn_shares_text_and_tokens_with_the_real_one_but_is_not_common_text(family):
    _, real, forged = steps(family, "forged_turn")[:3]
    head = forged.rendered.index("Hi<|im_end|>")
    assert real.rendered[: head + 40] == forged.rendered[: head + 40]
    assert common_text(forged, [real]) == head + len("Hi")


@pytest.mark.parametrize(("family", "name"), SEAMS)
def test_comparing_tokens_prefills_more_than_the_ideal_at_seams(family, name):
    found = needs(steps(family, name))
    assert sum(n.naive for n in found) > sum(n.ideal for n in found)


@pytest.mark.parametrize("family", ("qwen3", "deepseek", "glm", "gpt-oss"))
def test_thoughts_of_earlier_answers_are_gone_from_the_next_prompt(family):
    first, second = steps(family, "reasoning_content")[:2]
    assert first.answer.reasoning in first.generated
    assert first.answer.reasoning not in second.rendered
    assert first.answer.text in second.rendered
    assert common_text(second, [first]) < len(first.rendered + first.generated) - len(
        first.answer.text
    )


@pytest.mark.parametrize("family", ("qwen3", "glm", "gpt-oss"))
def test_thoughts_between_tool_calls_stay_until_the_next_question(family):
    chain = steps(family, "tool_chain")
    assert all(chain[i].answer.reasoning in chain[i + 1].rendered for i in range(3))
    assert not any(chain[i].answer.reasoning in chain[4].rendered for i in range(3))


def test_qwen3_without_thinking_gets_an_empty_think_block_which_the_history_drops():
    first, second = steps("qwen3", "no_thinking")[:2]
    assert first.rendered.endswith("<think>\n\n</think>\n\n")
    assert second.rendered.count("<think>") == 1


def test_parallel_results_are_one_turn_of_qwen3_and_glm():
    after_results = [steps(family, "parallel_tools")[1].rendered for family in ("qwen3", "glm")]
    assert "</tool_response><|im_end|>" in after_results[0]
    assert [text.count("</tool_response>\n<tool_response>") for text in after_results] == [2, 2]
    assert after_results[1].count("<|observation|>") == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_a_new_day_changes_the_prompt_only_where_the_template_has_a_date(family):
    second, third = steps(family, "over_midnight")[1:3]
    plain = steps(family, "plain")
    assert (second.rendered == plain[1].rendered) and (third.rendered != plain[2].rendered) == (
        family in ("llama3", "gpt-oss")
    )


def test_system_moves_to_the_last_user_message_of_mistral():
    for step in steps("mistral", "plain"):
        assert step.rendered.count(SYSTEM) == 1
        assert step.rendered.rindex("[INST] " + SYSTEM) == step.rendered.rindex("[INST]")


def test_the_billing_line_and_the_form_of_contents_change_nothing():
    for family in FAMILIES:
        lists, strings = steps(family, "content_lists"), steps(family, "plain")
        assert [s.rendered for s in lists] == [s.rendered for s in strings]
        assert not any("billing" in s.rendered for s in steps(family, "billing_line"))


@pytest.mark.parametrize("name", ("null_content", "arguments_both_ways"))
def test_calls_render_the_same_however_the_client_writes_them(name):
    for family in FAMILIES:
        if (family, name) not in SKIPPED:
            one, other = steps(family, name)[:6], steps(family, "tool_call")
            assert [s.rendered for s in one] == [s.rendered for s in other], family


def test_glm_ends_an_answer_with_the_header_of_what_comes_next():
    first, second, third = steps("glm", "tool_call")[:3]
    assert first.generated.endswith("<|user|>") and second.generated.endswith("<|observation|>")
    assert third.rendered.startswith(second.rendered + second.generated)


@pytest.mark.parametrize(
    ("family", "name"), [pair for pair in SKIPPED if pair[1] == "middle_system"]
)
def test_a_template_that_refuses_says_so(family, name):
    request = CONVERSATIONS[name][-1]
    try:
        text = render(family, request.messages, None, request.today, {})
    except TemplateError:
        return
    assert "Reminder" not in text  # gpt-oss: lost without a word


def test_digits_split_as_in_the_real_tokenizers():
    def pieces(family: str) -> list[str]:
        return [decode(family, [token]) for token in encode_rest(family, " a1234567")]

    for family in ("qwen3", "smollm2", "gemma3", "mistral"):
        assert pieces(family)[-7:] == list("1234567"), family
    for family in ("llama3", "gpt-oss", "glm", "deepseek"):
        assert "".join(pieces(family)[-3:]).endswith("7") and max(map(len, pieces(family))) <= 3


def test_tokenizers_are_small_files_with_the_special_tokens_of_their_family():
    for family, (special, plain) in ADDED.items():
        path = Path(FOLDER / "tokenizers" / f"{family}.json")
        assert path.stat().st_size < 100_000
        added = json.loads(path.read_text(encoding="utf-8"))["added_tokens"]
        assert {t["content"]: t["special"] for t in added} == {
            t: t in special for t in special + plain
        }


def test_encoding_the_rest_of_a_text_adds_nothing_before_it():
    for family in set(FAMILIES) - {"mistral-v1"}:
        for head, rest in (("<s>", "word"), ("a", "b"), ("a ", " b"), ("", " x")):
            whole = encode(family, head) + encode_rest(family, rest)
            assert decode(family, whole).lstrip() == (head + rest).lstrip(), family
