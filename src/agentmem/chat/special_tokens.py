"""A chat's tokens, in which nothing that somebody writes is a special token.

What a user, a tool or a system prompt writes may read like a special token's name. It is marked
before the template sees it, by a character that no message holds. The rendered text is tokenized
without the marks; of the special tokens found in it, those that were marked are spelled in ordinary
tokens. What the assistant said is left as it is: there the names are its own tokens (<think>, say).
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

from ..errors import InvalidRequest
from .marked_text import MarkedText
from .template import source_of
from .token_bytes import TokenBytes

_MARKS = range(0xE000, 0xF8FF)  # for private use
# of mlx_lm's TokenizerWrapper
_MARKERS = ("think_start", "think_end", "tool_call_start", "tool_call_end")


class SpecialTokens:
    """The special tokens of one tokenizer, and texts that must not hold them."""

    def __init__(self, tokenizer: Any, token_bytes: TokenBytes):
        """`tokenizer` is an mlx_lm TokenizerWrapper."""
        self._tokenizer = tokenizer
        self._token_bytes = token_bytes
        added = json.loads(tokenizer.backend_tokenizer.to_str())["added_tokens"]
        self._added = {t["content"]: t["id"] for t in added}
        markers = {getattr(tokenizer, name, None) for name in _MARKERS}
        template = source_of(tokenizer)

        def is_markup(name: str) -> bool:
            """Return whether a token is special though it is not called so.

            DeepSeek's roles and the tags around tools' results are. Other added tokens are ordinary
            words: Gemma's are tags of HTML and runs of spaces.
            """
            if name in markers:
                return True
            return bool(name.strip()) and (name in template or "|" in name or "｜" in name)

        names = {t["content"] for t in added if t["special"] or is_markup(t["content"])}
        self._names = sorted((name for name in names if len(name) > 1), key=len, reverse=True)

    def tokens(
        self,
        messages: Sequence[dict[str, Any]],
        options: Mapping[str, Any],
        *,
        generation_prompt: bool = True,
    ) -> list[int]:
        """Return the tokens of what `render` returns."""
        return self.encode_marked(
            self.render(messages, options, generation_prompt=generation_prompt)
        )

    def render(
        self,
        messages: Sequence[dict[str, Any]],
        options: Mapping[str, Any],
        *,
        generation_prompt: bool = True,
    ) -> MarkedText:
        """Return the rendered chat, up to where an answer begins.

        Without a generation prompt it ends where the last message does. `options` are the
        template's, tools among them. jinja2.TemplateError: the template refuses the chat.
        """
        mark = unused((*_texts(messages), *_texts(options)))
        given = {**options, "add_generation_prompt": generation_prompt, "tokenize": False}
        if "tools" in given:
            given["tools"] = _map_texts(given["tools"], lambda text: self._mark(text, mark))
        marked = [self._mark_message(message, mark) for message in messages]
        return MarkedText(self._tokenizer.apply_chat_template(marked, **given), mark)

    def encode(self, text: str, *, begins: bool = False) -> list[int]:
        """Return the tokens of a text in which special tokens' names are special tokens.

        `begins`: with what the tokenizer adds to a whole text, unless the text begins so itself.
        """
        bos = self._tokenizer.bos_token
        add = begins and (bos is None or not text.startswith(bos))
        tokens: list[int] = self._tokenizer.encode(text, add_special_tokens=add, verbose=False)
        return tokens

    def encode_marked(self, marked: MarkedText) -> list[int]:
        """Return the tokens of a rendered chat, in which what is marked is no special token."""
        pieces = marked.text.split(marked.mark)
        if len(pieces) == 1:
            return self.encode(marked.text)
        starts = set()
        at = 0
        for piece in pieces[:-1]:
            at += len(piece)
            starts.add(at - 1)  # the mark stands behind the first character
        plain = "".join(pieces)
        found = [(m.start(), self._added[m.group()]) for m in self._pattern.finditer(plain)]
        tokens = self.encode(plain)
        special = [token for token in tokens if token in self._ids]
        if not self._token_bytes.is_known or special != [token for _, token in found]:
            return [token for piece in pieces if piece for token in self.encode(piece)]
        positions = iter(start for start, _ in found)
        spelled: list[int] = []
        for token in tokens:
            is_marked = token in self._ids and next(positions) in starts
            spelled += self._token_bytes.spell(token) if is_marked else [token]
        return spelled

    def _mark_message(self, message: dict[str, Any], mark: str) -> dict[str, Any]:
        """Mark what a message says and who says so; its role is the template's business.

        Of the assistant's only what tools returned is marked.
        """

        def marked(value: Any) -> Any:
            return _map_texts(value, lambda text: self._mark(text, mark))

        if message["role"] == "assistant":
            told = {name: message[name] for name in ("tool_responses",) if name in message}
            return {**message, **{name: marked(value) for name, value in told.items()}}
        return {name: value if name == "role" else marked(value) for name, value in message.items()}

    def _mark(self, text: str, mark: str) -> str:
        for name in self._names:
            text = text.replace(name, name[0] + mark + name[1:])
        return text

    @cached_property
    def _ids(self) -> frozenset[int]:
        return frozenset(self._added.values())

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        """Added tokens in a text, as a tokenizer finds them: from the left, the longest."""
        longest_first = sorted(self._added, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _texts(value: Any) -> Iterable[str]:
    """Yield every text in a message, however deep."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from (*_texts(key), *_texts(inner))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(inner)


def _map_texts(value: Any, change: Any) -> Any:
    """Return a value with every text in it changed, however deep."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {_map_texts(key, change): _map_texts(inner, change) for key, inner in value.items()}
    return [_map_texts(inner, change) for inner in value] if isinstance(value, list) else value


def unused(texts: Iterable[str]) -> str:
    """Return a character for private use that is in none of the texts. InvalidRequest: none is."""
    used = set().union(*texts)
    mark = next((chr(c) for c in _MARKS if chr(c) not in used), None)
    if mark is None:
        message = "messages: they hold every character for private use; leave one out."
        raise InvalidRequest(message, param="messages")
    return mark
