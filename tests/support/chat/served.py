"""What the server prefills of a conversation: its own rendering and splicing, over all branches of
one agent.
"""

from collections.abc import Iterator

import numpy as np

from agentmem.chat.normalise import normalise
from agentmem.chat.renderer import ChatRenderer
from agentmem.chat.template import ChatTemplate
from agentmem.server.api.chat_messages import to_messages
from agentmem.tensors import common_prefix
from support.chat.families import tokenizer_of
from support.chat.ideal import Need, needs
from support.chat.play import Step, frozen_date, play, supported


def messages_of(step_messages: list[dict]) -> list:
    return normalise(to_messages(step_messages))


def steps_of(family: str, conversation: str) -> list[Step]:
    """Read the messages as the server does."""
    template = ChatTemplate(tokenizer_of(family), generic_tools=False)
    return list(play(family, conversation, lambda messages: template.dicts(messages_of(messages))))


def prefilled(steps: list[Step]) -> Iterator[tuple[list[int], int]]:
    """Yield for each step its token ids, and how many of them are prefilled.

    The agent keeps all its branches.
    """
    renderer = ChatRenderer(tokenizer_of(steps[0].family), 1 << 20, generic_tools=False)
    branches: list[np.ndarray] = []
    for step in steps:
        tools = (
            step.tools if step.tools and renderer._template.takes_tools else []
        )  # else they are refused
        with frozen_date(step.today):
            tokens = renderer._render(
                messages_of(step.messages), branches, tools=tools, options=step.template_kwargs
            )
        ids = np.array(tokens)
        cached = max((common_prefix(branch, ids[:-1]) for branch in branches), default=0)
        yield tokens, len(tokens) - cached
        branches.append(
            np.array([*tokens, *step.generated_ids[:-1]])
        )  # the last one sampled is in no cache


def table(family: str) -> list[tuple[str, int, Need, int]]:
    """(conversation, step, what it needs, what it prefills)."""
    return [
        (conversation, step.index, need, count)
        for conversation in supported(family)
        for steps in [steps_of(family, conversation)]
        for step, need, (_, count) in zip(steps, needs(steps), prefilled(steps), strict=True)
    ]
