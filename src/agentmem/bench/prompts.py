"""Prompts that share no beginning with any other, so that no accidental cache hit flatters a figure."""

from pathlib import Path
from typing import Any

from ..errors import StartupError
from .server import BenchError, Messages, Server
from .windows import read_corpus


class Prompts:
    def __init__(self, tokenizer: Any, corpus: Path | None = None):
        """`tokenizer`: one of mlx-lm's or transformers', with a chat template."""
        self._tokenizer = tokenizer
        self._text = read_corpus(corpus)[1]
        self._start = self._number = 0

    def text(self, tokens: int) -> str:
        """About as many tokens of the corpus, from where the last one ended, after a number of its own."""
        self._number += 1
        want = 8 * tokens
        text = (self._text[self._start :] + self._text * (want // len(self._text) + 1))[:want]
        ids = self._encode(f"{self._number:04d} {text}")[:tokens]
        said: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        self._start = (self._start + len(said)) % len(self._text)
        return said

    def ids(self, tokens: int) -> list[int]:
        """Exactly as many, without a template."""
        ids = self._encode(self.text(tokens + 16))[:tokens]
        assert len(ids) == tokens
        return ids

    def messages(self, tokens: int) -> Messages:
        """One user's message that renders to at most `tokens`, a few less at worst."""
        overhead = self.count([{"role": "user", "content": "x"}])
        if tokens < overhead + 16:
            raise StartupError(f"{tokens} tokens are too few: the chat template alone takes {overhead}")
        text = self.text(tokens - overhead)
        while (count := self.count(messages := [{"role": "user", "content": text}])) > tokens:
            text = text[: -max(1, count - tokens)]
        return messages

    def count(self, messages: Messages) -> int:
        """Tokens of the rendered prompt."""
        rendered = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return len(self._encode(rendered))

    def check(self, messages: Messages, reported: int) -> None:
        """Raises BenchError where a server counts other tokens than the tokenizer."""
        if reported != (count := self.count(messages)):
            raise BenchError(f"the server says {reported} prompt tokens where the tokenizer says {count}")

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids


def warm_up(server: Server, prompts: Prompts) -> None:
    """A first request, cold and warm, so that what is measured later is none."""
    messages = prompts.messages(64)
    server.ask("warm-up", messages, 2)
    server.post("/agents/warm-up/evict")
    server.ask("warm-up", messages, 2)
