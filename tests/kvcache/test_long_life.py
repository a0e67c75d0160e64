"""What a cache is worth after a long life, and attention sinks over a quantized cache."""

import random
from dataclasses import dataclass, field, replace

import mlx.core as mx
import pytest

from agentmem.engine.model_runner import ModelRunner
from agentmem.kvcache.attention import relative_error
from agentmem.kvcache.block import SealedBlock, Snapshot, Tail, from_host, to_host
from support.tiny import BLOCK, random_tokens, run, tiny_model, tiny_runner
from support.zoo import tiny

ROUNDS = 20


@dataclass
class Agent:
    """A context as the store has it: blocks, a tail, and the edges of the passes that made it."""

    tokens: list[int] = field(default_factory=list)
    edges: list[int] = field(default_factory=lambda: [0])
    blocks: list[SealedBlock] = field(default_factory=list)
    tail: Tail | None = None

    def restore(self, runner: ModelRunner):
        """Make a cache of what is needed of it alone, as bytes and back."""
        needed = [
            b.only(runner.spec.needed(i, len(self.tokens))) for i, b in enumerate(self.blocks)
        ]
        blocks = [SealedBlock(from_host(to_host(b.arrays))) for b in needed]
        tail = self.tail
        if tail is not None:
            arrays = from_host(to_host(tail.to_arrays()))
            tail = Tail.from_arrays(arrays, tail.num_tokens, tail.prefix_len, runner.spec)
        return runner.new_cache(Snapshot(blocks, tail))

    def append(self, runner: ModelRunner, cache, tokens: list[int], rng: random.Random) -> None:
        """Run `tokens` in passes that end at block boundaries or before."""
        while tokens:
            n = min(rng.randint(1, BLOCK), BLOCK - len(self.tokens) % BLOCK, len(tokens))
            self.blocks += runner.prefill(cache, tokens[:n])
            self.tokens += tokens[:n]
            self.edges.append(len(self.tokens))
            tokens = tokens[n:]
        self.tail = cache.snapshot().tail

    def truncate(self, at: int) -> None:
        keep = at // BLOCK
        assert at % BLOCK == 0 or keep == len(self.blocks)
        self.tail = (
            self.tail.cut(at % BLOCK)
            if self.tail is not None and keep == len(self.blocks)
            else None
        )
        self.blocks, self.tokens = self.blocks[:keep], self.tokens[:at]
        self.edges = [edge for edge in self.edges if edge <= at]


@pytest.mark.parametrize(
    "model_type", ["llama", "gemma3_text", "gpt_oss", "deepseek_v3", "qwen3_next", "falcon_h1"]
)
def test_twenty_rounds_of_evict_restore_append_and_truncate_leave_what_one_go_makes(model_type):
    rng = random.Random(model_type)
    runner = ModelRunner(tiny(model_type), block_size=BLOCK)
    runner.spec = replace(runner.spec, state_interval=BLOCK)
    runner.use_centres(runner.calibrate(random_tokens(64, seed=99)))
    agent = Agent()
    for number in range(ROUNDS):
        cache = agent.restore(runner)
        agent.append(runner, cache, random_tokens(rng.randint(5, 90), seed=number), rng)
        boundaries = [
            e
            for e in agent.edges
            if e % BLOCK == 0
            or (e > BLOCK * len(agent.blocks) and not runner.spec.resumes_at_snapshots)
        ]
        if number % 3 == 2:
            agent.truncate(rng.choice(boundaries[-4:]))
    at_once = runner.new_cache()
    for start, stop in zip(agent.edges, agent.edges[1:], strict=False):
        runner.prefill(at_once, agent.tokens[start:stop])
    assert len(agent.tokens) > 300
    more = random_tokens(20, seed=77)
    assert mx.array_equal(
        run(runner, agent.restore(runner), more, 6), run(runner, at_once, more, 6)
    )


def _model(kind: str, seed: int):
    model = tiny_model(kind, seed)
    if kind == "gpt_oss":
        for layer in model.layers:
            layer.self_attn.sinks = mx.random.normal(layer.self_attn.sinks.shape)
            # which experts are asked jumps with the smallest change, whatever made it: here always
            # the same
            layer.mlp.router.weight = mx.zeros_like(layer.mlp.router.weight)
            layer.mlp.router.bias = mx.arange(4.0)
    return model


def _error_of_4_bits(kind: str) -> float:
    """Return the relative error that 4-bit blocks make in the logits, the mean over seeds."""
    errors = []
    for seed in range(4):
        tokens, logits = random_tokens(160, seed=seed), {}
        for kv_bits in ("16", "4"):
            runner = ModelRunner(_model(kind, seed), kv_bits=kv_bits, block_size=BLOCK)
            if kv_bits == "4":
                runner.use_centres(runner.calibrate(random_tokens(64, seed=99)))
            logits[kv_bits] = run(runner, runner.new_cache(), tokens, 32)[BLOCK:]
        difference = mx.square(logits["4"] - logits["16"]).sum() / mx.square(logits["16"]).sum()
        errors.append(difference.item() ** 0.5)
    return sum(errors) / len(errors)


def test_sinks_do_not_make_the_error_of_4_bits_larger():
    sinks, plain = _error_of_4_bits("gpt_oss"), _error_of_4_bits("llama")
    assert tiny_runner("gpt_oss").spec.layers[0].dims == tiny_runner("llama").spec.layers[0].dims
    assert 0 < sinks <= plain


def test_with_16_bits_attention_with_sinks_is_exact():
    from mlx_lm.models.cache import make_prompt_cache

    runner, tokens = tiny_runner("gpt_oss", "16"), random_tokens(160)
    expected = runner.model(mx.array([tokens]), cache=make_prompt_cache(runner.model))[0]
    assert relative_error(run(runner, runner.new_cache(), tokens, 32), expected) < 1e-5
