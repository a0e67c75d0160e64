"""A chat, whatever wire format it came in, to the token ids that its messages render to."""

import asyncio
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from typing import Any

import numpy as np

from ..errors import ContextLengthExceeded, InvalidRequest
from .dates import is_dated, on_day
from .markup import Markup
from .messages import Chat, Message, Role, normalise
from .special_tokens import SpecialTokens
from .splice import Spliced, splice
from .template import ChatTemplate
from .token_bytes import TokenBytes
from .token_texts import TokenTexts

_LONGEST_HEADER = 64  # tokens by which a template asks for an answer


@dataclass(frozen=True)
class Prompt:
    """Token ids for the engine, and what is known of them."""

    tokens: list[int]
    # how many come before the part of the template that asks for an answer, if that is known:
    # later prompts have the answer's header there, but perhaps not what follows it (<think>, say)
    checkpoint: int | None = None
    in_reasoning: bool = False  # the answer begins within the reasoning
    continues_text: bool = False  # it is no chat, but a text that the answer goes on with


class ChatRenderer:
    """Renders messages with the model's chat template, in one thread: HF tokenizers are not
    re-entrant.
    """

    def __init__(self, tokenizer: Any, max_context: int, why_max: str = ""):
        """`tokenizer` is an mlx_lm TokenizerWrapper; `max_context` counts prompt and answer, in
        tokens.

        `why_max` says what sets it, if not the model.
        """
        self._tokenizer = tokenizer
        self._max_context, self._why_max = max_context, why_max
        self._token_bytes = TokenBytes(tokenizer)
        self._plain = SpecialTokens(tokenizer, self._token_bytes)
        self._template = ChatTemplate(tokenizer)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenizer")

    @property
    def markup(self) -> Markup:
        """Of the answers."""
        return self._template.markup

    async def prompt(
        self, chat: Chat, branches: Sequence[np.ndarray] = (), days: Sequence[date] = ()
    ) -> Prompt:
        """Return the prompt of a chat: the one road from what was said to token ids.

        `branches` and `days` are as in `render`. InvalidRequest names what of the chat can't be
        read; the rest is raised as there.
        """
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self._prompt, chat, branches, days)

    def _prompt(self, chat: Chat, branches: Sequence[np.ndarray], days: Sequence[date]) -> Prompt:
        messages = normalise(chat.messages, known=chat.known)
        tokens = self._render(
            messages, branches, chat.tools, chat.options, days, chat.generation_prompt
        )
        self._check_length(tokens)
        if not chat.generation_prompt:
            return Prompt(tokens)
        checkpoint = self._before_answer(tokens, chat.options)
        return Prompt(tokens, checkpoint, self._template.ends_in_reasoning(tokens))

    async def render(
        self,
        messages: Sequence[Message],
        branches: Sequence[np.ndarray] = (),
        *,
        tools: Sequence[dict[str, Any]] = (),
        options: Mapping[str, Any] | None = None,
        days: Sequence[date] = (),
        generation_prompt: bool = True,
    ) -> list[int]:
        """The prompt's token ids, up to where the assistant's answer begins, with room for at least
        one more.

        Without a generation prompt, up to where the last message ends.

        A last message of the assistant's is history like any other: the answer is a new message
        after it. `branches`: token ids that the agent has cached; they are kept as far as their
        text is the prompt's, see splice.py. `options` are the template's own, such as
        enable_thinking. `days`: whose date a template with a date may bear, see dates.py; by
        default today's. Raises InvalidRequest (no template, or one that refuses or ignores what is
        given) and ContextLengthExceeded.
        """
        loop = asyncio.get_running_loop()
        given = (messages, branches, tools, options or {}, days, generation_prompt)
        tokens = await loop.run_in_executor(self._thread, self._render, *given)
        self._check_length(tokens)
        return tokens

    async def text_tokens(
        self, text: str, branches: Sequence[np.ndarray] = (), *, begins: bool = False
    ) -> list[int]:
        """Return the tokens of a text that is rendered already; `branches` as in `render`.

        `begins`: the tokens begin as the model's prompts do, with what its tokenizer puts before
        a text (a BOS token, say), unless the text begins so itself.
        """
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(
            self._thread,
            lambda: (
                splice(self._token_bytes, self._plain.encode(text, begins=begins), branches).tokens
            ),
        )

    async def token_texts(self) -> TokenTexts:
        """Return what tells the text of token after token."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(
            self._thread, TokenTexts, self._tokenizer, self._token_bytes
        )

    def _check_length(self, tokens: list[int]) -> None:
        if len(tokens) >= self._max_context:
            raise ContextLengthExceeded(len(tokens), self._max_context, self._why_max)

    def _before_answer(self, tokens: Sequence[int], options: Mapping[str, Any]) -> int | None:
        asked = self._template.asks_for_answer(options)
        if not asked or not self._token_bytes.is_known:
            return None
        end = np.asarray(tokens[-_LONGEST_HEADER:], np.int64)
        data, ends = self._token_bytes.of_tokens(end)
        if not data.endswith(asked.encode()):
            return None
        before = len(data) - len(asked.encode())
        at = int(np.searchsorted(ends, before))
        return len(tokens) - len(end) + at + 1 if at < len(ends) and ends[at] == before else None

    async def message_starts(self, tokens: Sequence[int]) -> list[int]:
        """Where each message of a rendered chat starts; one that the template put in (a system
        prompt) counts too.

        Raises InvalidRequest where the template's messages can't be told apart by their tokens.
        """
        loop = asyncio.get_running_loop()
        headers = await loop.run_in_executor(self._thread, self._message_headers)
        packed, found = np.array(tokens, "<u4").tobytes(), {0}
        for header in headers:
            wanted, at = np.array(header, "<u4").tobytes(), -1
            while (at := packed.find(wanted, at + 1)) >= 0:
                if at % 4 == 0:
                    found.add(at // 4)
        return sorted(found)

    def _message_headers(self) -> list[list[int]]:
        """The tokens between two messages' contents, for an answer and for the user's turn after
        it.

        Found by changing one content at a time, by one token, and looking for where the rendered
        tokens change.
        """
        for one, other in (("1", "2"), ("hello", "world")):
            base = self._probe([one, one, one])
            ends = [
                _first_difference(base, self._probe([*[one] * i, other, *[one] * (2 - i)]))
                for i in range(3)
            ]
            if ends[0] < ends[1] - 1 and ends[1] < ends[2] - 1 < len(base):
                asked = self._probe([one], add_generation_prompt=True)[ends[0] + 1 :]
                answer = base[ends[0] + 1 : ends[1]]
                answer = answer[
                    : _first_difference(answer, asked)
                ]  # without what is put into old answers only
                if answer:
                    return [answer, base[ends[1] + 1 : ends[2]]]
        raise InvalidRequest(
            "With this model's chat template messages can't be told apart in the cache; give tokens instead.",
            param="messages",
        )

    def _probe(self, contents: list[str], **options: bool) -> list[int]:
        roles: list[Role] = ["user", "assistant", "user"]
        messages = [Message(role, content) for role, content in zip(roles, contents, strict=False)]
        return list(
            self._tokenizer.apply_chat_template(
                self._template.dicts(messages), tokenize=True, **options
            )
        )

    def _render(
        self,
        messages: Sequence[Message],
        branches: Sequence[np.ndarray],
        tools: Sequence[dict[str, Any]],
        options: Mapping[str, Any],
        days: Sequence[date] = (),
        generation_prompt: bool = True,
    ) -> list[int]:
        self._template.check(messages, tools, options)
        source = self._tokenizer.chat_template
        dated = isinstance(source, str) and is_dated(source)
        as_of = [{"chat_template": on_day(source, day)} for day in days] if dated else []
        best: Spliced | None = None
        for template in as_of or [{}]:
            tokens = self._apply_template(
                messages, tools, {**options, **template}, generation_prompt
            )
            found = splice(self._token_bytes, tokens, branches)
            if best is None or found.common_bytes > best.common_bytes:
                best = found
        assert best is not None
        return best.tokens

    def _apply_template(
        self,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]],
        options: Mapping[str, Any],
        generation_prompt: bool,
    ) -> list[int]:
        if not messages:
            raise InvalidRequest("There are no messages.", param="messages")
        if not self._tokenizer.has_chat_template:
            raise InvalidRequest(
                "This model has no chat template, so it can't take messages; serve its instruct or chat variant.",
                param="messages",
            )
        given = {**options, "tools": list(tools)} if tools else options
        tokens = self._template.render(
            messages, lambda dicts: self._plain.tokens(dicts, generation_prompt, **given)
        )
        if not tokens:
            raise InvalidRequest("The messages render to an empty prompt.", param="messages")
        return list(tokens)


def _first_difference(a: Sequence[int], b: Sequence[int]) -> int:
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )
