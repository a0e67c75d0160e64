"""The bytes that each token of a vocabulary stands for in the text that it decodes to.

Known are byte-level BPE (Qwen, Llama 3, DeepSeek, gpt-oss, SmolLM ...) and SentencePiece with byte
fallback (Gemma, Mistral, Llama 2 ...). Other tokenizers decode a token by what stands beside it, so
that a text can't be cut there.
"""

import json
import re
from functools import cached_property
from typing import Any

import numpy as np

_SPACE = "\u2581"  # SentencePiece's
_UNKNOWN = b"\xff"  # in no text
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class TokenBytes:
    """The bytes of one tokenizer's tokens."""

    def __init__(self, tokenizer: Any):
        """`tokenizer` is an mlx_lm TokenizerWrapper, or a fast one of transformers."""
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        vocabulary: dict[str, int] = tokenizer.get_vocab()
        self._added = {t["content"]: t["id"] for t in backend["added_tokens"]}
        self._names = {i: name for name, i in vocabulary.items() if name not in self._added}
        self._to_bytes = _decoder(backend["decoder"])
        self._texts: dict[int, str] = {}  # by token, of those that were asked for
        # found in text by name, before all others
        self.atomic_ids = np.array(sorted(self._added.values()), np.int64)

    @property
    def is_known(self) -> bool:
        """Whether tokens decode to bytes one by one."""
        return self._to_bytes is not None

    def of_tokens(self, tokens: np.ndarray) -> tuple[bytes, np.ndarray]:
        """Return the bytes of tokens, int64 [n], and where those of each end, int64 [n]."""
        at = np.minimum(tokens, len(self._table) - 1)
        data = b"".join(map(self._table.__getitem__, at.tolist()))
        return data, np.cumsum(self._lengths[at], dtype=np.int64)

    def of_token(self, token: int) -> bytes:
        """Return the bytes of one token."""
        return self._table[min(token, len(self._table) - 1)]

    def text(self, token: int) -> str:
        """Return the text of one token; bytes that are no whole character by their names."""
        text = self._texts.get(token)
        if text is None:
            text = self._texts[token] = _named(self.of_token(token))
        return text

    def spell(self, token: int) -> list[int]:
        """Return a special token's name in ordinary tokens."""
        rest = self._table[token]
        spelled = []
        while rest:
            piece = next(rest[:n] for n in range(len(rest), 0, -1) if rest[:n] in self._ordinary)
            spelled.append(self._ordinary[piece])
            rest = rest[len(piece) :]
        return spelled

    @cached_property
    def _ordinary(self) -> dict[bytes, int]:
        """Ordinary tokens by what they stand for.

        Every byte has a token of its own; where it has two, the one that is no mere byte.
        """
        assert self._to_bytes is not None

        def mere_bytes_first(item: tuple[int, str]) -> tuple[bool, int]:
            token, name = item
            return _BYTE.fullmatch(name) is None, token

        names = sorted(self._names.items(), key=mere_bytes_first)
        return {self._to_bytes(name): token for token, name in names}

    @cached_property
    def _lengths(self) -> np.ndarray:
        return np.array([len(text) for text in self._table], np.int64)

    @cached_property
    def _table(self) -> list[bytes]:
        """Bytes by token; the last ones are of all tokens beyond."""
        assert self._to_bytes is not None
        table = [_UNKNOWN] * (max([*self._names, *self._added.values()], default=-1) + 2)
        for token, name in self._names.items():
            table[token] = self._to_bytes(name)
        for content, token in self._added.items():
            table[token] = content.encode()
        return table


def _named(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _decoder(spec: Any) -> Any:
    """Return a function from a token's name to its bytes, by a tokenizer's decoder; or None.

    `spec` is the tokenizer's own description of its decoder.
    """
    if spec is None:
        return None
    steps = spec["decoders"] if spec["type"] == "Sequence" else [spec]
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return _byte_level
    known = {"Replace", "ByteFallback", "Fuse", "Strip"}
    if "ByteFallback" in kinds and kinds[0] == "Replace" and known.issuperset(kinds):
        return _sentence_piece
    return None


def _byte_level(name: str) -> bytes:
    return b"".join(_BYTE_OF.get(c, c.encode()) for c in name)


def _sentence_piece(name: str) -> bytes:
    if found := _BYTE.fullmatch(name):
        return bytes([int(found.group(1), 16)])
    return name.replace(_SPACE, " ").encode()


def _bytes_by_character() -> dict[str, bytes]:
    """Return GPT-2's alphabet of bytes.

    Printable Latin-1 stands for itself, the characters from U+0100 on for the other bytes.
    """
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [b for b in range(256) if b not in printable]
    characters = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
    return {c: bytes([b]) for c, b in characters.items()}


_BYTE_OF = _bytes_by_character()
