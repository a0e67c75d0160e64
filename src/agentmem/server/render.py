"""Messages in the shape of OpenAI's chat API, as transcripts hold them, to token ids."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..engine.turns import Messages
from .chat import ChatRenderer
from .openai import ChatMessage, chat_messages


async def render(
    renderer: ChatRenderer, messages: Messages, branches: Sequence[np.ndarray], **options: Any
) -> list[int]:
    """As ChatRenderer.render, whose options these are."""
    return await renderer.render(chat_messages([ChatMessage.model_validate(m) for m in messages]), branches, **options)
