"""Answers drawn at random from a grammar, as a model without a mind of its own would give them."""

import json
import random
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer
from mlx_lm import tokenizer_utils
from mlx_lm.tokenizer_utils import TokenizerWrapper

from agentmem.chat.grammar import AnswerShape, answer_shape
from agentmem.chat.template import ChatTemplate
from support.chat.families import load


@cache
def served_tokenizer(family: str) -> TokenizerWrapper:
    """A family's tokenizer as mlx-lm loads it from a directory: with a parser of its calls."""
    tokenizer = load(family)
    with tempfile.TemporaryDirectory() as path:
        tokenizer._tokenizer.save_pretrained(path)
        (Path(path) / "chat_template.jinja").unlink(missing_ok=True)
        config = Path(path) / "tokenizer_config.json"
        said = json.loads(config.read_text()) | {"chat_template": tokenizer.chat_template}
        config.write_text(json.dumps(said))
        return tokenizer_utils.load(Path(path), eos_token_ids=sorted(tokenizer.eos_token_ids))


@cache
def shape_of(tokenizer: TokenizerWrapper) -> AnswerShape:
    return answer_shape(ChatTemplate(tokenizer), tokenizer)


@cache
def matcher_tokenizer(tokenizer: TokenizerWrapper) -> LLTokenizer:
    return from_tokenizer(tokenizer._tokenizer, eos_token=sorted(tokenizer.eos_token_ids))


@dataclass(frozen=True)
class Drawn:
    tokens: list[int]
    text: str
    ended: bool  # else it was cut


def draw(
    tokenizer: TokenizerWrapper,
    grammar: str | LLMatcher,
    seed: int = 0,
    *,
    most: int = 400,
    ends: float = 0.5,
) -> Drawn:
    """One answer; special tokens are chosen often, or no reasoning would end."""
    if isinstance(grammar, str):
        matcher = LLMatcher(matcher_tokenizer(tokenizer), grammar)
    else:
        matcher = grammar.deep_copy()
    assert not matcher.is_error(), matcher.get_error()
    chance = random.Random(seed)
    end_ids = set(tokenizer.eos_token_ids)
    special = set(shape_of(tokenizer).specials.values()) - end_ids
    tokens: list[int] = []
    for _ in range(most):
        bits = np.unpackbits(
            np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little"
        ).nonzero()[0]
        allowed = [int(bit) for bit in bits]
        assert allowed and not matcher.is_error(), (matcher.get_error(), tokenizer.decode(tokens))
        others = [token for token in allowed if token not in end_ids]
        if len(others) < len(allowed) and (not others or chance.random() < ends):
            return Drawn(tokens, tokenizer.decode(tokens), True)
        marks = [token for token in others if token in special]
        tokens.append(chance.choice(marks if marks and chance.random() < 0.3 else others))
        assert matcher.consume_token(tokens[-1]), matcher.get_error()
    return Drawn(tokens, tokenizer.decode(tokens), False)


def accepts(tokenizer: TokenizerWrapper, grammar: str, text: str) -> bool:
    """Whether an answer may be this text, as the tokenizer cuts it, and end there."""
    matcher = LLMatcher(matcher_tokenizer(tokenizer), grammar)
    assert not matcher.is_error(), matcher.get_error()
    tokens = tokenizer.encode(text, add_special_tokens=False)
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()
