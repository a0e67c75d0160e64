"""Families of chat models: a template and a small tokenizer each, that behave like the real ones.

The templates are the project's own; what they keep of the real ones is when text moves, changes or
vanishes between one turn and the next (see the tests), and the special tokens. Tokenizers:
make_tokenizers.py.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tool_parsers import json_tools
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Specials:
    bos: str | None
    eos: str
    ends: tuple[str, ...]  # all that end an answer


_SPECIALS = {
    "qwen3": Specials(None, "<|im_end|>", ("<|im_end|>", "<|endoftext|>")),
    "qwen3-instruct": Specials(None, "<|im_end|>", ("<|im_end|>", "<|endoftext|>")),
    "llama3": Specials(
        "<|begin_of_text|>", "<|eot_id|>", ("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>")
    ),
    "gemma3": Specials("<bos>", "<eos>", ("<eos>", "<end_of_turn>")),
    "deepseek": Specials(
        "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", ("<｜end▁of▁sentence｜>",)
    ),
    "gpt-oss": Specials(
        "<|startoftext|>", "<|return|>", ("<|return|>", "<|call|>", "<|endoftext|>")
    ),
    "mistral": Specials("<s>", "</s>", ("</s>",)),
    "mistral-v1": Specials("<s>", "</s>", ("</s>",)),
    "smollm2": Specials("<|im_start|>", "<|im_end|>", ("<|im_end|>",)),
    "glm": Specials(None, "<|endoftext|>", ("<|endoftext|>", "<|user|>", "<|observation|>")),
}
_TOKENIZERS = {"qwen3-instruct": "qwen3"}


def load(family: str) -> TokenizerWrapper:
    """A new tokenizer: HF's are not re-entrant, so threads do not share one."""
    special = _SPECIALS[family]
    bare = Tokenizer.from_file(
        str(FOLDER / "tokenizers" / f"{_TOKENIZERS.get(family, family)}.json")
    )
    template = (
        (FOLDER / "templates" / f"{family}.jinja").read_text(encoding="utf-8").removesuffix("\n")
    )
    hf = PreTrainedTokenizerFast(
        tokenizer_object=bare,
        bos_token=special.bos,
        eos_token=special.eos,
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )
    return TokenizerWrapper(hf, eos_token_ids=[bare.token_to_id(token) for token in special.ends])


FAMILIES: dict[str, Callable[[], TokenizerWrapper]] = {
    family: partial(load, family) for family in _SPECIALS
}


@cache
def tokenizer_of(family: str) -> TokenizerWrapper:
    """One tokenizer a family, for use in one thread."""
    return load(family)


def encode(family: str, text: str) -> list[int]:
    """The tokens of a whole text, the template's own special tokens included, nothing added."""
    return tokenizer_of(family).encode(text, add_special_tokens=False)


def encode_rest(family: str, text: str) -> list[int]:
    """The tokens of a text that goes on after something else: without the dummy space of a text's
    start.

    Of mistral-v1 each piece after a special token gets a dummy space, which stands for the text's
    own first one.
    """
    if not text:
        return []
    if family == "mistral":
        return encode(family, "<s>" + text)[1:]
    return encode(family, text.removeprefix(" ") if family == "mistral-v1" else text)


def encode_with_ends(family: str, text: str) -> list[tuple[int, int | None]]:
    """encode_rest, and where in the text each token ends; None: within a character that the next
    one goes on with.
    """
    before = "<s>" if family == "mistral" else ""
    found = tokenizer_of(family).backend_tokenizer.encode(before + text, add_special_tokens=False)
    starts = [*(start for start, _ in found.offsets[1:]), len(before + text)][: len(found)]
    ends = [
        (token, end - len(before) if end <= start else None)
        for token, (_, end), start in zip(found.ids, found.offsets, starts, strict=True)
    ]
    return ends[1:] if before else ends


def decode(family: str, tokens: list[int]) -> str:
    return tokenizer_of(family).decode(tokens, skip_special_tokens=False)


@cache
def added_tokens(family: str) -> tuple[str, ...]:
    """Texts that become one token wherever they stand, special or not; longest first."""
    return tuple(sorted(tokenizer_of(family).get_added_vocab(), key=len, reverse=True))


@cache
def added_pattern(family: str) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, added_tokens(family))))


def tool_calling(family: str) -> TokenizerWrapper:
    """Return the tokenizer that mlx-lm makes of a model with this template."""
    tokenizer = load(family)
    marks = {
        "tool_call_start": json_tools.tool_call_start,
        "tool_call_end": json_tools.tool_call_end,
    }
    ends = tokenizer.eos_token_ids
    return TokenizerWrapper(
        tokenizer._tokenizer, eos_token_ids=ends, tool_parser=json_tools.parse_tool_call, **marks
    )
