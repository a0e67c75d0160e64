"""The one road from a chat, whatever wire format it came in, to the engine's token ids."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from typing import Any, Literal, TypeVar

import numpy as np

from ..errors import ContextLengthExceeded, InvalidRequest
from ..tensors import common_prefix
from .dates import is_dated, on_day
from .grammar import (
    Constraint,
    Constraints,
    ContentFormat,
    ToolChoice,
    callable_tools,
    text_grammar,
)
from .marked_text import MarkedText
from .markup import Markup
from .messages import Chat, Message, Role
from .normalise import normalise
from .special_tokens import SpecialTokens, unused
from .splice import splice
from .template import ChatTemplate
from .token_bytes import TokenBytes
from .token_texts import TokenTexts

T = TypeVar("T")
# where a prompt ends: where an answer begins, where the last message ends, or within that message
End = Literal["answer", "message", "inside"]
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
    """Renders messages with the model's chat template.

    It does so in one thread, since Hugging Face's tokenizers are not re-entrant.
    """

    def __init__(
        self,
        tokenizer: Any,
        max_context: int,
        why_max: str = "",
        *,
        generic_tools: bool = True,
    ):
        """`tokenizer` is an mlx_lm TokenizerWrapper.

        `max_context` counts prompt and answer, in tokens; `why_max` says what sets it, if not the
        model.
        """
        self._tokenizer = tokenizer
        self._max_context = max_context
        self._why_max = why_max
        self._token_bytes = TokenBytes(tokenizer)
        self._special_tokens = SpecialTokens(tokenizer, self._token_bytes)
        self._template = ChatTemplate(tokenizer, generic_tools=generic_tools)
        self._constraints = Constraints(self._template, tokenizer)
        self._drops_blank: bool | None = None  # None: not looked at yet
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenizer")

    @property
    def markup(self) -> Markup:
        """How answers are marked up."""
        return self._template.markup

    async def takes_tools(self) -> bool:
        """Tell whether the model gets to know of a chat's tools."""
        if not self._tokenizer.has_chat_template:
            return False
        return await self._in_thread(lambda: self._template.takes_tools)

    async def prompt(
        self, chat: Chat, branches: Sequence[np.ndarray] = (), days: Sequence[date] = ()
    ) -> Prompt:
        """Return the prompt of a chat: the one road from what was said to token ids.

        `branches` and `days` are as in `render`. InvalidRequest names what of the chat can't be
        read; the rest is raised as there.
        """
        return await self._in_thread(partial(self._prompt, chat, branches, days))

    def _prompt(self, chat: Chat, branches: Sequence[np.ndarray], days: Sequence[date]) -> Prompt:
        messages = normalise(chat.messages, known=chat.known)
        tokens = self._render(
            messages,
            branches,
            tools=chat.tools,
            options=chat.options,
            days=days,
            end=_end_of(chat),
        )
        if chat.continues:
            is_open = self._template.opens_reasoning(messages[-1].content)
            in_reasoning = is_open or self._template.ends_in_reasoning(tokens)
            return Prompt(tokens, in_reasoning=in_reasoning, continues_text=True)
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
        """Return the prompt's token ids, which leave room for at least one more.

        They end where the assistant's answer begins, or, without a generation prompt, where the
        last message ends. A last message of the assistant's is history like any other: the answer
        is a new message after it.

        `branches`: token ids that the agent has cached; they are kept as far as their text is the
        prompt's, see splice.py. `options` are the template's own, such as enable_thinking. `days`:
        whose date a template with a date may bear, see dates.py; by default today's.

        Raises InvalidRequest (no template, or one that refuses or ignores what is given) and
        ContextLengthExceeded.
        """
        work = partial(
            self._render,
            messages,
            branches,
            tools=tools,
            options=options or {},
            days=days,
            end="answer" if generation_prompt else "message",
        )
        return await self._in_thread(work)

    async def text_tokens(
        self, text: str, branches: Sequence[np.ndarray] = (), *, begins: bool = False
    ) -> list[int]:
        """Return the tokens of a text that is rendered already; `branches` as in `render`.

        `begins`: the tokens begin as the model's prompts do, with what its tokenizer puts before
        a text (a BOS token, say), unless the text begins so itself.
        """

        def work() -> list[int]:
            tokens = self._special_tokens.encode(text, begins=begins)
            return splice(self._token_bytes, tokens, branches).tokens

        return await self._in_thread(work)

    async def constraint(
        self,
        tools: Sequence[dict[str, Any]],
        choice: ToolChoice,
        content: ContentFormat | None,
        *,
        prompt: Prompt,
    ) -> Constraint:
        """Return the grammar that a prompt's answer is held to, and the markup to read it by.

        InvalidRequest: a call is asked for that can't be, or what can't be held to.
        """
        if content is None and not (callable_tools(tools, choice) and choice.is_narrow):
            return Constraint(None, self.markup)
        goes_on = prompt.continues_text and not prompt.in_reasoning
        if goes_on and content is not None and choice.mode != "required":
            return Constraint(text_grammar(content), self.markup)

        def work() -> Constraint:
            return self._constraints.of(
                tools,
                choice,
                content,
                in_reasoning=prompt.in_reasoning,
                prompt_end=self._tokenizer.decode(prompt.tokens[-16:]),
            )

        return await self._in_thread(work)

    async def token_names(self, tokens: Sequence[int]) -> list[str]:
        """Return the tokens as the vocabulary spells them."""
        names: list[str] = await self._in_thread(
            partial(self._tokenizer.convert_ids_to_tokens, list(tokens))
        )
        return names

    async def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens, special ones by their names."""
        text: str = await self._in_thread(partial(self._tokenizer.decode, list(tokens)))
        return text

    async def token_texts(self, after: int | None = None) -> TokenTexts:
        """Return what tells the text of token after token; `after`: the one before the first."""
        if self._drops_blank is None:
            self._drops_blank = await self._in_thread(self._looks_at_blank)
        return TokenTexts(
            self._tokenizer,
            self._token_bytes,
            self._in_thread,
            after,
            drops_blank=self._drops_blank,
        )

    def _looks_at_blank(self) -> bool:
        """Tell whether mlx-lm drops the blank at the beginning of an answer's text."""
        if not self._token_bytes.is_known:
            return False
        tokens = self._tokenizer.encode(" a", add_special_tokens=False)
        detokenizer = self._tokenizer.detokenizer
        for token in tokens:
            detokenizer.add_token(token)
        detokenizer.finalize()
        data, _ = self._token_bytes.of_tokens(np.array(tokens, np.int64))
        return len(detokenizer.text) < len(data)

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def _before_answer(self, tokens: Sequence[int], options: Mapping[str, Any]) -> int | None:
        """Return how many tokens come before the part of the template that asks for an answer.

        None: it is not known, or that part does not begin where a token does.
        """
        asked = self._template.asks_for_answer(options).encode()
        if not asked or not self._token_bytes.is_known:
            return None
        end = np.asarray(tokens[-_LONGEST_HEADER:], np.int64)
        data, ends = self._token_bytes.of_tokens(end)
        if not data.endswith(asked):
            return None
        before = len(data) - len(asked)
        at = int(np.searchsorted(ends, before))
        if at == len(ends) or ends[at] != before:
            return None
        return len(tokens) - len(end) + at + 1

    async def message_starts(self, tokens: Sequence[int]) -> list[int]:
        """Return where each message of a rendered chat starts, in tokens.

        One that the template put in (a system prompt) counts too. Raises InvalidRequest where the
        template's messages can't be told apart by their tokens.
        """
        headers = await self._in_thread(self._message_headers)
        packed = np.array(tokens, "<u4").tobytes()
        found = {0}
        for header in headers:
            wanted = np.array(header, "<u4").tobytes()
            at = -1
            while (at := packed.find(wanted, at + 1)) >= 0:
                if at % 4 == 0:
                    found.add(at // 4)
        return sorted(found)

    def _message_headers(self) -> list[list[int]]:
        """Return the tokens before an answer's content, and before the user's next content.

        They are found by changing one content at a time, by one token, and looking for where the
        rendered tokens change.
        """
        for one, other in (("1", "2"), ("hello", "world")):
            base = self._probe([one, one, one])
            first = _first_difference(base, self._probe([other, one, one]))
            second = _first_difference(base, self._probe([one, other, one]))
            third = _first_difference(base, self._probe([one, one, other]))
            if first < second - 1 and second < third - 1 < len(base):
                asked = self._probe([one], add_generation_prompt=True)[first + 1 :]
                answer = base[first + 1 : second]
                # without what is put into old answers only
                answer = answer[: _first_difference(answer, asked)]
                if answer:
                    return [answer, base[second + 1 : third]]
        message = (
            "With this model's chat template messages can't be told apart in the cache; "
            "give tokens instead."
        )
        raise InvalidRequest(message, param="messages")

    def _probe(self, contents: list[str], **options: bool) -> list[int]:
        roles: list[Role] = ["user", "assistant", "user"]
        messages = [Message(role, content) for role, content in zip(roles, contents, strict=False)]
        dicts = self._template.dicts(messages)
        return list(self._tokenizer.apply_chat_template(dicts, tokenize=True, **options))

    def _render(
        self,
        messages: Sequence[Message],
        branches: Sequence[np.ndarray],
        *,
        tools: Sequence[dict[str, Any]],
        options: Mapping[str, Any],
        days: Sequence[date] = (),
        end: End = "answer",
    ) -> list[int]:
        if not self._tokenizer.has_chat_template:
            message = (
                "This model has no chat template, so it can't take messages. Serve its instruct or "
                "chat variant, put a template into chat_template.jinja in its directory, or send "
                "text to /v1/completions."
            )
            raise InvalidRequest(message, param="messages")
        self._template.check(messages, tools, options)
        source = self._tokenizer.chat_template
        as_of: list[dict[str, Any]] = [{}]
        if days and isinstance(source, str) and is_dated(source):
            as_of = [{"chat_template": on_day(source, day)} for day in days]
        spliced = []
        for template in as_of:
            given = {**options, **template}
            tokens = self._apply_template(messages, tools, given, end)
            spliced.append(splice(self._token_bytes, tokens, branches))
        best = max(spliced, key=lambda found: found.common_bytes)  # of several, the newest day
        if len(best.tokens) >= self._max_context:
            raise ContextLengthExceeded(len(best.tokens), self._max_context, self._why_max)
        return best.tokens

    def _apply_template(
        self,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]],
        options: Mapping[str, Any],
        end: End,
    ) -> list[int]:
        if not messages:
            raise InvalidRequest("There are no messages.", param="messages")

        def render(dicts: list[dict[str, Any]], given: list[dict[str, Any]]) -> MarkedText:
            return self._special_tokens.render(
                dicts,
                {**options, "tools": given} if given else options,
                generation_prompt=end == "answer",
            )

        if end == "inside":
            text = self._open_ended(messages, render, tools)
        else:
            text = self._template.render(messages, render, tools)
        tokens = self._special_tokens.encode_marked(text)
        if not tokens:
            raise InvalidRequest("The messages render to an empty prompt.", param="messages")
        return tokens

    def _open_ended(
        self,
        messages: Sequence[Message],
        render: Callable[[list[dict[str, Any]], list[dict[str, Any]]], MarkedText],
        tools: Sequence[dict[str, Any]],
    ) -> MarkedText:
        """Return the chat up to the end of what its last message says.

        What the template puts behind that is told by a character that nobody wrote.
        """
        last = messages[-1]
        if last.role != "assistant" or last.tool_calls:
            message = "An answer can go on only from a message of the assistant's without calls."
            raise InvalidRequest(message, param="messages")
        sentinel = unused(message.content for message in messages)
        opened = replace(last, content=last.content + sentinel)
        text = self._template.render([*messages[:-1], opened], render, tools)
        try:
            return text.before(sentinel)
        except LookupError:
            message = "This model's chat template has no place where the last message could go on."
            raise InvalidRequest(message, param="messages") from None


def _end_of(chat: Chat) -> End:
    if chat.continues:
        return "inside"
    return "answer" if chat.generation_prompt else "message"


def _first_difference(a: list[int], b: list[int]) -> int:
    return common_prefix(np.array(a), np.array(b))
