"""docs/models.md: what agentmem makes of every model type of the installed mlx-lm. Run it to write
the file.
"""

from collections import Counter
from importlib.metadata import version
from pathlib import Path

from agentmem.engine.model_runner import ModelRunner
from agentmem.kvcache.spec import KVCacheSpec
from support.zoo import ALIASES, INCONSISTENT, MODEL_TYPES, UNBUILDABLE, tiny

DOCUMENT = Path(__file__).parents[2] / "docs" / "models.md"
_HEAD = """# Models

Every model type of mlx-lm {version}, built tiny with random weights by its own classes and run by
`tests/kvcache/test_architectures.py`, which checks for each row: with `--kv-bits 16` the logits are
mlx-lm's; after a restore they are bit-identical to never having been away; alone and in a batch
they are the same; attention on 4-bit codes equals attention on their dequantized copy. Written by
`PYTHONPATH=tests python -m support.support_matrix`.

- **Layers**, read off the cache objects that the model makes and a traced pass: *global* sees all tokens, *sliding*
  and *chunked* a window (only that much is kept in RAM and read back), *latent* is MLA's compressed vector,
  *recurrent* a state of fixed size (SSM, gated delta rule, convolution, linear attention) that is kept in full
  precision at some positions. *+ sinks*: with learned attention sinks.
- **Cache**: in how many bits sealed blocks are kept with `--kv-bits 4`; recurrent state is never quantized.
- **Attention**: *blocks* is computed by agentmem, over codes or their dequantized copy; *model* by the model's own code
  over what the cache returns, which is the same numbers.
- **Decode**: *batched*, or *one by one* where the model's code takes no batch of sequences of unequal length.
- **Reuse**: whether an agent's context is kept at all. Without reuse answers are right, but every request prefills.

| model_type | layers | cache | attention | decode | reuse |
|---|---|---|---|---|---|
"""


def document() -> str:
    types = sorted({*MODEL_TYPES, *ALIASES} - set(UNBUILDABLE), key=str.lower)
    rows = [_row(model_type) for model_type in types]
    return _HEAD.format(version=version("mlx-lm")) + "\n".join(rows) + "\n" + _notes()


def _row(model_type: str) -> str:
    runner = ModelRunner(tiny(model_type))
    spec, mark = runner.spec, "[^own]" if model_type in INCONSISTENT else ""
    decode = "batched" if runner.batchable else "one by one"
    if spec.opaque is not None:
        return f"| {model_type} | not known | mlx-lm's own | model | {decode} | no: {spec.opaque.reason} |"
    return f"| {model_type}{mark} | {_layers(spec)} | {_cache(spec)} | {_attention(spec)} | {decode} | yes |"


def _layers(spec: KVCacheSpec) -> str:
    kinds = Counter(
        f"{layer.kind}{' + sinks' if layer.attention_sinks else ''}" for layer in spec.layers
    )
    return ", ".join(kinds)


def _cache(spec: KVCacheSpec) -> str:
    quantized = [f"{spec.bits[0]} bits"] if spec.bits else []
    return (
        " + ".join(quantized + (["state"] if spec.recurrent else []))
        or f"16 bits: {spec.unquantized_reason}"
    )


def _attention(spec: KVCacheSpec) -> str:
    ways = Counter(
        "model" if layer.model_attends else "blocks"
        for layer in spec.layers
        if layer.kind != "recurrent"
    )
    return ", ".join(ways) or "none"


def _notes() -> str:
    unbuilt = "".join(f"- {name}: {reason}\n" for name, reason in sorted(UNBUILDABLE.items()))
    own = "; ".join(f"{name} {reason}" for name, reason in sorted(INCONSISTENT.items()))
    own = f"[^own]: mlx-lm's own logits depend on the chunks that a prompt comes in: {own}."
    return f"\n{own}\n\nNot built here:\n\n{unbuilt}"


if __name__ == "__main__":
    DOCUMENT.write_text(document())
