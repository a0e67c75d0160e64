"""A corpus cut into windows, each a sequence of its own that starts from an empty cache."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import StartupError


@dataclass(frozen=True)
class Protocol:
    """How a corpus is scored, in tokens."""

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
    """`targets[i]` is the token that follows `inputs[i]`; those from `first_scored` on count."""

    inputs: list[int]
    targets: list[int]
    first_scored: int


def cut_windows(tokens: list[int], protocol: Protocol, bos: list[int]) -> Iterator[Window]:
    """Every token after the first is scored exactly once. Raises StartupError where there are too
    few.

    window 4, stride 2, no BOS:   inputs 0 1 2 3  targets 1 2 3 4, all scored
                                  inputs 2 3 4 5  targets 3 4 5 6, scored 5 6

    `bos`: [] or the token that the model's sequences begin with. Models that know it are lost
    without, so it begins each window too, as one of its tokens; the very first token of the corpus
    is scored then as well.
    """
    need = protocol.num_scored + 1 - len(bos)
    if len(tokens) < need:
        raise StartupError(
            f"the corpus has {len(tokens):,} tokens, {need:,} are needed: ask for fewer --tokens, or a longer --corpus"
        )
    for i in range(protocol.num_windows):
        part = bos + tokens[i * protocol.stride :][: protocol.window + 1 - len(bos)]
        yield Window(part[:-1], part[1:], 0 if i == 0 else protocol.window - protocol.stride)


def read_corpus(path: Path | None) -> tuple[str, str]:
    """(name, text) of a file in UTF-8, by default of the help on Python's language that every
    Python carries.
    """
    if path is None:
        from pydoc_data.topics import topics

        return "pydoc_data.topics", "\n\n".join(topics[name] for name in sorted(topics))
    try:
        return path.name, path.read_text(encoding="utf-8")
    except OSError as e:
        raise StartupError(f"--corpus {path}: {e.strerror}") from None
    except UnicodeDecodeError as e:
        raise StartupError(f"--corpus {path}: not UTF-8 text: {e}") from None
