"""Tiny models of true mlx-lm classes with random weights, and an engine around one."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models import deepseek_v2, gemma3_text, gpt_oss, llama, qwen3

from agentmem.agent_key import AgentKey
from agentmem.config import Settings
from agentmem.engine.api import Finished, GenerateRequest, RequestStats, SamplingParams, TextDelta
from agentmem.engine.engine import Engine
from agentmem.engine.model_runner import ModelRunner
from agentmem.kvcache.sequence import SequenceCache
from agentmem.models.loading import LoadedModel
from support.fake_engine import NOWHERE, tiny_tokenizer

VOCAB = 256
BLOCK = 32
ONE_SEQUENCE = 820_000  # bytes that a tiny llama's sequence of up to 256 tokens takes while it runs
_COMMON = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "vocab_size": VOCAB,
}
_HEADS = {"num_key_value_heads": 2, "head_dim": 64, "rms_norm_eps": 1e-5}
_MAKE: dict[str, Callable[[], Any]] = {
    "llama": lambda: llama.Model(
        llama.ModelArgs(model_type="llama", num_hidden_layers=2, **_COMMON, **_HEADS)
    ),
    "qwen3": lambda: qwen3.Model(
        qwen3.ModelArgs(
            model_type="qwen3",
            num_hidden_layers=2,
            max_position_embeddings=4096,
            rope_theta=1e4,
            tie_word_embeddings=True,
            **_COMMON,
            **_HEADS,
        )
    ),
    "gemma3": lambda: gemma3_text.Model(  # one layer in six is global, the others slide
        gemma3_text.ModelArgs(
            model_type="gemma3_text",
            num_hidden_layers=6,
            sliding_window=40,
            query_pre_attn_scalar=64,
            **_COMMON,
            **_HEADS,
        )
    ),
    "gpt_oss": lambda: gpt_oss.Model(  # attention sinks
        gpt_oss.ModelArgs(
            model_type="gpt_oss",
            num_hidden_layers=2,
            num_local_experts=4,
            num_experts_per_tok=2,
            sliding_window=40,
            **_COMMON,
            **{k: v for k, v in _HEADS.items() if k != "rms_norm_eps"},
        )
    ),
    "deepseek_v2": lambda: deepseek_v2.Model(  # keys of 192, values of 128
        deepseek_v2.ModelArgs(
            model_type="deepseek_v2",
            num_hidden_layers=2,
            moe_intermediate_size=64,
            num_key_value_heads=4,
            n_routed_experts=None,
            kv_lora_rank=32,
            q_lora_rank=None,
            qk_rope_head_dim=64,
            qk_nope_head_dim=128,
            v_head_dim=128,
            max_position_embeddings=4096,
            rope_scaling={
                "type": "yarn",
                "factor": 4,
                "mscale": 0.7,
                "mscale_all_dim": 0.7,
                "original_max_position_embeddings": 1024,
            },
            **_COMMON,
        )
    ),
}
KINDS = tuple(_MAKE)


def tiny_model(kind: str = "llama", seed: int = 0) -> Any:
    mx.random.seed(seed)
    model = _MAKE[kind]()
    mx.eval(model.parameters())
    return model


def tiny_runner(kind: str = "llama", kv_bits: str = "4", on_codes: bool = False) -> ModelRunner:
    runner = ModelRunner(tiny_model(kind), kv_bits=kv_bits, block_size=BLOCK)
    if runner.spec.bits is not None:
        runner.use_centres(runner.calibrate(random_tokens(64, seed=99)))
    runner.on_codes = on_codes
    return runner


def random_tokens(n: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(8, VOCAB, n).tolist()


def run(runner: ModelRunner, cache: SequenceCache, tokens: list[int], chunk: int) -> mx.array:
    """Append `tokens` in chunks; logits [len(tokens), vocab]."""
    logits = []
    for start in range(0, len(tokens), chunk):
        part, fresh = runner.forward(mx.array([tokens[start : start + chunk]]), [cache])
        mx.eval(part, cache.arrays(), [b.arrays for blocks in fresh for b in blocks])
        logits.append(part[0])
    return mx.concatenate(logits)


def tiny_loader(
    kind: str = "llama", seed: int = 0, max_context: int = 1024
) -> Callable[[], LoadedModel]:
    tokenizer = tiny_tokenizer(size=VOCAB)
    return lambda: LoadedModel(
        f"tiny-{kind}",
        Path("/nowhere"),
        tiny_model(kind, seed),
        tokenizer,
        {},
        max_context,
        f"{kind}-{seed}",
        NOWHERE,
    )


def word_ids(text: str) -> list[int]:
    """The tokens of what a tiny engine answered."""
    vocabulary = tiny_tokenizer(size=VOCAB).get_vocab()
    return [vocabulary[word] for word in text.split()]


class EngineThread:
    """An engine with an event loop of its own, driven from a test without one."""

    def __init__(self, home: Path, load: Callable[[], LoadedModel], **settings: Any):
        defaults = {
            "home": home,
            "block_size": BLOCK,
            "prefill_chunk": 64,
            "tail_delay": 0.05,
            "grace": 5.0,
            "write_amplification": 1e9,
        }
        self.engine = Engine(Settings(**(defaults | settings)), load)
        self.engine.start()
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()

    def call(self, coroutine: Any, timeout: float = 60.0) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(timeout)

    def ask(
        self, agent: str, tokens: list[int], max_tokens: int = 8, **params: Any
    ) -> tuple[str, RequestStats]:
        return self.call(self.answer(agent, tokens, max_tokens, **params))

    async def answer(
        self,
        agent: str,
        tokens: list[int],
        max_tokens: int = 8,
        namespace: str = "default",
        **params: Any,
    ) -> tuple[str, RequestStats]:
        params = {
            "seed": 7,
            "ignore_eos": True,
            **params,
        }  # sampled: a greedy tiny model soon repeats itself
        request = GenerateRequest(
            AgentKey(namespace, agent), tokens, SamplingParams(max_tokens=max_tokens, **params)
        )
        text = []
        async for event in self.engine.generate(request):
            if isinstance(event, TextDelta):
                text.append(event.text)
            if isinstance(event, Finished):
                return "".join(text), event.stats
        raise AssertionError("the stream ended without Finished")

    def on_engine(self, function: Callable[[], Any]) -> Any:
        """Run it on the engine thread, between two steps."""
        done: Future[Any] = Future()
        self.engine._post(lambda: done.set_result(function()))
        return done.result(10)

    @property
    def core(self) -> Any:
        return self.engine._core

    def wait_until_saved(self) -> None:
        deadline = time.monotonic() + 10
        while any(b.save_at is not None for b in list(self.core.prefix_cache.branches())):
            assert time.monotonic() < deadline, "not everything was persisted"
            time.sleep(0.02)

    def agents(self) -> dict[str, Any]:
        return {a.agent_id: a for a in self.core.prefix_cache.infos("default")}

    def agents_blocks(self, name: str) -> list[Any]:
        """Return the blocks of its newest branch."""
        return list(self.core.prefix_cache.agents["default", name].newest.blocks)

    def stop(self) -> None:
        self.call(self.engine.stop())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


@contextmanager
def tiny_engine(
    home: Path, load: Callable[[], LoadedModel] | None = None, **settings: Any
) -> Iterator[EngineThread]:
    engine = EngineThread(home, load or tiny_loader(), **settings)
    try:
        yield engine
    finally:
        engine.stop()
