"""What could make 4 bits better at the same size: variants of the cache's quantization.

They stand against the one in use.

python benchmarks/quality.py --json benchmarks/results/quality-demo-pydoc.json

Each variant is one change to the baseline, which is the product's cache at 4 bits written down
again: keys centred and rotated, values rotated, codes in groups of 64 with 16-bit scales, first
tokens and the open block in full precision. A variant says by which matrices keys and queries,
values and outputs enter and leave cache space, so that any linear map that cancels can be tried.
Attention weights sum to 1, so that values can be centred as well: the centre is added back to the
output.
"""

import argparse
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from agentmem.linux_cpu.allocator import keep_freed_memory
from agentmem.linux_cpu.blas import load_fast_blas

HOME = Path("~/.agentmem").expanduser()
keep_freed_memory()
load_fast_blas(HOME)

import mlx.core as mx  # noqa: E402  (after the BLAS)
import numpy as np  # noqa: E402
from machine import describe_machine, write_result  # noqa: E402

from agentmem.bench.harness.corpus import Window, Windows, cut_windows, read_corpus  # noqa: E402
from agentmem.bench.perplexity_scores import (  # noqa: E402
    Score,
    delta_percent,
    log_probabilities,
    score,
)
from agentmem.kvcache.attention import install_seam  # noqa: E402
from agentmem.kvcache.calibrate import calibration_tokens  # noqa: E402
from agentmem.models.loading import LoadedModel, load_model  # noqa: E402

BLOCK = 256
GROUP = 64
FACTORS = (1.0, 0.96, 0.92, 0.88, 0.84, 0.8)  # by which `mse` shrinks a group's range
FIT_FACTOR = {3: 0.86, 4: 0.96, 5: 0.98}  # by bits, least squared error of rotated keys and values
Quantizer = Callable[[mx.array, int], mx.array]  # x [..., D], bits: what its codes stand for


@dataclass(frozen=True)
class Moments:
    """Moments of one layer over the calibration text less its sinks, for each KV head.

    Means are [H, 1, D], second moments [H, D, D].
    """

    key_mean: np.ndarray
    value_mean: np.ndarray
    keys: np.ndarray  # centred
    values: np.ndarray  # centred
    queries: np.ndarray  # not centred: what matters is a query's product with an error
    outputs: np.ndarray  # of the rows of the output projection


@dataclass(frozen=True)
class Space:
    """How one layer enters cache space and leaves it.

    Matrices are [H, D, D], for row vectors, centres [H, 1, D].
    """

    key_in: np.ndarray
    query_in: np.ndarray  # the inverse of key_in, transposed
    value_in: np.ndarray
    value_out: np.ndarray  # the inverse of value_in
    key_centre: np.ndarray
    value_centre: np.ndarray


def minmax(x: mx.array, bits: int) -> mx.array:
    packed, scales, biases = mx.quantize(x, group_size=GROUP, bits=bits)
    return mx.dequantize(
        packed, _in_16_bits(scales), _in_16_bits(biases), group_size=GROUP, bits=bits
    )


def _in_16_bits(x: mx.array) -> mx.array:
    return x.astype(mx.float16).astype(x.dtype)


def mse(x: mx.array, bits: int) -> mx.array:
    """Shrink the range of each group by the factor that leaves the least squared error."""
    return _best(x, bits, lambda groups, scale, bias: _affine(groups, scale, bias, bits))


def refit(x: mx.array, bits: int) -> mx.array:
    """Take codes as by `mse`, then scale and bias by least squares, then codes again."""

    def value(groups: mx.array, scale: mx.array, bias: mx.array) -> mx.array:
        for _ in range(2):
            scale, bias = _least_squares(groups, _codes(groups, scale, bias, bits))
        return _affine(groups, scale, bias, bits)

    return _best(x, bits, value)


def fit(x: mx.array, bits: int) -> mx.array:
    """Shrink the range by one factor, then take scale and bias by least squares on the codes.

    It is the cheap form of `refit`.
    """
    groups = x.reshape(*x.shape[:-1], -1, GROUP)
    scale, bias = _shrunk(groups, FIT_FACTOR[bits], bits)
    codes = _codes(groups, scale, bias, bits)
    scale, bias = _least_squares(groups, codes)
    return (codes * _in_16_bits(scale) + _in_16_bits(bias)).reshape(x.shape)


