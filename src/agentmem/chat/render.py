"""Messages in the shape of OpenAI's chat API, as transcripts hold them, to token ids."""

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..transcripts.turns import Messages
from .messages import normalise
from .renderer import ChatRenderer


async def render(
    renderer: ChatRenderer,
    messages: Messages,
    branches: Sequence[np.ndarray],
    *,
    known: int = 0,
    **options: Any,
) -> list[int]:
    """As ChatRenderer.render, whose options these are.

    `known`: how many of the messages come from a transcript; an error counts those after them, as
    the client does.
    """
    normal = await asyncio.to_thread(
        normalise, messages, known=known
    )  # of 1,000 turns it takes tens of ms
    return await renderer.render(normal, branches, **options)
