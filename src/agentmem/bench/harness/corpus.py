"""Texts to measure with: prompts that share no beginning, and a corpus cut into windows."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import StartupError
from .server import BenchError, ChatMessages


def read_corpus(path: Path | None) -> tuple[str, str]:
    """Return (name, text) of a file in UTF-8, by default of the help that every Python carries."""
    if path is None:
        from pydoc_data.topics import topics

        return "pydoc_data.topics", "\n\n".join(topics[name] for name in sorted(topics))
    try:
        return path.name, path.read_text(encoding="utf-8")
    except OSError as e:
        raise StartupError(f"--corpus {path}: {e.strerror}") from None
    except UnicodeDecodeError as e:
        raise StartupError(f"--corpus {path}: not UTF-8 text: {e}") from None


class Prompts:
    """Prompts that begin like no other, so that no accidental cache hit flatters a figure."""

    def __init__(self, tokenizer: Any, corpus: Path | None = None):
        """`tokenizer` is one of mlx-lm's."""
        self._tokenizer = tokenizer
        name, self._text = read_corpus(corpus)
        if not self._text.strip():
            raise StartupError(f"--corpus {name}: there is no text in it")
        self._start = 0
        self._number = 0

    def text(self, tokens: int) -> str:
        """Return about as many tokens of the corpus, after a number of their own.

        They go on where the last ones ended.
        """
        self._number += 1
        for letters in (8, 32, 128):  # a token; a rule of dashes has many
            want = letters * tokens
            text = (self._text[self._start :] + self._text * (want // len(self._text) + 1))[:want]
            ids = self._encode(f"{self._number:04d} {text}")[:tokens]
            if len(ids) == tokens:
                break
        else:
            raise StartupError(
                f"{want:,} characters of --corpus make {len(ids)} tokens, not {tokens}: "
                "take another"
            )
        said: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        self._start = (self._start + len(said)) % len(self._text)
        return said

    def ids(self, tokens: int) -> list[int]:
        """Return exactly as many token ids, without a template."""
        ids = self._encode(self.text(tokens + 16))[:tokens]
        assert len(ids) == tokens
        return ids

    def messages(self, tokens: int) -> ChatMessages:
        """Return one user's message that renders to at most `tokens`, a few less at worst."""
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
        messages = [{"role": "user", "content": text}]
        while (count := self.count(messages)) > tokens:
            text = text[: -max(1, count - tokens)]
            messages = [{"role": "user", "content": text}]
        return messages

    def count(self, messages: ChatMessages) -> int:
        """Return how many tokens the rendered prompt has."""
        rendered = self._tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False
        )
        return len(self._encode(rendered))

    def check(self, messages: ChatMessages, reported: int) -> None:
        """Raise BenchError where a server counts other tokens than the tokenizer."""
        count = self.count(messages)
        if reported != count:
            raise BenchError(
                f"the server says {reported} prompt tokens where the tokenizer says {count}"
            )

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids


@dataclass(frozen=True)
class Windows:
    """How a corpus is cut into windows and scored, in tokens.

    Each window is a sequence of its own that starts from an empty cache.
    """

    window: int = 2048  # fed into one cache
    # from one window's start to the next one's; only a window's last `stride` tokens are scored
    stride: int = 2048
    tokens: int = 8192  # to score at least

    def __post_init__(self) -> None:
        if self.window < 2:
            raise StartupError(f"--window must be at least 2 tokens, is {self.window}")
        if not 1 <= self.stride <= self.window:
            raise StartupError(
                f"--stride must be from 1 to --window ({self.window}), is {self.stride}"
            )
        if self.tokens < 1:
            raise StartupError(f"--tokens must be at least 1, is {self.tokens}")

    @property
    def num_windows(self) -> int:
        return 1 + max(0, -(-(self.tokens - self.window) // self.stride))

    @property
    def num_scored(self) -> int:
        """Tokens scored in whole windows: all of the first, `stride` of each other one."""
        return self.window + (self.num_windows - 1) * self.stride


@dataclass(frozen=True)
class Window:
    """One window: `targets[i]` follows `inputs[i]`; those from `first_scored` on count."""

    inputs: list[int]
    targets: list[int]
    first_scored: int


def cut_windows(tokens: list[int], windows: Windows, bos: list[int]) -> Iterator[Window]:
    """Cut so that every token after the first is scored exactly once.

    window 4, stride 2, no BOS:   inputs 0 1 2 3  targets 1 2 3 4, all scored
                                  inputs 2 3 4 5  targets 3 4 5 6, scored 5 6

    `bos` is [] or the token that the model's sequences begin with. Models that know it are lost
    without, so it begins each window too, as one of its tokens; the very first token of the corpus
    is scored then as well. Raises StartupError where there are too few tokens.
    """
    need = windows.num_scored + 1 - len(bos)
    if len(tokens) < need:
        raise StartupError(
            f"the corpus has {len(tokens):,} tokens, {need:,} are needed: "
            "ask for fewer --tokens, or a longer --corpus"
        )
    for i in range(windows.num_windows):
        part = bos + tokens[i * windows.stride :][: windows.window + 1 - len(bos)]
        first_scored = 0 if i == 0 else windows.window - windows.stride
        yield Window(part[:-1], part[1:], first_scored)
