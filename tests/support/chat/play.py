"""Plays a conversation through a family: what is rendered and what the model generates, request by
request.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from itertools import chain
from typing import Any

from transformers.utils import chat_template_utils

from support.chat.answers import WRITERS, Answer
from support.chat.conversations import CONVERSATIONS
from support.chat.families import added_pattern, added_tokens, encode, encode_rest, tokenizer_of
from support.chat.normal import normalise
from support.chat.recorder import Message, Request

# stands behind the first character of what a user wrote like a special token, in Step.marked
FORGED = "\ue000"
_TOOLS = (
    "tool_call",
    "tool_chain",
    "parallel_tools",
    "compact_arguments",
    "arguments_both_ways",
    "openai_ids",
)
_TOOLS += ("null_content", "sampled_chain")
_PLAIN = ("qwen3-instruct", "llama3", "gemma3", "mistral", "mistral-v1", "smollm2")
_NO_THOUGHTS = "it writes no thoughts that a client could send back"
_NO_TOOLS = "its template knows no tools"
_DUMMY_SPACE = "each piece of text tokenized alone would begin with a dummy space"
_ONE_CALL = "its template refuses more than one tool call at a time"

# (family, conversation): why the pair is left out. The real templates refuse these, or lose
# messages.
SKIPPED: dict[tuple[str, str], str] = {
    **{
        (family, name): _NO_TOOLS
        for family in ("gemma3", "smollm2", "mistral-v1")
        for name in _TOOLS
    },
    **{(family, "reasoning_inline"): _NO_THOUGHTS for family in _PLAIN},
    ("llama3", "parallel_tools"): _ONE_CALL,
    ("gpt-oss", "reasoning_inline"): "its thoughts have a channel of their own",
    ("gpt-oss", "parallel_tools"): "only the first of several tool calls is rendered",
    ("gpt-oss", "middle_system"): "a system message in the middle is not rendered",
    ("gemma3", "middle_system"): "system only at the start",
    ("mistral", "middle_system"): "system only at the start",
    ("mistral", "openai_ids"): "tool call ids must have 9 letters or digits",
    ("mistral-v1", "middle_system"): "system only at the start",
    **{
        ("mistral-v1", name): _DUMMY_SPACE
        for name in ("sampled_seams", "sampled_chain", "sampled_thoughts")
    },
}


@dataclass(frozen=True)
class Step:
    """One request, as the family's template renders it, and the answer.

    The branch that it leaves behind is `rendered + generated` as text. `prompt_ids` are the tokens
    of `rendered` when it is tokenized as a whole; a server may process other ones (stored ids of
    earlier branches) of the same text.
    """

    family: str
    conversation: str
    index: int
    messages: list[Message]  # as the client sent them
    tools: list[dict[str, Any]] | None
    template_kwargs: dict[str, Any]
    today: str
    rendered: str  # with the generation prompt
    # the same with FORGED in it, so that a special token and its look-alike in a message differ
    marked: str
    prompt_ids: tuple[int, ...]
    answer: Answer
    generated: str  # the answer as the model writes it, with its end token
    generated_ids: tuple[int, ...]


@contextmanager
def frozen_date(today: str) -> Iterator[None]:
    """Make strftime_now of templates tell another day, in one thread at a time."""

    class Frozen(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime.fromisoformat(today)

    real = chat_template_utils.datetime
    chat_template_utils.datetime = Frozen
    try:
        yield
    finally:
        chat_template_utils.datetime = real


def render(
    family: str, messages: list[Message], tools: Any, today: str, kwargs: dict[str, Any]
) -> str:
    with frozen_date(today):
        return tokenizer_of(family).apply_chat_template(
            messages, tools=tools, add_generation_prompt=True, tokenize=False, **kwargs
        )


def supported(family: str) -> list[str]:
    return [name for name in CONVERSATIONS if (family, name) not in SKIPPED]


def play(
    family: str, conversation: str, normaliser: Callable[[list[Message]], list[Message]] = normalise
) -> Iterator[Step]:
    """The steps of a conversation that SKIPPED does not name.

    `normaliser` makes the messages that a template takes out of those that the client sent.
    """
    for index, request in enumerate(CONVERSATIONS[conversation]):
        messages = normaliser(request.messages)
        rendered = render(family, messages, request.tools, request.today, request.template_kwargs)
        generated, end = WRITERS[family](request.answer, rendered)
        yield Step(
            family=family,
            conversation=conversation,
            index=index,
            messages=request.messages,
            tools=request.tools,
            template_kwargs=request.template_kwargs,
            today=request.today,
            rendered=rendered,
            marked=_marked(family, messages, request, rendered),
            prompt_ids=tuple(encode(family, rendered)),
            answer=request.answer,
            generated=generated + ("" if request.answer.cut else end),
            generated_ids=tuple(_generate(family, generated, end, request.answer)),
        )


def _generate(family: str, text: str, end: str, answer: Answer) -> list[int]:
    tokens = [
        token
        for piece in pieces(family, text, answer.piece)
        for token in encode_rest(family, piece)
    ]
    return tokens if answer.cut else tokens + encode_rest(family, end)


def pieces(family: str, text: str, size: int) -> list[str]:
    """Pieces that the sampler's tokens do not cross: `size` characters each, added tokens whole.
    All of it for 0.
    """
    if not size:
        return [text]
    parts = re.split(f"({added_pattern(family).pattern})", text)
    whole = added_tokens(family)
    return list(
        chain(
            *(
                [part] if part in whole else [part[i : i + size] for i in range(0, len(part), size)]
                for part in parts
            )
        )
    )


def _marked(family: str, messages: list[Message], request: Request, rendered: str) -> str:
    marked = [
        m if m["role"] == "assistant" else {**m, "content": _mark(family, m["content"])}
        for m in messages
    ]
    if marked == messages:
        return rendered
    return render(family, marked, request.tools, request.today, request.template_kwargs)


def _mark(family: str, text: str) -> str:
    for token in added_tokens(family):
        if not token.isspace():
            text = text.replace(token, token[0] + FORGED + token[1:])
    return text
