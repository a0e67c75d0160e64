"""A chat's tokens, in which nothing that a user, a tool or a system prompt writes is a special token.

A text that reads like a special token's name is broken up before the template sees it, by a character that no message
holds, and the rendered text is tokenized in pieces between those characters. What the assistant said is left as it is:
there the names are its own tokens (<think>, say).
"""

import json
from collections.abc import Iterable, Sequence
from typing import Any

_SENTINELS = range(0xE000, 0xF8FF)  # for private use


class PlainText:
    """Of one tokenizer, an mlx_lm TokenizerWrapper."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        added = json.loads(tokenizer.backend_tokenizer.to_str())["added_tokens"]
        self._names = sorted((t["content"] for t in added if len(t["content"]) > 1), key=len, reverse=True)

    def tokens(self, messages: Sequence[dict[str, Any]], **options: Any) -> list[int]:
        """Of the rendered chat, up to where an answer begins. jinja2.TemplateError: the template refuses it."""
        sentinel = _unused((*_texts(messages), *_texts(options)))
        if "tools" in options:
            options["tools"] = _map_texts(options["tools"], lambda t: self._hide(t, sentinel))
        hidden = [m if m["role"] == "assistant" else _map_text(m, lambda t: self._hide(t, sentinel)) for m in messages]
        text = self._tokenizer.apply_chat_template(hidden, add_generation_prompt=True, tokenize=False, **options)
        return [token for piece in text.split(sentinel) if piece for token in self.encode(piece)]

    def encode(self, text: str) -> list[int]:
        """A text in which special tokens' names are special tokens."""
        tokens: list[int] = self._tokenizer.encode(text, add_special_tokens=False, verbose=False)
        return tokens

    def _hide(self, text: str, sentinel: str) -> str:
        for name in self._names:
            text = text.replace(name, name[0] + sentinel + name[1:])
        return text


def _texts(value: Any) -> Iterable[str]:
    """Every text in a message, however deep."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from (*_texts(key), *_texts(inner))
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _texts(inner)


def _map_text(message: dict[str, Any], change: Any) -> dict[str, Any]:
    """What a message says and who says so; its role is the template's business."""
    return {k: change(v) if isinstance(v, str) and k != "role" else v for k, v in message.items()}


def _map_texts(value: Any, change: Any) -> Any:
    """With every text in it changed, however deep."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {_map_texts(key, change): _map_texts(inner, change) for key, inner in value.items()}
    return [_map_texts(inner, change) for inner in value] if isinstance(value, list) else value


def _unused(texts: Iterable[str]) -> str:
    used = {c for text in texts for c in text if ord(c) in _SENTINELS}
    return next(chr(c) for c in _SENTINELS if chr(c) not in used)
