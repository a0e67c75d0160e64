"""A tiny engine whose tokenizer spells bytes, and answers of it that are held to grammars."""

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
from llguidance import LLMatcher
from mlx_lm.models import llama
from mlx_lm.tokenizer_utils import TokenizerWrapper

from agentmem.agent_key import AgentKey
from agentmem.chat.grammar_compiler import GrammarCompiler
from agentmem.engine.api import Finished, GenerateRequest, SamplingParams, TextDelta, TokenLogprob
from agentmem.models.loading import LoadedModel
from support.tiny import EngineThread, tiny_engine, tiny_loader

PROMPT = [3, 5, 7, 11]


def json_grammar(schema: Any) -> str:
    """A compact answer, or a random one would be spaces for ever."""
    options = {"whitespace_flexible": False}
    return LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=options)


def model_of(tokenizer: TokenizerWrapper, seed: int = 0) -> LoadedModel:
    """A llama of two layers with random weights; its logits are padded beyond the vocabulary."""
    mx.random.seed(seed)
    model = llama.Model(
        llama.ModelArgs(
            model_type="llama",
            hidden_size=128,
            num_hidden_layers=2,
            intermediate_size=128,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            rms_norm_eps=1e-5,
            vocab_size=max(tokenizer.get_vocab().values()) + 20,
        )
    )
    mx.eval(model.parameters())
    return replace(tiny_loader()(), model=model, tokenizer=tokenizer, name="tiny-constrained")


@dataclass(frozen=True)
class Answer:
    text: str
    reason: str
    num_tokens: int
    logprobs: list[TokenLogprob]


class ConstrainedEngine:
    """An engine, and the compiler that stands before it."""

    def __init__(self, engine: EngineThread):
        self.engine = engine
        self.compiler = GrammarCompiler(engine.engine.tokenizer)

    def compile(self, grammar: str) -> LLMatcher:
        return self.engine.call(self.compiler.compile(grammar))

    def ask(self, agent: str, grammar: str | None, **params: Any) -> Answer:
        return self.engine.call(self.answer(agent, grammar, **params))

    def ask_all(self, *asked: dict[str, Any]) -> list[Answer]:
        """All at once, each an agent of its own."""

        async def together() -> list[Answer]:
            each = [self.answer(f"agent {i}", **one) for i, one in enumerate(asked)]
            return await asyncio.gather(*each)

        return self.engine.call(together(), timeout=300)

    async def answer(
        self,
        agent: str,
        grammar: str | None,
        *,
        prompt: list[int] = PROMPT,
        max_tokens: int = 64,
        **params: Any,
    ) -> Answer:
        matcher = None if grammar is None else await self.compiler.compile(grammar)
        request = GenerateRequest(
            AgentKey("default", agent),
            prompt,
            SamplingParams(max_tokens=max_tokens, **params),
            grammar=matcher,
        )
        text = ""
        logprobs: list[TokenLogprob] = []
        async for event in self.engine.engine.generate(request):
            if isinstance(event, TextDelta):
                text += event.text
                logprobs += event.logprobs
            if isinstance(event, Finished):
                return Answer(text, event.reason, event.stats.completion_tokens, logprobs)
        raise AssertionError("the stream ended without Finished")


@contextmanager
def constrained_engine(
    home: Path, tokenizer: TokenizerWrapper, **settings: Any
) -> Iterator[ConstrainedEngine]:
    with tiny_engine(home, lambda: model_of(tokenizer), **settings) as engine:
        yield ConstrainedEngine(engine)
