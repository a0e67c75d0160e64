"""What the arrays of a block or a tail must look like: for caches that come from outside."""

from .spec import KVCacheSpec, coded_shape

Shapes = dict[str, tuple[str, tuple[int, ...]]]  # by name: dtype as in HostTensor, shape
_DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}


def block_shapes(spec: KVCacheSpec, num_tokens: int, *, first: bool) -> Shapes:
    """Of a sealed block, or of the first tokens of one; `first`: of a sequence, so that it has sinks."""
    return _shapes(spec, {"full": num_tokens} if spec.bits is None else {"codes": num_tokens}, first)


def tail_shapes(spec: KVCacheSpec, num_tokens: int, prefix_len: int, *, first: bool) -> Shapes:
    """Of a tail that starts with the codes of `prefix_len` tokens."""
    full = _shapes(spec, {"full": num_tokens - prefix_len}, False) if num_tokens > prefix_len else {}
    prefix = block_shapes(spec, prefix_len, first=first) if prefix_len else {}
    return full | {f"prefix.{name}": shape for name, shape in prefix.items()}


def _shapes(spec: KVCacheSpec, tokens: dict[str, int], first: bool) -> Shapes:
    dtype = _DTYPES[str(spec.dtype).removeprefix("mlx.core.")]
    shapes: Shapes = {}
    for s, stack in enumerate(spec.stacks):
        layer = spec.layers[stack[0]]
        for i, (part, dim) in enumerate((("k", layer.k_dim), ("v", layer.v_dim))):
            where = (len(stack), layer.num_kv_heads)
            if "full" in tokens:
                shapes[f"{part}{s}.full"] = dtype, (*where, tokens["full"], dim)
                continue
            assert spec.bits is not None
            n, scale = tokens["codes"], "BF16" if dtype == "BF16" else "F16"
            shapes[f"{part}{s}.packed"] = "U32", (*where, n, coded_shape(dim)[0] * spec.bits[i] // 32)
            for field in ("scales", "biases"):
                shapes[f"{part}{s}.{field}"] = scale, (*where, n, coded_shape(dim)[0] // coded_shape(dim)[1])
            if first:
                shapes[f"{part}{s}.sinks"] = dtype, (*where, min(n, spec.num_sinks), dim)
    return shapes
