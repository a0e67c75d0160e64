"""Recorded conversations through chat templates of ten families: hardly a token is prefilled twice."""

import sys
from collections.abc import Iterator

import numpy as np
import pytest
from chat.families import FAMILIES, tokenizer_of
from chat.ideal import Need, needs
from chat.play import Step, frozen_date, play, supported

from agentmem.server.chat import ChatRenderer
from agentmem.server.openai import ChatMessage, chat_messages
from agentmem.server.plain_text import PlainText
from agentmem.server.template import ChatTemplate
from agentmem.server.token_text import TokenText
from agentmem.tensors import common_prefix


def messages_of(step_messages: list[dict]) -> list:
    return chat_messages([ChatMessage.model_validate(m) for m in step_messages])


def steps_of(family: str, conversation: str) -> list[Step]:
    """As the server reads the messages."""
    template = ChatTemplate(tokenizer_of(family))
    return list(play(family, conversation, lambda messages: template.dicts(messages_of(messages))))


def prefilled(steps: list[Step]) -> Iterator[tuple[list[int], int]]:
    """For each step its token ids and how many of them are prefilled by an agent that keeps all its branches."""
    renderer = ChatRenderer(tokenizer_of(steps[0].family), 1 << 20)
    branches: list[np.ndarray] = []
    for step in steps:
        tools = step.tools if step.tools and renderer._template._takes_tools else []  # else they are refused
        with frozen_date(step.today):
            tokens = renderer._render(messages_of(step.messages), branches, tools, step.template_kwargs)
        ids = np.array(tokens)
        cached = max((common_prefix(branch, ids[:-1]) for branch in branches), default=0)
        yield tokens, len(tokens) - cached
        branches.append(np.array([*tokens, *step.generated_ids[:-1]]))  # the last one sampled is in no cache


def table(family: str) -> list[tuple[str, int, Need, int]]:
    """(conversation, step, what it needs, what it prefills)."""
    return [
        (conversation, step.index, need, count)
        for conversation in supported(family)
        for steps in [steps_of(family, conversation)]
        for step, need, (_, count) in zip(steps, needs(steps), prefilled(steps), strict=True)
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_all_that_is_prefilled_is_within_two_percent_of_the_ideal(family):
    rows = table(family)
    ours, ideal, naive = (
        sum(column) for column in zip(*((n, need.ideal, need.naive) for *_, need, n in rows), strict=True)
    )
    assert ours <= 1.02 * ideal, f"{ours} tokens prefilled, {ideal} needed, {naive} by comparing tokens"


@pytest.mark.parametrize("family", FAMILIES)
def test_spliced_ids_always_decode_to_the_rendered_text(family):
    for conversation in supported(family):
        steps = steps_of(family, conversation)
        for step, (tokens, _) in zip(steps, prefilled(steps), strict=True):
            decode = tokenizer_of(family).decode
            plain = PlainText(tokenizer_of(family), TokenText(tokenizer_of(family)))
            assert decode(tokens) == decode(plain.encode(step.rendered)), (conversation, step.index)


if __name__ == "__main__":
    for family in sys.argv[1:] or FAMILIES:
        rows = table(family)
        worst = sorted(rows, key=lambda row: row[2].ideal - row[3])[:4]
        sums = [
            sum(row[3] for row in rows),
            *(sum(getattr(row[2], f) for row in rows) for f in ("ideal", "naive", "total")),
        ]
        print(f"{family:15} prefilled {sums[0]:6,}  ideal {sums[1]:6,}  naive {sums[2]:6,}  of {sums[3]:7,} tokens")
        for conversation, index, need, count in worst:
            if count > need.ideal:
                print(f"    {conversation} {index}: {count} against {need.ideal} (naive {need.naive})")