def _best(
    x: mx.array, bits: int, value: Callable[[mx.array, mx.array, mx.array], mx.array]
) -> mx.array:
    """Return the nearest, by group, of what `value` makes of `x` with each factor.

    `value` takes groups, their scale and bias.
    """
    groups = x.reshape(*x.shape[:-1], -1, GROUP)
    best = groups
    least = mx.full((*groups.shape[:-1], 1), mx.inf)
    for factor in FACTORS:
        scale, bias = _shrunk(groups, factor, bits)
        tried = value(groups, scale, bias)
        error = ((tried - groups) ** 2).sum(axis=-1, keepdims=True)
        best = mx.where(error < least, tried, best)
        least = mx.minimum(error, least)
    return best.reshape(x.shape)


def _shrunk(groups: mx.array, factor: float, bits: int) -> tuple[mx.array, mx.array]:
    """Return scale and bias of each group's range, shrunk by `factor` about its middle."""
    low = groups.min(axis=-1, keepdims=True)
    high = groups.max(axis=-1, keepdims=True)
    middle = (low + high) / 2
    reach = (high - low) / 2 * factor
    return 2 * reach / (2**bits - 1), middle - reach


def _codes(groups: mx.array, scale: mx.array, bias: mx.array, bits: int) -> mx.array:
    return mx.clip(mx.round((groups - bias) / mx.maximum(scale, 1e-8)), 0, 2**bits - 1)


def _least_squares(groups: mx.array, codes: mx.array) -> tuple[mx.array, mx.array]:
    """Return (scale, bias) of the line that leads from codes to values."""
    mean_c = codes.mean(axis=-1, keepdims=True)
    mean_x = groups.mean(axis=-1, keepdims=True)
    spread = ((codes - mean_c) ** 2).sum(axis=-1, keepdims=True)
    together = ((codes - mean_c) * (groups - mean_x)).sum(axis=-1, keepdims=True)
    scale = together / mx.maximum(spread, 1e-8)
    return scale, mean_x - scale * mean_c


def _affine(groups: mx.array, scale: mx.array, bias: mx.array, bits: int) -> mx.array:
    scale = _in_16_bits(mx.maximum(scale, 1e-4))
    bias = _in_16_bits(bias)
    return _codes(groups, scale, bias, bits) * scale + bias


@dataclass(frozen=True)
class Variant:
    name: str
    what: str
    num_sinks: int = 4
    rotation: int = 64  # channels
    quantize: Quantizer = minmax
    keys: str = "as they are"  # or "balanced", "whitened": see _key_map
    values: str = "as they are"  # or "centred", "whitened"
    signs: bool = False  # random signs before the rotation
    # of layers that differ from `default_bits`
    bits: dict[int, tuple[int, int]] = field(default_factory=dict)
    default_bits: tuple[int, int] = (4, 4)  # keys, values

    def layer_bits(self, layer: int) -> tuple[int, int]:
        return self.bits.get(layer, self.default_bits)

    def ratio_to_fp16(self, num_layers: int) -> float:
        """Return the size of a sealed token over FP16."""
        total = 0
        for i in range(num_layers):
            total += sum(self.layer_bits(i))
        mean = total / (2 * num_layers)
        return (mean + 32 / GROUP) / 16


