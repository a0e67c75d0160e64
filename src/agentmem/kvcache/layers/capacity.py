"""How working copies grow."""

from ..spec import KVCacheSpec, LayerSpec

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
