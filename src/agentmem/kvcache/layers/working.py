"""Which working copy a layer of a running sequence gets, and the RAM that it takes."""

from ..backend import AttentionBackend
from ..quantize import CacheSpace, LayerCodec, ModelSpaceCodec
from ..spec import KVCacheSpec, LayerSpec, Recurrent
from .codes import CodesLayer
from .dense import DenseLayer
from .kv import capacity_for
from .recurrent import RecurrentLayer

Layer = CodesLayer | DenseLayer | RecurrentLayer


def new_layer(
    spec: KVCacheSpec,
    space: CacheSpace,
    index: int,
    *,
    on_codes: bool,
    backend: AttentionBackend,
) -> Layer:
    """Make the empty working copy of a layer of one sequence.

    `on_codes`: attention reads codes in place where it can.
    """
    layer = spec.layers[index]
    if isinstance(layer, Recurrent):
        return RecurrentLayer(layer)
    codec = (ModelSpaceCodec if layer.model_attends else LayerCodec)(spec, space, index)
    dense = DenseLayer(spec, codec, backend)
    if not _stays_codes(spec, layer, on_codes=on_codes):
        return dense
    return CodesLayer(spec, codec, backend, open_block=dense)


def _stays_codes(spec: KVCacheSpec, layer: LayerSpec, *, on_codes: bool) -> bool:
    return on_codes and spec.bits is not None and layer.window is None and not layer.model_attends


def working_bytes(spec: KVCacheSpec, num_tokens: int, *, on_codes: bool) -> int:
    """Count the bytes in RAM of a running sequence's working copy, all layers.

    It has room for `num_tokens` tokens.
    """
    if spec.opaque is not None:
        return spec.opaque.fixed_bytes + capacity_for(num_tokens) * spec.opaque.token_bytes
    total = spec.state_bytes
    for s, stack in enumerate(spec.stacks):
        on_them = _stays_codes(spec, spec.layers[stack[0]], on_codes=on_codes)
        kind = CodesLayer if on_them else DenseLayer
        total += kind.working_bytes(spec, s, num_tokens)
    return total
