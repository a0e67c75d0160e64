"""What a model's files say of its answers: which tokens end one, and how tokens are chosen."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from mlx_lm.tokenizer_utils import TokenizerWrapper

from .model_dir import read_json

_WORD = "xylophone"  # that no template says by itself
# parts of one answer end with a token too there: gpt-oss' channels
_SEVERAL_PARTS = {"<|channel|>", "<|message|>"}


def read_generation_config(path: Path) -> dict[str, Any]:
    """Return what generation_config.json in a directory holds; nothing where it is no object."""
    try:
        found = read_json(path / "generation_config.json")
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def end_tokens(
    tokenizer: TokenizerWrapper, config: Mapping[str, Any], generation: Mapping[str, Any]
) -> set[int]:
    """Return the ids of all tokens that end an answer, whoever says so.

    Those are config.json's, generation_config.json's and the tokenizer's, and the one with which
    the chat template closes what the assistant said.
    """
    text = config.get("text_config")
    sections = (config, text if isinstance(text, dict) else {}, generation)
    found = {token for section in sections for token in _ids(section.get("eos_token_id"))}
    found |= set(_ids(tokenizer.eos_token_id))
    found |= set(tokenizer.eos_token_ids)
    closing = _closing_token(tokenizer)
    return found if closing is None else found | {closing}


def sampling_defaults(generation: Mapping[str, Any]) -> dict[str, float | int]:
    """Return how tokens are chosen where a request is silent, by SamplingParams' names.

    `do_sample` false: the likeliest token, always.
    """
    if generation.get("do_sample") is False:
        return {"temperature": 0.0}
    found: dict[str, float | int] = {}
    bounds = {
        "temperature": (0.0, 100.0),
        "top_p": (0.0, 1.0),
        "min_p": (0.0, 1.0),
        "repetition_penalty": (0.01, 100.0),
    }
    for name, (least, most) in bounds.items():
        value = generation.get(name)
        if isinstance(value, float | int) and type(value) is not bool and least <= value <= most:
            found[name] = float(value)
    top_k = generation.get("top_k")
    if isinstance(top_k, int) and not isinstance(top_k, bool) and top_k > 0:
        found["top_k"] = top_k
    return found


def _ids(value: Any) -> Iterator[int]:
    """Yield token ids, of which there may be one, a list or none."""
    for token in value if isinstance(value, list) else [value]:
        if isinstance(token, int) and not isinstance(token, bool) and token >= 0:
            yield token


def _closing_token(tokenizer: TokenizerWrapper) -> int | None:
    """Return the special token that the template puts right behind an assistant's text."""
    has_several = set(tokenizer.get_vocab()) >= _SEVERAL_PARTS
    if not tokenizer.has_chat_template or has_several:
        return None
    chat = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": _WORD}]
    try:
        text = tokenizer.apply_chat_template(chat, tokenize=False)
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError):
        return None
    _, said, rest = str(text).rpartition(_WORD)
    rest = rest.lstrip()
    added = {str(token): id for id, token in tokenizer.added_tokens_decoder.items()}
    closing = [name for name in added if said and name and rest.startswith(name)]
    return added[max(closing, key=len)] if closing else None
