"""What becomes of an agent's transcript when its caches are forked or cut."""

import math
from collections.abc import Sequence

import numpy as np

from ..agent_key import AgentKey
from ..chat.messages import Chat
from ..chat.renderer import ChatRenderer
from ..errors import InvalidRequest
from .conversation import inherited, system
from .registry import TranscriptRegistry
from .turns import Turn, TurnTree, copies


async def copy_transcript(turns: TranscriptRegistry, agent: AgentKey, to: str) -> None:
    """The newest path becomes the transcript of agent `to`, whose turns have ids of their own."""
    tree = await turns.tree(*agent)
    path = copies(tree.path(tree.newest), None)
    if path:
        target = await turns.tree(agent.namespace, to)
        turns.add(agent.namespace, to, target, path, ephemeral=tree.in_ram_only)


async def cut_transcript(
    turns: TranscriptRegistry,
    renderer: ChatRenderer,
    agent: AgentKey,
    num_tokens: int,
    branches: Sequence[np.ndarray],
) -> None:
    """Forget the last turns of the newest path, as far as they are not within the first tokens of
    the cache.

    What follows them on other paths keeps its messages. `branches`: the agent's, from before the
    cut.
    """
    tree = await turns.tree(*agent)
    async with tree.appending:
        path = tree.path(tree.newest)
        fits, too_long = 0, len(path) + 1  # turns: as many as fit, and as many as don't
        while too_long - fits > 1:
            middle = (fits + too_long) // 2
            if await _length(renderer, tree, path[middle - 1], branches) <= num_tokens + _END:
                fits = middle
            else:
                too_long = middle
        await turns.cut(*agent, tree, path[fits:])


async def _length(
    renderer: ChatRenderer, tree: TurnTree, turn: Turn, branches: Sequence[np.ndarray]
) -> float:
    """Tokens of all that was said up to the end of a turn."""
    instructions, tools = (inherited(tree, turn, name) for name in ("instructions", "tools"))
    messages = [*system(instructions), *tree.messages(turn)]
    chat = Chat(messages, tools=tools or (), generation_prompt=False)
    try:
        return len((await renderer.prompt(chat, branches)).tokens)
    except InvalidRequest:  # too long, for one
        return math.inf


_END = 4  # tokens: the last of an answer, and what closes its message, are never cached