BASELINE = Variant("baseline", "the product: 4 bits, 4 sinks, rotation by 64, centred keys")
VARIANTS = (
    BASELINE,
    replace(BASELINE, name="k5v4", what="keys 5 bits (larger: 0.312)", default_bits=(5, 4)),
    replace(
        BASELINE, name="balance", what="query and key scales balanced by channel", keys="balanced"
    ),
    replace(
        BASELINE,
        name="whiten",
        what="the best linear map of keys (balance over all directions)",
        keys="whitened",
    ),
    replace(
        BASELINE, name="mse", what="range of a group shrunk for least squared error", quantize=mse
    ),
    replace(
        BASELINE,
        name="refit",
        what="the same, then scale and bias by least squares",
        quantize=refit,
    ),
    replace(
        BASELINE, name="fit", what="one factor, then scale and bias by least squares", quantize=fit
    ),
    replace(BASELINE, name="centred values", what="values centred too", values="centred"),
    replace(
        BASELINE,
        name="whiten values",
        what="the best linear map of values, by W_o",
        values="whitened",
    ),
    replace(BASELINE, name="sinks 0", what="no sinks kept", num_sinks=0),
    replace(BASELINE, name="sinks 8", what="8 sinks kept", num_sinks=8),
    replace(BASELINE, name="sinks 16", what="16 sinks kept", num_sinks=16),
    replace(BASELINE, name="rotation 16", what="rotated by groups of 16", rotation=16),
    replace(BASELINE, name="rotation 32", what="rotated by groups of 32", rotation=32),
    replace(BASELINE, name="signs", what="random signs before the rotation", signs=True),
    replace(BASELINE, name="k5v3", what="keys 5 bits, values 3", default_bits=(5, 3)),
    replace(
        BASELINE,
        name="edge layers",
        what="keys of the first and last 3 layers 5 bits, of the middle 6 layers 3",
        bits=dict.fromkeys((0, 1, 2, 27, 28, 29), (5, 4)) | dict.fromkeys(range(12, 18), (3, 4)),
    ),
    replace(BASELINE, name="balance+refit", what="both", keys="balanced", quantize=refit),
    replace(BASELINE, name="k5v3+fit", what="both", default_bits=(5, 3), quantize=fit),
    replace(BASELINE, name="k5v3+refit", what="both", default_bits=(5, 3), quantize=refit),
    replace(
        BASELINE,
        name="k5v3+balance+fit",
        what="all",
        default_bits=(5, 3),
        quantize=fit,
        keys="balanced",
    ),
    replace(
        BASELINE,
        name="whiten+refit",
        what="keys and values",
        keys="whitened",
        values="whitened",
        quantize=refit,
    ),
)


class LayerCache:
    """One layer of one sequence, as mlx-lm's model files and the seam see it.

    It is fed a block or less at a time.
    """

    def __init__(self, variant: Variant, layer: int, space: Space | None):
        """`space` is None where nothing is quantized."""
        self.offset = 0
        self._variant = variant
        self._bits = variant.layer_bits(layer)
        self._space: dict[str, mx.array] = {}
        if space:
            for name, a in vars(space).items():
                self._space[name] = mx.array(a.astype(np.float32))
        # (keys, values) of sealed blocks, then the open one
        self._kept: list[tuple[mx.array, mx.array]] = []

    def make_mask(self, n: int, **_: Any) -> None:
        return None

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        if self._space:
            keys = (keys - self._space["key_centre"]) @ self._space["key_in"]
            values = (values - self._space["value_centre"]) @ self._space["value_in"]
        self._kept.append((keys, values))
        self.offset += keys.shape[2]
        return keys, values

    def attend(self, queries: mx.array, scale: float, sinks: mx.array | None) -> mx.array:
        keys = mx.concatenate([keys for keys, _ in self._kept], axis=2)
        values = mx.concatenate([values for _, values in self._kept], axis=2)
        if not self._space:
            return _attention(queries, keys, values, scale)
        heads = keys.shape[1]
        out = _attention(_by_head(queries, self._space["query_in"], heads), keys, values, scale)
        if self._kept[-1][0].shape[2] == BLOCK:
            self._seal()
        out = _by_head(out, self._space["value_out"], heads)
        return out + mx.repeat(self._space["value_centre"], out.shape[1] // heads, axis=0)

    def _seal(self) -> None:
        keys, values = self._kept[-1]
        key_bits, value_bits = self._bits
        self._kept[-1] = self._code(keys, key_bits), self._code(values, value_bits)

    def _code(self, x: mx.array, bits: int) -> mx.array:
        """Return what codes of a block stand for; the sequence's first tokens are not coded."""
        if bits == 16:
            return x
        n = self._variant.num_sinks if len(self._kept) == 1 else 0
        return mx.concatenate([x[:, :, :n], self._variant.quantize(x[:, :, n:], bits)], axis=2)

    def arrays(self) -> list[mx.array]:
        return list(itertools.chain(*self._kept))


def _attention(q: mx.array, k: mx.array, v: mx.array, scale: float) -> mx.array:
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask="causal")


def _by_head(x: mx.array, matrices: mx.array, heads: int) -> mx.array:
    """Multiply x [1, Hq, L, D] by matrices [H, D, D]: query heads in groups share a KV head."""
    grouped = x.reshape(heads, -1, x.shape[-1]) @ matrices
    return grouped.reshape(x.shape)


