"""Prompts that share no beginning with any other, so that no accidental cache hit flatters a
figure.
"""

from pathlib import Path
from typing import Any

from ..errors import StartupError
from .server import BenchError, Messages
from .windows import read_corpus


class Prompts:
    def __init__(self, tokenizer: Any, corpus: Path | None = None):
        """`tokenizer`: one of mlx-lm's."""
        self._tokenizer = tokenizer
        name, self._text = read_corpus(corpus)
        if not self._text.strip():
            raise StartupError(f"--corpus {name}: there is no text in it")
        self._start = self._number = 0

    def text(self, tokens: int) -> str:
        """About as many tokens of the corpus, from where the last one ended, after a number of its
        own.
        """
        self._number += 1
        for letters in (8, 32, 128):  # a token; a rule of dashes has many
            want = letters * tokens
            text = (self._text[self._start :] + self._text * (want // len(self._text) + 1))[:want]
            if len(ids := self._encode(f"{self._number:04d} {text}")[:tokens]) == tokens:
                break
        else:
            raise StartupError(
                f"{want:,} characters of --corpus make {len(ids)} tokens, not {tokens}: take another"
            )
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
        if not self._tokenizer.has_chat_template:
            raise StartupError(
                "the model has no chat template, so it can't be asked: take its instruct variant"
            )
        overhead = self.count([{"role": "user", "content": "x"}])
        if tokens < overhead + 16:
            raise StartupError(
                f"{tokens} tokens are too few: the chat template alone takes {overhead}"
            )
        text = self.text(tokens - overhead)
        while (count := self.count(messages := [{"role": "user", "content": text}])) > tokens:
            text = text[: -max(1, count - tokens)]
        return messages

    def count(self, messages: Messages) -> int:
        """Tokens of the rendered prompt."""
        rendered = self._tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False
        )
        return len(self._encode(rendered))

    def check(self, messages: Messages, reported: int) -> None:
        """Raises BenchError where a server counts other tokens than the tokenizer."""
        if reported != (count := self.count(messages)):
            raise BenchError(
                f"the server says {reported} prompt tokens where the tokenizer says {count}"
            )

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids
