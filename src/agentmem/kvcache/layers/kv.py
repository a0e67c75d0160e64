"""Keys and values of one layer: what all kinds of working copy have in common."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ..backend import AttentionBackend
from ..block import Arrays
from ..quantize import TOKENS, Codes, LayerCodec, Stored, concatenate_codes
from ..spec import KVCacheSpec, LayerSpec

CodesPair = tuple[Codes, Codes]  # of keys and of values
DensePair = tuple[mx.array, mx.array]
STEP = 256  # tokens by which a working copy grows


def capacity_for(num_tokens: int) -> int:
    """Round a number of tokens up to whole steps."""
    return -(-num_tokens // STEP) * STEP


def most_capacity(spec: KVCacheSpec, layer: LayerSpec, num_tokens: int) -> int:
    """Return the tokens that a layer's working copy has room for, of a sequence of `num_tokens`.

    With a window: those that are seen, the open block, and some more to move rarely.
    """
    whole = capacity_for(num_tokens)
    if layer.window is None:
        return whole
    return min(whole, capacity_for(layer.window + spec.block_size + STEP))


class KVLayer(ABC):
    """One layer's keys and values of one running sequence, and what this pass has sealed of them.

    Arrays of a layer are named without its stack: "k.packed".
    """

    def __init__(self, spec: KVCacheSpec, codec: LayerCodec, backend: AttentionBackend):
        self.codec, self.layer, self.backend = codec, codec.layer, backend
        self._spec = spec
        self._sealed: dict[int, Arrays] = {}  # by index of the block; not evaluated
        self._prefix: Arrays = {}  # what the open block starts with, of a block that was cut

    @abstractmethod
    def reserve(self, num_tokens: int) -> None:
        """Make room for a sequence of `num_tokens` tokens."""

    @abstractmethod
    def load(self, sources: Sequence[Arrays], ends: Arrays, base: int, capacity: int) -> None:
        """Start from `sources`, this layer's part of blocks from position `base` on.

        `ends` are the open block's tokens in full precision; {} where there are none.
        """

    @abstractmethod
    def write(self, start: int, new: Stored) -> None:
        """Take keys and values of the positions from `start` on."""

    @abstractmethod
    def read(self, start: int, stop: int) -> DensePair:
        """Return keys and values [1, H, n, D] of positions of the open block, as written."""

    @abstractmethod
    def attend(self, q: mx.array, stop: int, scale: float, sinks: mx.array | None) -> mx.array:
        """Attend from q [1, Hq, n, D], of the n positions before `stop`, to all that they see."""

    @abstractmethod
    def take_codes(self, start: int, codes: CodesPair, sinks: DensePair | None) -> None:
        """Let the tokens from `start` be what `codes` stand for, the first of them `sinks`."""

    @abstractmethod
    def arrays(self) -> list[mx.array]:
        """Return the arrays of the working copy."""

    def keep_prefix(self, parts: Arrays) -> None:
        """Let the open block, when it is sealed, start with the codes of a block that was cut."""
        self._prefix = parts

    def seal(self, block: int) -> None:
        """Make the codes of a block whose last token is written, and go on from them."""
        start = block * self._spec.block_size
        k, v = self.read(start, start + self._spec.block_size)
        prefix, self._prefix = self._prefix, {}
        if self._spec.bits is None:
            self._sealed[block] = {"k.full": k, "v.full": v}
            return
        k_codes, v_codes = self.codec.encode("k", k), self.codec.encode("v", v)
        if prefix:
            k_codes = _with_prefix(concatenate_codes([prefix], "k"), k_codes)
            v_codes = _with_prefix(concatenate_codes([prefix], "v"), v_codes)
        parts = _named("k", k_codes) | _named("v", v_codes)
        sinks = None
        if block == 0:
            sinks = k[:, :, : self._spec.num_sinks], v[:, :, : self._spec.num_sinks]
            parts |= {"k.sinks": sinks[0], "v.sinks": sinks[1]}
        self.take_codes(start, (k_codes, v_codes), sinks)
        self._sealed[block] = parts

    def adopt(self, block: int, parts: Arrays) -> None:
        """Go on from `parts`, this layer's of a block that another sequence sealed.

        The block has the same tokens; this sequence has sealed it too.
        """
        sinks = (parts["k.sinks"], parts["v.sinks"]) if "k.sinks" in parts else None
        codes = concatenate_codes([parts], "k"), concatenate_codes([parts], "v")
        self.take_codes(block * self._spec.block_size, codes, sinks)

    def sealing(self) -> list[mx.array]:
        """Return what this pass has sealed, and the working copy then; not evaluated."""
        parts = [a for arrays in self._sealed.values() for a in arrays.values()]
        return parts + self.arrays() if parts else []

    def take_sealed(self) -> dict[int, Arrays]:
        """Hand over what this pass has sealed, by index of the block."""
        sealed, self._sealed = self._sealed, {}
        return sealed


def _with_prefix(prefix: Codes, codes: Codes) -> Codes:
    """Tokens that came from a block cut inside keep the codes they had."""
    n = prefix.packed.shape[TOKENS]
    pairs = zip(prefix, codes, strict=True)
    return Codes(*(mx.concatenate([old, new[:, :, n:]], TOKENS) for old, new in pairs))


def _named(part: str, codes: Codes) -> Arrays:
    return {f"{part}.{field}": a for field, a in codes._asdict().items()}


@dataclass(frozen=True)
class Positions:
    """The positions at which the sequences of a batch stand before a pass."""

    starts: tuple[int, ...]  # tokens of each that are cached
    offset: int | mx.array  # the same as models want it: of one sequence an int, else [B]


class KVView:
    """What models ask of any cache of keys and values, and what some set on it.

    It stands for one layer of B sequences during one pass.
    """

    start_position = 0  # llama 4 builds a mask from it, which `attend` does not look at
    keys: mx.array | None = None
    values: mx.array | None = None

    def __init__(self, layer: LayerSpec, at: Positions):
        self._layer, self._starts = layer, at.starts
        self.offset = at.offset

    def make_mask(self, n: int, return_array: bool = False, window_size: int | None = None) -> Any:
        """Return what the next `n` positions see of the columns that the cache returns for them.

        Of a batch, `n` is 1. Raises ValueError for a window that is not the layer's.
        """
        return true_mask(self._layer, self._starts, n, return_array, window_size)

    def maybe_trim_front(self) -> None:
        """Do nothing: llama 4's way to keep a chunk only."""

    def empty(self) -> bool:
        """Tell whether nothing is cached."""
        return isinstance(self.offset, int) and self.offset == 0


def true_mask(
    layer: LayerSpec,
    starts: Sequence[int],
    n: int,
    return_array: bool,
    window_size: int | None,
) -> Any:
    """Return None, "causal", or an array of bool: see KVView.make_mask."""
    if window_size not in (None, layer.window):
        kept = layer.window or "all"
        raise ValueError(f"a window of {window_size} over a cache that keeps {kept}")
    if len(starts) == 1:
        return _mask_of_one(layer, starts[0], n, return_array)
    assert n == 1
    seen = [start + 1 - layer.first_visible(start) for start in starts]
    if min(seen) == max(seen):
        return None
    return mx.arange(max(seen))[None] >= max(seen) - mx.array(seen)[:, None, None, None]


def _mask_of_one(layer: LayerSpec, start: int, n: int, return_array: bool) -> Any:
    if n == 1:
        return None
    first = layer.first_visible(start)
    if not return_array and layer.first_visible(start + n - 1) == first:
        return "causal"
    return layer.sees(mx.arange(start, start + n)[:, None], mx.arange(first, start + n)[None])
