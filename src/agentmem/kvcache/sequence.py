"""The running form of a cache: what one sequence computes with while it prefills and decodes."""

from dataclasses import replace
from itertools import pairwise

import mlx.core as mx

from ..tensors import TensorName, stack_part
from .block import (
    TOKENS,
    Arrays,
    SealedBlock,
    Snapshot,
    Tail,
    compact,
    concatenate_codes,
)
from .layers.working import AttentionLayer, CodesLayer, DenseLayer, RecurrentLayer, stays_codes
from .quantize import CacheSpace, Codes, LayerCodec, Stored
from .spec import KVCacheSpec


class SequenceCache:
    """The cache of one running sequence, over all layers.

    A token sees its own block in full precision and every earlier block as codes, whatever the
    chunks: `attend` walks a chunk block by block and seals each block when its last token has
    attended. A model's forward pass calls it once per layer; `advance` then closes the pass. A pass
    over a spec that is `stepwise` ends at a block boundary at most.
    """

    def __init__(
        self,
        spec: KVCacheSpec,
        space: CacheSpace,
        snapshot: Snapshot | None = None,
        *,
        capacity: int = 0,
        on_codes: bool = False,
        checkpoint_at: int | None = None,
        last_state: int = 0,
    ):
        """`capacity`: tokens known to come, the snapshot's included, so that prefill does not copy
        as it grows.

        `checkpoint_at`: the position, beside every `state_interval` of the spec, whose recurrent
        state is to be kept: where the prompt's last message ends, say. Once its block is full it
        stays if it is a quarter of the interval away from the one before, `last_state` (0: none),
        so that many short turns don't store a state each.
        """
        self._spec, self.space, self._checkpoint_at, self._last_state = (
            spec,
            space,
            checkpoint_at,
            last_state,
        )
        self._attention: dict[int, AttentionLayer] = {}
        self._recurrent: dict[int, RecurrentLayer] = {}
        for i, layer in enumerate(spec.layers):
            if layer.kind == "recurrent":
                self._recurrent[i] = RecurrentLayer(layer)
            else:
                kind = CodesLayer if stays_codes(spec, layer, on_codes=on_codes) else DenseLayer
                self._attention[i] = kind(spec, LayerCodec(spec, space, i))
        self._sealing: dict[
            int, dict[int, Arrays]
        ] = {}  # by block index and layer, named without the stack
        snapshot = snapshot or Snapshot()
        self.blocks: list[SealedBlock] = list(snapshot.blocks)
        tail = snapshot.tail
        self._tail_prefix = (tail.prefix, tail.prefix_len) if tail else (None, 0)
        self.length = len(self.blocks) * spec.block_size + (tail.num_tokens if tail else 0)
        self._states: Arrays = {}  # snapshots in the open block
        if self.length:
            self._load(snapshot, max(capacity, self.length + 1))
        else:
            for work in self._attention.values():
                work.reserve(capacity)

    @property
    def num_sealed(self) -> int:
        """Tokens in sealed blocks."""
        return len(self.blocks) * self._spec.block_size

    @property
    def pass_limit(self) -> int:
        """Tokens that a pass may have, where it must end at block boundaries and at a state that is
        to be kept.
        """
        limit = self._spec.block_size - self.length % self._spec.block_size
        ahead = (self._checkpoint_at or 0) - self.length
        return min(limit, ahead) if self._spec.recurrent and ahead > 0 else limit

    def attend(
        self, layer: int, q: mx.array, new: Stored, scale: float, sinks: mx.array | None = None
    ) -> mx.array:
        """q [1, Hq, L, Dk] and their keys and values in cache space, for the next L positions."""
        work, size = self._attention[layer], self._spec.block_size
        start, stop = self.length, self.length + q.shape[2]
        whole = self._spec.bits is None and self._spec.layers[layer].window is None
        # where a sealed block's value is what it was, and nothing leaves the window, there is
        # nothing to walk for
        bounds = (
            [start, stop]
            if whole
            else [start, *range((start // size + 1) * size, stop, size), stop]
        )
        out = []
        for lo, hi in pairwise(bounds):
            span = slice(lo - start, hi - start)
            work.write(lo, tuple(a[:, :, span] for a in new))
            out.append(work.attend(q[:, :, span], hi, scale, sinks))
            for block in range(lo // size, hi // size):
                self._seal(layer, block)
        return out[0] if len(out) == 1 else mx.concatenate(out, axis=2)

    def fetch(self, layer: int, new: Stored) -> tuple[mx.array, mx.array]:
        """Keys and values of the next positions, within one block, of a dense layer: all [1, H, T,
        D] that they see.
        """
        work, size = self._attention[layer], self._spec.block_size
        start, stop = self.length, self.length + new[0].shape[TOKENS]
        assert isinstance(work, DenseLayer) and (stop - 1) // size == start // size
        work.write(start, new)
        keys, vals, _ = work.visible(start, stop)
        if stop % size == 0:
            self._seal(layer, start // size)
        return keys, vals

    def is_dense(self, layer: int) -> bool:
        return isinstance(self._attention[layer], DenseLayer)

    def sealing(self, layer: int) -> list[mx.array]:
        """What this pass has sealed of a layer, and its working copy then; not evaluated."""
        parts = [a for layers in self._sealing.values() for a in layers.get(layer, {}).values()]
        return parts + self._attention[layer].arrays() if parts else []

    def state(self, layer: int) -> list[mx.array | None]:
        """[1, ...] each; None before the first token."""
        return self._recurrent[layer].state

    def set_state(self, layer: int, state: list[mx.array | None]) -> None:
        self._recurrent[layer].state = state

    def advance(self, num_tokens: int) -> list[SealedBlock]:
        """Count `num_tokens` more positions; returns the blocks that filled up, in order, not
        evaluated yet.
        """
        first, size = self.length // self._spec.block_size, self._spec.block_size
        self.length += num_tokens
        if self._spec.recurrent and (
            self.length == self._checkpoint_at or self.length % self._spec.state_interval == 0
        ):
            self._states = self._state_arrays()
        fresh = [
            SealedBlock(self._stack(self._sealing.get(block, {}), self._spec.stacks))
            for block in range(first, self.length // size)
        ]
        self._sealing.clear()
        if fresh:
            fresh[-1] = fresh[-1].with_arrays(
                self._worth_keeping()
            )  # a stepwise pass fills one at most
            self._tail_prefix, self._states = (None, 0), {}
        self.blocks += fresh
        if fresh and (self._spec.windowed or self._spec.recurrent):
            self._let_go()
        return fresh

    def adopt(self, index: int, block: SealedBlock) -> None:
        """Take `block`, which another sequence sealed for the same tokens, in place of our own."""
        self.blocks[index] = block.only(self._spec.needed(index, self.length))
        if self.length == (index + 1) * self._spec.block_size:
            self._load_state(block.arrays, self._spec.block_size)
        for i, work in self._attention.items():
            parts = self._unstack(block.arrays, i)
            if self._spec.bits is None:
                assert isinstance(work, DenseLayer)
                work.replace(index * self._spec.block_size, parts["k.full"], parts["v.full"])
                continue
            sinks = (parts["k.sinks"], parts["v.sinks"]) if "k.sinks" in parts else None
            codes = concatenate_codes([parts], "k"), concatenate_codes([parts], "v")
            work.seal(index * self._spec.block_size, codes, sinks)

    def snapshot(self) -> Snapshot:
        """The idle form, with the state at its end. Its tail is a copy: the working copy may go on
        or be dropped.
        """
        n = self.length - self.num_sealed
        if n == 0:
            states = compact(self._state_arrays()) if self.blocks else {}
            return Snapshot(
                (*self.blocks[:-1], *(block.with_arrays(states) for block in self.blocks[-1:]))
            )
        prefix, prefix_len = self._tail_prefix
        ends = {
            i: work.read(self.num_sealed + prefix_len, self.length)
            for i, work in self._attention.items()
        }
        full = self._stack(
            {i: {"k.full": k, "v.full": v} for i, (k, v) in ends.items()}, self._spec.stacks
        )
        tail = Tail(n, full, prefix, prefix_len, self._states | self._state_arrays())
        return Snapshot(tuple(self.blocks), tail.compact())

    def kept_keys(self) -> dict[int, mx.array]:
        """By attention layer the keys that its dense working copy holds, [1, H, n, Dk]."""
        return {
            i: work.kept(self.length)
            for i, work in self._attention.items()
            if isinstance(work, DenseLayer)
        }

    def arrays(self) -> list[mx.array]:
        """What a forward pass leaves to evaluate."""
        return [
            a
            for work in (*self._attention.values(), *self._recurrent.values())
            for a in work.arrays()
        ]

    def _seal(self, layer: int, block: int) -> None:
        work, size = self._attention[layer], self._spec.block_size
        k, v = work.read(block * size, (block + 1) * size)
        if self._spec.bits is None:
            parts = {"k.full": k, "v.full": v}
        else:
            codec = LayerCodec(self._spec, self.space, layer)
            codes = codec.encode("k", k), codec.encode("v", v)
            if block == len(self.blocks):  # the block that was open when the pass began
                codes = (
                    self._with_prefix(layer, "k", codes[0]),
                    self._with_prefix(layer, "v", codes[1]),
                )
            parts = {
                f"{part}.{field}": a
                for part, c in zip("kv", codes, strict=True)
                for field, a in c._asdict().items()
            }
            sinks = None
            if block == 0:
                sinks = k[:, :, : self._spec.num_sinks], v[:, :, : self._spec.num_sinks]
                parts |= {"k.sinks": sinks[0], "v.sinks": sinks[1]}
            work.seal(block * size, codes, sinks)
        self._sealing.setdefault(block, {})[layer] = parts

    def _with_prefix(self, layer: int, part: str, codes: Codes) -> Codes:
        """Tokens that came from a block cut inside keep the codes they had."""
        prefix, n = self._tail_prefix
        if prefix is None:
            return codes
        had = concatenate_codes([self._unstack(prefix.arrays, layer)], part)
        return Codes(
            *(mx.concatenate([a, b[:, :, n:]], TOKENS) for a, b in zip(had, codes, strict=True))
        )

    def _let_go(self) -> None:
        """Of states, and of what no window reaches back to any more; the block pool may still hold
        it.
        """
        first = min(
            (layer.first_visible(self.length) for layer in self._spec.layers if layer.window),
            default=self.length,
        )
        for i in range(len(self.blocks) - 1, -1, -1):
            block = self.blocks[i].only(self._spec.needed(i, self.length))
            if block.parts == self.blocks[i].parts and (i + 1) * self._spec.block_size <= first:
                break
            self.blocks[i] = block

    def _load(self, snapshot: Snapshot, capacity: int) -> None:
        """Layer by layer, so that what is decoded on the way takes the memory of one layer, not of
        all.
        """
        tail, size = snapshot.tail, self._spec.block_size
        for i, work in self._attention.items():
            first = min(
                self._spec.layers[i].first_visible(self.length) // size, len(snapshot.blocks)
            )
            parts = [self._unstack(block.arrays, i) for block in snapshot.blocks[first:]]
            if tail and tail.prefix:
                parts.append(self._unstack(tail.prefix.arrays, i))
            work.load(parts, self._unstack(tail.full, i) if tail else {}, first * size, capacity)
            mx.async_eval(work.arrays())
        if tail:
            self._load_state(tail.states, tail.num_tokens)
        elif snapshot.blocks:
            self._load_state(snapshot.blocks[-1].arrays, size)

    # -- recurrent state

    def _state_arrays(self) -> Arrays:
        """A snapshot, named by where in the open block it is taken."""
        offset = (self.length - 1) % self._spec.block_size + 1
        per_layer = {
            i: {_state_name(j, offset): a for j, a in enumerate(work.arrays())}
            for i, work in self._recurrent.items()
        }
        return self._stack(per_layer, self._spec.state_stacks)

    def _worth_keeping(self) -> Arrays:
        """Of the snapshot in the block that just filled up."""
        if not self._states:
            return {}
        offset = max(TensorName.parse(name).offset or 0 for name in self._states)
        position, interval = self.length - self._spec.block_size + offset, self._spec.state_interval
        if position % interval and self._last_state and position - self._last_state < interval // 4:
            return {}
        self._last_state = position
        return self._states

    def _load_state(self, arrays: Arrays, offset: int) -> None:
        there = {n: a for n, a in arrays.items() if TensorName.parse(n).offset == offset}
        if not there:
            return
        for i, work in self._recurrent.items():
            parts = self._unstack(there, i)
            work.state = [parts[_state_name(j, offset)] for j in range(len(work.state))]

    # -- layers in stacks

    @staticmethod
    def _stack(per_layer: dict[int, Arrays], stacks: tuple[tuple[int, ...], ...]) -> Arrays:
        """By layer {"k.packed": [1, ...]} to {"k0.packed": [layers of stack 0, ...]}."""
        stacked: Arrays = {}
        for s, stack in enumerate(stacks):
            for text in per_layer.get(stack[0], {}):
                name = replace(TensorName.parse(text), stack=stack_part(s))
                stacked[str(name)] = _joined([per_layer[i][text] for i in stack])
        return stacked

    def _unstack(self, arrays: Arrays, layer: int) -> Arrays:
        """Return the arrays of one layer, [1, ...] each, named without the stack."""
        s, j = self._spec.position_in_stack[layer]
        is_recurrent = layer in self._recurrent
        found: Arrays = {}
        for text, array in arrays.items():
            name = TensorName.parse(text)
            if name.stack == stack_part(s) and (name.role == "s") == is_recurrent:
                found[str(replace(name, stack=""))] = array[j : j + 1]
        return found


def _state_name(index: int, offset: int) -> str:
    """Name array `index` of one layer's state after `offset` tokens of a block."""
    return str(TensorName("s", "", str(index), offset))


def _joined(arrays: list[mx.array]) -> mx.array:
    """Along the layers, as a copy: one that were a view would keep a whole working copy in RAM."""
    return mx.concatenate(arrays, axis=0) if len(arrays) > 1 else mx.contiguous(arrays[0])
