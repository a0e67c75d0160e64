"""A chat, whatever wire format it came in: whose it is, and the token ids that its messages render to."""

import asyncio
import unicodedata
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

from jinja2 import TemplateError

from ..errors import ContextLengthExceeded, InvalidRequest

ANONYMOUS = "anonymous"
MAX_AGENT_ID = 256  # characters


@dataclass(frozen=True)
class Message:
    role: Literal["system", "user", "assistant"]
    content: str
    name: str | None = None

    def for_template(self) -> dict[str, str]:
        name = {"name": self.name} if self.name is not None else {}
        return {"role": self.role, "content": self.content, **name}


def resolve_agent_id(body: str | None, header: bytes | None) -> str:
    """The body's agent id, else the X-Agent-Id header's (UTF-8), else "anonymous".

    Any text of 1 to 256 characters will do, "../x" too: an id never becomes a path name. Raises InvalidRequest.
    """
    if body is None and header is None:
        return ANONYMOUS
    try:
        agent_id = body if body is not None else (header or b"").decode()
    except UnicodeDecodeError:
        raise InvalidRequest("The header X-Agent-Id is not valid UTF-8.", param="agent_id") from None
    if not 1 <= len(agent_id) <= MAX_AGENT_ID:
        message = f"agent_id must have 1 to {MAX_AGENT_ID} characters, not {len(agent_id)}."
        raise InvalidRequest(message, param="agent_id")
    for character in agent_id:
        if unicodedata.category(character) in ("Cc", "Cs"):
            message = f"agent_id must not hold control characters or lone surrogates, such as {character!r}."
            raise InvalidRequest(message, param="agent_id")
    return agent_id


class ChatRenderer:
    """Renders messages with the model's chat template, in one thread: HF tokenizers are not re-entrant."""

    def __init__(self, tokenizer: Any, max_context: int, why_max: str = ""):
        """`tokenizer` is an mlx_lm TokenizerWrapper; `max_context` counts prompt and answer, in tokens.

        `why_max` says what sets it, if not the model.
        """
        self._tokenizer = tokenizer
        self._max_context, self._why_max = max_context, why_max
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenizer")

    async def render(self, messages: Sequence[Message]) -> list[int]:
        """The prompt's token ids, up to where the assistant's answer begins, with room for at least one more.

        A last message of the assistant's is history like any other: the answer is a new message after it.
        Raises InvalidRequest (no template, or one that refuses these messages) and ContextLengthExceeded.
        """
        loop = asyncio.get_running_loop()
        tokens = await loop.run_in_executor(self._thread, self._apply_template, messages)
        if len(tokens) >= self._max_context:
            raise ContextLengthExceeded(len(tokens), self._max_context, self._why_max)
        return tokens

    def _apply_template(self, messages: Sequence[Message]) -> list[int]:
        if not self._tokenizer.has_chat_template:
            raise InvalidRequest(
                "This model has no chat template, so it can't take messages; serve its instruct or chat variant.",
                param="messages",
            )
        try:
            tokens = self._tokenizer.apply_chat_template(
                [m.for_template() for m in messages], add_generation_prompt=True, tokenize=True
            )
        except TemplateError as e:
            message = f"The model's chat template refuses these messages: {e.message or type(e).__name__}"
            raise InvalidRequest(message, param="messages") from e
        if not tokens:
            raise InvalidRequest("The messages render to an empty prompt.", param="messages")
        return list(tokens)
