"""docs/models.md: what agentmem makes of every model type of mlx-lm. Run it to write the file."""

import textwrap
from collections import Counter
from importlib.metadata import version
from pathlib import Path

from agentmem.engine.model_runner import ModelRunner
from agentmem.kvcache.spec import KVCacheSpec
from support.zoo import ALIASES, INCONSISTENT, MODEL_TYPES, UNBUILDABLE, tiny

DOCUMENT = Path(__file__).parents[2] / "docs" / "models.md"
_HEAD = """# Models

Which models of mlx-lm {version} keep an agent's context, and how. Where the last column says no,
answers are right, but every request prefills its whole prompt.

Every model type is built tiny with random weights by its own classes and run by
`tests/kvcache/test_architectures.py`, which checks for each row:

- With `--kv-bits 16` the logits are mlx-lm's.
- After a restore they are bit-identical to never having been away.
- Alone and in a batch they are the same.
- Attention on 4-bit codes equals attention on their dequantized copy.

The columns:

- **layers**, read off the cache objects that the model makes and a traced pass: *global* sees all
  tokens; *sliding* and *chunked* see a window, and only that much is kept in RAM and read back;
  *latent* is MLA's compressed vector; *recurrent* is a state of fixed size (SSM, gated delta rule,
  convolution, linear attention) that is kept in full precision at some positions; *+ sinks*: with
  learned attention sinks.
- **cache**: in how many bits sealed blocks are kept with `--kv-bits 4`; recurrent state is never
  quantized.
- **attention**: *blocks* is computed by agentmem, over codes or their dequantized copy; *model* is
  computed by the model's own code over what the cache returns, which is the same numbers.
- **decode**: *batched*, or *one by one* where the model's code takes no batch of sequences of
  unequal length.
- **reuse**: whether an agent's context is kept at all.

Written by `PYTHONPATH=tests python -m support.support_matrix`.

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
        cells = [
            model_type,
            "not known",
            "mlx-lm's own",
            "model",
            decode,
            f"no: {spec.opaque.reason}",
        ]
    else:
        name = f"{model_type}{mark}"
        cells = [name, _layers(spec), _cache(spec), _attention(spec), decode, "yes"]
    return f"| {' | '.join(cells)} |"


def _layers(spec: KVCacheSpec) -> str:
    kinds = Counter(
        f"{layer.kind}{' + sinks' if layer.attention_sinks else ''}" for layer in spec.layers
    )
    return ", ".join(kinds)


def _cache(spec: KVCacheSpec) -> str:
    quantized = [f"{spec.bits[0]} bits"] if spec.bits else []
    return (
        " + ".join(quantized + (["state"] if spec.state_stacks else []))
        or f"16 bits: {spec.unquantized_reason}"
    )


def _attention(spec: KVCacheSpec) -> str:
    ways = Counter(
        "model" if layer.model_attends else "blocks" for layer in spec.layers if not layer.state
    )
    return ", ".join(ways) or "none"


def _notes() -> str:
    reasons = [f"- {name}: {reason}" for name, reason in sorted(UNBUILDABLE.items())]
    unbuilt = "".join(_wrapped(reason, "  ") + "\n" for reason in reasons)
    own = "; ".join(f"{name} {reason}" for name, reason in sorted(INCONSISTENT.items()))
    own = f"[^own]: mlx-lm's own logits depend on the chunks that a prompt comes in: {own}."
    return f"\n{_wrapped(own, '    ')}\n\nNot built here:\n\n{unbuilt}"


def _wrapped(text: str, indent: str) -> str:
    return textwrap.fill(text, width=100, subsequent_indent=indent, break_on_hyphens=False)


if __name__ == "__main__":
    DOCUMENT.write_text(document())
