"""What becomes of an agent's transcript when its caches are forked or cut."""

from ..engine.request import EngineAPI
from ..engine.turns import Turn, TurnTree, copy_of
from ..errors import InvalidRequest
from .chat import ChatRenderer
from .conversation import inherited, system
from .render import render


async def copy_transcript(engine: EngineAPI, namespace: str, agent_id: str, to: str) -> None:
    """The newest path becomes the transcript of agent `to`, whose turns have ids of their own."""
    tree = await engine.turns.tree(namespace, agent_id)
    copies: list[Turn] = []
    for turn in tree.path(tree.newest):
        copies.append(copy_of(turn, copies[-1] if copies else None))
    if copies:
        target = await engine.turns.tree(namespace, to)
        engine.turns.add(namespace, to, target, copies, ephemeral=tree.in_ram_only)


async def cut_transcript(
    engine: EngineAPI, renderer: ChatRenderer, namespace: str, agent_id: str, num_tokens: int
) -> None:
    """Forget the last turns of the newest path, as far as they are not within the first tokens of the cache.

    What follows them on other paths keeps its messages.
    """
    tree = await engine.turns.tree(namespace, agent_id)
    while (last := tree.newest) is not None and not await _fits(renderer, tree, last, num_tokens):
        await engine.turns.remove(namespace, agent_id, tree, last)


async def _fits(renderer: ChatRenderer, tree: TurnTree, turn: Turn, num_tokens: int) -> bool:
    instructions, tools = (inherited(tree, turn, name) for name in ("instructions", "tools"))
    messages = [*system(instructions), *tree.messages(turn)]
    try:
        tokens = await render(renderer, messages, (), tools=tools or (), generation_prompt=False)
    except InvalidRequest:  # too long, for one
        return False
    return len(tokens) <= num_tokens + _END


_END = 4  # tokens: the last of an answer, and what closes its message, are never cached
