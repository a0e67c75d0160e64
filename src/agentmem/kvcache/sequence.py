"""The running form of a cache: what one sequence computes with while it prefills and decodes."""

from dataclasses import replace

import mlx.core as mx

from ..tensors import TensorName, stack_part
from .backend import AttentionBackend, attention_backend
from .block import Arrays, SealedBlock, Snapshot, Tail, compact
from .layers.dense import DenseLayer
from .layers.kv import KVLayer
from .layers.recurrent import RecurrentLayer
from .layers.working import new_layer
from .quantize import CacheSpace
from .spec import KVCacheSpec

_ANY_LENGTH = 1 << 30


class SequenceCache:
    """The cache of one running sequence, over all layers.

    A token sees its own block in full precision and every earlier block as codes, whatever the
    chunks. A model's forward pass writes to `layers` and attends to them, through the views of
    batch.py; `advance` then closes the pass. A pass over a spec that is `stepwise` ends at a block
    boundary at most: `pass_limit`.
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
        backend: AttentionBackend | None = None,
    ):
        """Go on from `snapshot`, or from nothing.

        `capacity`: tokens known to come, the snapshot's included, so that prefill does not copy as
        it grows.

        `checkpoint_at`: the position, beside every `state_interval` of the spec, whose recurrent
        state is to be kept: where the prompt's last message ends, say. Once its block is full it
        stays if it is a quarter of the interval away from the one before, `last_state` (0: none),
        so that many short turns don't store a state each.

        `backend`: the way of attention; None: the one for MLX's default device.
        """
        self._spec = spec
        self._checkpoint_at, self._last_state = checkpoint_at, last_state
        backend = backend or attention_backend()
        self.layers = [
            new_layer(spec, space, i, on_codes=on_codes, backend=backend)
            for i in range(len(spec.layers))
        ]
        self._kv = {i: w for i, w in enumerate(self.layers) if isinstance(w, KVLayer)}
        self._recurrent = {i: w for i, w in enumerate(self.layers) if isinstance(w, RecurrentLayer)}
        snapshot = snapshot or Snapshot()
        self.blocks: list[SealedBlock] = list(snapshot.blocks)
        tail = snapshot.tail
        self._tail_prefix = (tail.prefix, tail.prefix_len) if tail else (None, 0)
        self.length = len(self.blocks) * spec.block_size + (tail.num_tokens if tail else 0)
        self._states: Arrays = {}  # snapshots in the open block
        if self.length:
            self._load(snapshot, max(capacity, self.length + 1))
        else:
            for work in self._kv.values():
                work.reserve(capacity)

    @property
    def num_sealed(self) -> int:
        """Tokens in sealed blocks."""
        return len(self.blocks) * self._spec.block_size

    @property
    def pass_limit(self) -> int:
        """Tokens that the next pass may have.

        A stepwise one ends at a block boundary, and at a state that is to be kept.
        """
        if not self._spec.stepwise:
            return _ANY_LENGTH
        limit = self._spec.block_size - self.length % self._spec.block_size
        ahead = (self._checkpoint_at or 0) - self.length
        return min(limit, ahead) if self._spec.resumes_at_snapshots and ahead > 0 else limit

    @property
    def batchable(self) -> bool:
        """Tell whether the sequence may run in a batch.

        What an empty recurrent state stands for only the model knows.
        """
        return self.length > 0 or not self._recurrent

    def advance(self, num_tokens: int) -> list[SealedBlock]:
        """Count `num_tokens` more positions; return the blocks that filled up, in order.

        They are not evaluated yet.
        """
        first, size = self.length // self._spec.block_size, self._spec.block_size
        self.length += num_tokens
        if self.length == self._checkpoint_at or self.length % self._spec.state_interval == 0:
            self._states = self._state_arrays()
        fresh = self._take_sealed(range(first, self.length // size))
        if fresh:
            # a stepwise pass fills one at most
            fresh[-1] = fresh[-1].with_arrays(self._worth_keeping())
            self._tail_prefix, self._states = (None, 0), {}
        self.blocks += fresh
        if fresh and not self._spec.needs_all_parts:
            self._let_go()
        return fresh

    def _take_sealed(self, blocks: range) -> list[SealedBlock]:
        """Return the blocks that this pass has sealed, all layers of each in stacks."""
        if not blocks:
            return []
        sealed = {i: work.take_sealed() for i, work in self._kv.items()}
        taken = []
        for block in blocks:
            parts = {i: of_layer[block] for i, of_layer in sealed.items()}
            taken.append(SealedBlock(self._stack(parts, self._spec.stacks)))
        return taken

    def adopt(self, index: int, block: SealedBlock) -> None:
        """Take `block`, which another sequence sealed for the same tokens, in place of our own."""
        self.blocks[index] = block.only(self._spec.needed(index, self.length))
        if self.length == (index + 1) * self._spec.block_size:
            self._load_state(block.arrays, self._spec.block_size)
        for i, work in self._kv.items():
            work.adopt(index, self._unstack(block.arrays, i))

    def snapshot(self) -> Snapshot:
        """Return the idle form, with the state at its end.

        Its tail is a copy: the working copy may go on or be dropped.
        """
        n = self.length - self.num_sealed
        if n == 0:
            states = compact(self._state_arrays()) if self.blocks else {}
            return Snapshot(
                (*self.blocks[:-1], *(block.with_arrays(states) for block in self.blocks[-1:]))
            )
        prefix, prefix_len = self._tail_prefix
        ends = {
            i: work.read(self.num_sealed + prefix_len, self.length) for i, work in self._kv.items()
        }
        full = self._stack(
            {i: {"k.full": k, "v.full": v} for i, (k, v) in ends.items()}, self._spec.stacks
        )
        tail = Tail(n, full, prefix, prefix_len, self._states | self._state_arrays())
        return Snapshot(tuple(self.blocks), tail.compact())

    def kept_keys(self) -> dict[int, mx.array]:
        """Return by index of a layer the keys that its dense working copy holds, [1, H, n, Dk]."""
        return {
            i: work.kept_keys(self.length)
            for i, work in self._kv.items()
            if isinstance(work, DenseLayer)
        }

    def arrays(self) -> list[mx.array]:
        """Return what a forward pass leaves to evaluate."""
        return [a for work in self.layers for a in work.arrays()]

    def _let_go(self) -> None:
        """Drop states, and what no window reaches back to any more.

        The block pool may still hold them.
        """
        first = self._spec.first_visible(self.length)
        for i in range(len(self.blocks) - 1, -1, -1):
            block = self.blocks[i].only(self._spec.needed(i, self.length))
            if block.parts == self.blocks[i].parts and (i + 1) * self._spec.block_size <= first:
                break
            self.blocks[i] = block

    def _load(self, snapshot: Snapshot, capacity: int) -> None:
        """Load layer by layer, so that what is decoded on the way takes the memory of one."""
        tail, size = snapshot.tail, self._spec.block_size
        for i, work in self._kv.items():
            first = min(work.layer.first_visible(self.length) // size, len(snapshot.blocks))
            parts = [self._unstack(block.arrays, i) for block in snapshot.blocks[first:]]
            if tail and tail.prefix:
                parts.append(self._unstack(tail.prefix.arrays, i))
                work.keep_prefix(parts[-1])
            work.load(parts, self._unstack(tail.full, i) if tail else {}, first * size, capacity)
            mx.async_eval(work.arrays())  # type: ignore[no-untyped-call]
        if tail:
            self._load_state(tail.states, tail.num_tokens)
        elif snapshot.blocks:
            self._load_state(snapshot.blocks[-1].arrays, size)

    # -- recurrent state

    def _state_arrays(self) -> Arrays:
        """Return a snapshot of the state, named by where in the open block it is taken."""
        offset = (self.length - 1) % self._spec.block_size + 1
        per_layer = {
            i: {_state_name(j, offset): a for j, a in enumerate(work.arrays())}
            for i, work in self._recurrent.items()
        }
        return self._stack(per_layer, self._spec.state_stacks)

    def _worth_keeping(self) -> Arrays:
        """Return the snapshot in the block that just filled up, or nothing."""
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
        """Turn {"k.packed": [1, ...]} of each layer into {"k0.packed": [layers of stack, ...]}."""
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
    """Join along the layers, as a copy: a view would keep a whole working copy in RAM."""
    return mx.concatenate(arrays, axis=0) if len(arrays) > 1 else mx.contiguous(arrays[0])