class _Collector(LayerCache):
    """Quantizes nothing, and keeps what passes through."""

    def __init__(self) -> None:
        super().__init__(BASELINE, 0, None)

    def attend(self, queries: mx.array, scale: float, sinks: mx.array | None) -> mx.array:
        self.queries = queries
        return super().attend(queries, scale, sinks)


def collect_moments(loaded: LoadedModel) -> list[Moments]:
    model: Any = loaded.model
    tokens = calibration_tokens(
        lambda text: loaded.tokenizer.encode(text, add_special_tokens=False)
    )
    layers = [_Collector() for _ in model.layers]
    mx.eval(model(mx.array([tokens]), cache=layers), [c.arrays() for c in layers])
    return [
        _moments(c, np.array(layer.self_attn.o_proj.weight))
        for c, layer in zip(layers, model.layers, strict=True)
    ]


def _moments(collected: _Collector, o_proj: np.ndarray) -> Moments:
    first = BASELINE.num_sinks
    passed = [*collected.arrays(), collected.queries]
    keys, values, queries = [np.array(a[0, :, first:]) for a in passed]
    heads = keys.shape[0]
    dim = keys.shape[-1]
    key_mean = keys.mean(axis=1, keepdims=True)
    value_mean = values.mean(axis=1, keepdims=True)
    rows = o_proj.T.reshape(heads, -1, dim, o_proj.shape[0])  # [H, query heads of each, D, hidden]
    return Moments(
        key_mean=key_mean,
        value_mean=value_mean,
        keys=_second(keys - key_mean),
        values=_second(values - value_mean),
        queries=_second(queries.reshape(heads, -1, dim)),
        outputs=np.einsum("hgdo,hgeo->hde", rows, rows),
    )


def _second(x: np.ndarray) -> np.ndarray:
    return np.einsum("hnd,hne->hde", x, x) / x.shape[1]


def make_space(variant: Variant, m: Moments) -> Space:
    rotation = _rotation(variant, m.keys.shape[-1])
    keys = _map(variant.keys, m.keys, m.queries) @ rotation
    values = _map(variant.values, m.values, m.outputs) @ rotation
    centre = m.value_mean if variant.values == "centred" else np.zeros_like(m.value_mean)
    return Space(
        key_in=keys,
        query_in=np.linalg.inv(keys).swapaxes(1, 2),
        value_in=values,
        value_out=np.linalg.inv(values),
        key_centre=m.key_mean,
        value_centre=centre,
    )


