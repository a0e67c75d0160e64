"""GrammarCompiler: grammars become matchers, off the event loop and the engine thread."""

import asyncio
import json
from collections import OrderedDict
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from ..errors import InvalidRequest

_MAX_COMPILED = 64  # grammars that are remembered
_MAX_CHARACTERS = 1 << 20  # of a grammar
_HIDDEN = "\U0010fffe"  # no character
_TIMEOUT = 15.0  # s; what llguidance's limits let pass takes less, unless the machine is busy


class GrammarCompiler:
    """Compiles grammars for one tokenizer, in threads of its own; used from one event loop.

    Special tokens are no text to a grammar: those that the tokenizer calls so, added tokens in
    angle brackets, and those that end an answer. They come where a grammar names them, and the
    last ones where it may end.
    """

    def __init__(self, tokenizer: Any):
        """`tokenizer` is an mlx_lm TokenizerWrapper; it is read when a grammar first comes."""
        self._tokenizer = tokenizer
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()
        # two, so that one grammar that takes long does not hold up all others
        self._threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="grammar")
        self._vocabulary: asyncio.Future[LLTokenizer] | None = None

    async def compile(self, grammar: str) -> LLMatcher:
        """Return a matcher at the beginning of a grammar; a copy of it is for one answer.

        InvalidRequest: the grammar can't be read, is too large, or no answer fits it.
        """
        if grammar in self._compiled:
            self._compiled.move_to_end(grammar)
            return self._compiled[grammar]
        if len(grammar) > _MAX_CHARACTERS:
            raise InvalidRequest(
                f"An answer can't be held to this form: its grammar has {len(grammar):,} "
                f"characters, of {_MAX_CHARACTERS:,} at most."
            )
        loop = asyncio.get_running_loop()
        if self._vocabulary is None:
            self._vocabulary = loop.run_in_executor(self._threads, _vocabulary, self._tokenizer)
        vocabulary = await asyncio.shield(self._vocabulary)
        compiling = loop.run_in_executor(self._threads, _compile, vocabulary, grammar)
        try:
            matcher = await asyncio.wait_for(compiling, _TIMEOUT)
        except TimeoutError:
            message = f"An answer can't be held to this form: it took over {_TIMEOUT:.0f} s to read"
            raise InvalidRequest(message) from None
        self._compiled[grammar] = matcher
        if len(self._compiled) > _MAX_COMPILED:
            self._compiled.popitem(last=False)
        return matcher


def _vocabulary(tokenizer: Any) -> LLTokenizer:
    """Return a tokenizer as llguidance reads it.

    InvalidRequest: it is none of those whose tokens are bytes, one by one.
    """
    ends = sorted(tokenizer.eos_token_ids)
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    spec.update(truncation=None, padding=None)
    _hide_special_tokens(spec, ends)
    ids = tokenizer.get_vocab().values()
    try:
        if max(ids) >= len(ids):
            raise ValueError("its token ids have gaps")
        return LLTokenizer(json.dumps(spec), eos_token=ends)
    except (ValueError, RuntimeError) as e:
        why = " ".join(str(e).split())[:200]
        message = f"This model's answers can't be held to a form: of its tokenizer, {why}"
        raise InvalidRequest(message) from None


def _hide_special_tokens(spec: dict[str, Any], ends: Collection[int]) -> None:
    """Give the special tokens of a tokenizer's own description names that no text has.

    Where a grammar leaves one text only, llguidance takes it as the tokenizer cuts it, in which a
    name in a JSON string would be the special token. Grammars name those by their ids.
    """
    names = {}
    for token in spec["added_tokens"]:
        name = token["content"]
        in_brackets = name.startswith("<") and name.endswith(">")
        token["special"] = token["special"] or in_brackets or token["id"] in ends
        if token["special"]:
            token["content"] = names[name] = f"{_HIDDEN}{name}{_HIDDEN}"
    model = spec["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(name, name): id for name, id in model["vocab"].items()}
    else:
        model["vocab"] = [[names.get(name, name), score] for name, score in model["vocab"]]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]


def _compile(vocabulary: LLTokenizer, grammar: str) -> LLMatcher:
    """Return a matcher whose first mask is known, so that its copies have it at once."""
    limits = LLParserLimits(verbose_errors=False)
    matcher = LLMatcher(vocabulary, grammar, log_level=0, limits=limits)
    matcher.compute_bitmask()
    if matcher.is_error():
        why = " ".join(matcher.get_error().removesuffix("<non-verbose/>").split())[:300]
        raise InvalidRequest(f"An answer can't be held to this form: {why}")
    return matcher