def _rotation(variant: Variant, dim: int) -> np.ndarray:
    size = variant.rotation
    block = np.array(mx.hadamard_transform(mx.eye(size), scale=size**-0.5))
    matrix = np.kron(np.eye(dim // size), block)
    if not variant.signs:
        return matrix
    signs = np.random.default_rng(0).choice([-1.0, 1.0], dim)
    return signs[:, None] * matrix


def _map(kind: str, x: np.ndarray, readers: np.ndarray) -> np.ndarray:
    """Return [H, D, D] that vectors with second moments x go through before the rotation.

    What reads them goes through its inverse.

    After a rotation errors are alike in all directions and as large as the vectors: their variance
    is in proportion to tr(P' x P), and what a reader sees of it to tr(P^-1 r P^-T). The product is
    least where both matrices are equal: P P' = the geometric mean of x^-1 and r; for a diagonal P,
    P^4 = diag(r) / diag(x).
    """
    if kind in ("as they are", "centred"):
        return np.broadcast_to(np.eye(x.shape[-1]), x.shape)
    if kind == "balanced":
        r = np.einsum("hdd->hd", readers)
        k = np.einsum("hdd->hd", x)
        ratio = (r + 1e-3 * r.mean()) / (k + 1e-3 * k.mean())
        return np.eye(x.shape[-1]) * ratio[:, None] ** 0.25
    return np.stack([_whitening(a, b) for a, b in zip(x, readers, strict=True)])


def _whitening(x: np.ndarray, readers: np.ndarray) -> np.ndarray:
    """Return the root of that geometric mean.

    It is turned so that the moments come out diagonal, for the rotation to mix.
    """
    dim = len(x)
    x = x + 1e-3 * np.trace(x) / dim * np.eye(dim)
    readers = readers + 1e-3 * np.trace(readers) / dim * np.eye(dim)
    root = _power(x, 0.5)
    inverse = _power(x, -0.5)
    p = _power(inverse @ _power(root @ readers @ root, 0.5) @ inverse, 0.5)
    return p @ np.linalg.eigh(p @ x @ p)[1]


def _power(symmetric: np.ndarray, exponent: float) -> np.ndarray:
    values, vectors = np.linalg.eigh(symmetric)
    return (vectors * values**exponent) @ vectors.T


class Run:
    """All variants side by side through the windows of one corpus."""

    def __init__(self, loaded: LoadedModel, variants: tuple[Variant, ...], moments: list[Moments]):
        self._model: Any = loaded.model
        self._variants = variants
        self._spaces = []
        for variant in variants:
            self._spaces.append([make_space(variant, m) for m in moments])

    def score(self, windows: Iterator[Window]) -> tuple[list[list[Score]], list[list[Score]]]:
        """Return scores by variant and window, and those of the unquantized cache, its only row."""
        found = [self._score_window(window) for window in windows]
        reference, *scores = [list(of) for of in zip(*found, strict=True)]
        return scores, [reference]

    def _score_window(self, window: Window) -> list[Score]:
        layers = range(len(self._model.layers))
        plain = [LayerCache(BASELINE, i, None) for i in layers]
        caches = [plain]
        for variant, spaces in zip(self._variants, self._spaces, strict=True):
            caches.append([LayerCache(variant, i, spaces[i]) for i in layers])
        scores = [Score()] * len(caches)
        for start in range(0, len(window.inputs), BLOCK):
            tokens = window.inputs[start : start + BLOCK]
            targets = window.targets[start : start + BLOCK]
            reference = None
            for i, cache in enumerate(caches):
                log_probs = log_probabilities(self._model(mx.array([tokens]), cache=cache)[0])
                mx.eval([layer.arrays() for layer in cache])
                reference = log_probs if reference is None else reference
                scores[i] = scores[i] + score(reference, log_probs, targets)
            print(".", end="", flush=True)
        return scores


def rows_of(
    variants: tuple[Variant, ...], run: Run, windows: Iterator[Window], num_layers: int
) -> list[dict[str, Any]]:
    scored, [reference] = run.score(windows)
    rows = []
    for variant, scores in zip(variants, scored, strict=True):
        total = sum(scores, Score())
        kl = total.kl / total.tokens
        least = sum(scored[0], Score()).kl / total.tokens
        rows.append(
            {
                "variant": variant.name,
                "what": variant.what,
                "ratio_to_fp16": variant.ratio_to_fp16(num_layers),
                "kl": kl,
                "kl_over_baseline": kl / least,
                "delta_percent": delta_percent(reference, scores)[0],
                "top1": total.agreed / total.tokens,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--corpus", type=Path, help="text file (default: the text of pydoc_data.topics)"
    )
    parser.add_argument("--windows", type=int, default=2, help="of 2,048 tokens, of each corpus")
    parser.add_argument(
        "--only", help="names of variants, comma-separated; the baseline always runs"
    )
    parser.add_argument("--json", type=Path, help="where to write the result")
    args = parser.parse_args()
    loaded = load_model("demo", HOME)
    install_seam(loaded.model)
    names = args.only.split(",") if args.only else [v.name for v in VARIANTS]
    variants = tuple(v for v in VARIANTS if v is BASELINE or v.name in names)
    run = Run(loaded, variants, collect_moments(loaded))
    asked = Windows(window=2048, stride=2048, tokens=2048 * args.windows)
    corpus, text = read_corpus(args.corpus)
    tokens = loaded.tokenizer.encode(
        text[: 32 * asked.num_scored], add_special_tokens=False, verbose=False
    )
    rows = rows_of(variants, run, cut_windows(tokens, asked, []), len(loaded.model.layers))
    print(f"\n{corpus}")
    for row in rows:
        kl = f"KL {row['kl']:.5f} ({row['kl_over_baseline']:.2f})"
        print(
            f"{row['variant']:<16} {row['ratio_to_fp16']:.3f}  {kl}  "
            f"dPPL {row['delta_percent']:+.2f} %  top-1 {row['top1']:.2%}  {row['what']}"
        )
    result = {
        "benchmark": "quality",
        "machine": describe_machine(),
        "model": loaded.name,
        "corpus": corpus,
    }
    write_result(result | {"tokens": asked.num_scored, "window": 2048, "rows": rows}, args.json)


if __name__ == "__main__":
    main()
