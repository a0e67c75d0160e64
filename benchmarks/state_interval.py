"""How far apart snapshots of recurrent state should be.

It is bytes on disk against tokens computed again. A request that parts from a context in its middle
goes on from the last snapshot before that point; on average half an interval is computed again.
Shapes of published models give the bytes (their classes are built without weights); a hybrid model
small enough for this machine gives the times.

    python benchmarks/state_interval.py --json benchmarks/results/state-interval.json
"""

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from agentmem.linux_cpu.prepare import prepare_mlx

prepare_mlx(Path("~/.agentmem").expanduser())

import mlx.core as mx  # noqa: E402
from machine import describe_machine, write_result  # noqa: E402
from mlx_lm.models import granitemoehybrid, lfm2, mamba2, qwen3_next  # noqa: E402

from agentmem.engine.model_runner import ModelRunner  # noqa: E402
from agentmem.kvcache.attention import install_seam  # noqa: E402
from agentmem.kvcache.block import SealedBlock, to_host  # noqa: E402
from agentmem.kvcache.spec import KVCacheSpec, default_state_interval  # noqa: E402
from agentmem.kvcache.trace import read_spec  # noqa: E402
from agentmem.store.files import segment  # noqa: E402
from agentmem.tensors import is_state, part_of  # noqa: E402

INTERVALS = (256, 512, 1024, 2048, 4096, 8192)
_QWEN3_NEXT = {
    "model_type": "qwen3_next", "hidden_size": 2048, "num_hidden_layers": 48,
    "intermediate_size": 5120, "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 256,
    "linear_num_value_heads": 32, "linear_num_key_heads": 16, "linear_key_head_dim": 128,
    "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4, "num_experts": 8,
    "num_experts_per_tok": 2, "decoder_sparse_step": 1, "shared_expert_intermediate_size": 512,
    "mlp_only_layers": [], "moe_intermediate_size": 512, "rms_norm_eps": 1e-6, "vocab_size": 1024,
    "rope_theta": 1e7, "partial_rotary_factor": 0.25, "max_position_embeddings": 262144,
    "full_attention_interval": 4,
}  # fmt: skip
# experts and vocabulary are fewer than in the published models: the cache does not depend on them
SHAPES: dict[str, tuple[Any, dict[str, Any]]] = {
    "Qwen3-Next-80B-A3B": (qwen3_next, _QWEN3_NEXT),
    "LFM2-1.2B": (lfm2, {
        "model_type": "lfm2", "vocab_size": 1024, "hidden_size": 2048, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 128000,
        "norm_eps": 1e-5, "conv_bias": False, "conv_L_cache": 3, "block_dim": 2048,
        "block_ff_dim": 12288, "block_multiple_of": 256, "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": True, "full_attn_idxs": [2, 5, 8, 10, 12, 14],
        "rope_theta": 1e6,
    }),
    "Granite-4.0-H-Tiny": (granitemoehybrid, {
        "model_type": "granitemoehybrid", "vocab_size": 1024, "hidden_size": 1536,
        "intermediate_size": 512, "num_hidden_layers": 40, "max_position_embeddings": 131072,
        "num_attention_heads": 12, "num_key_value_heads": 4, "attention_bias": False,
        "embedding_multiplier": 12.0, "attention_multiplier": 0.0078125, "logits_scaling": 6.0,
        "residual_multiplier": 0.22, "num_local_experts": 8, "num_experts_per_tok": 2,
        "shared_intermediate_size": 1024, "mamba_n_heads": 48, "mamba_d_head": 64,
        "mamba_proj_bias": False, "mamba_d_state": 128, "mamba_d_conv": 4, "mamba_n_groups": 1,
        "mamba_conv_bias": True, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "position_embedding_type": "nope",
        "layer_types": ["attention" if i in (5, 15, 25, 35) else "mamba" for i in range(40)],
    }),
    "Mamba2-2.7B": (mamba2, {
        "model_type": "mamba2", "num_heads": 80, "head_dim": 64, "vocab_size": 1024,
        "hidden_size": 2560, "intermediate_size": 5120, "state_size": 128, "num_hidden_layers": 64,
        "layer_norm_epsilon": 1e-5, "conv_kernel": 4, "n_groups": 1, "use_bias": False,
        "use_conv_bias": True, "tie_word_embeddings": True, "time_step_limit": (0.0, float("inf")),
        "time_step_rank": "auto", "ssm_state_size": 128,
    }),
}  # fmt: skip


def build(module: Any, config: dict[str, Any]) -> Any:
    model = module.Model(module.ModelArgs.from_dict(config))
    install_seam(model)
    return model


def published(name: str) -> KVCacheSpec:
    """Return the layout in bfloat16, without computing a weight."""
    model = build(*SHAPES[name])
    model.set_dtype(mx.bfloat16)
    return read_spec(model)


def bytes_of(spec: KVCacheSpec) -> dict[str, Any]:
    rows = []
    for n in INTERVALS:
        per_token = spec.state_bytes / n
        sealed = spec.sealed_bytes
        row = {
            "interval": n,
            "state_bytes_per_token": round(per_token, 1),
            "over_sealed": round(per_token / sealed, 2) if sealed else None,
            "recomputed_mean": n // 2,
        }
        rows.append(row)
    chosen = -(-default_state_interval(spec) // spec.block_size) * spec.block_size
    return {
        "sealed_bytes": spec.sealed_bytes,
        "state_bytes": spec.state_bytes,
        "default": chosen,
        "rows": rows,
    }


def measured(repeats: int) -> dict[str, Any]:
    """Time a hybrid of Qwen3-Next's kinds on this machine.

    Measured are prefill, and a snapshot to disk and back.
    """
    small = {
        "hidden_size": 512,
        "num_hidden_layers": 8,
        "moe_intermediate_size": 256,
        "intermediate_size": 1024,
    }
    model = build(qwen3_next, _QWEN3_NEXT | small)
    mx.eval(model.parameters())
    runner = ModelRunner(model)
    runner.spec = replace(runner.spec, state_interval=runner.spec.block_size)
    per_token = []
    trips = []
    for i in range(repeats):
        cache = runner.new_cache(capacity=512)
        began = time.perf_counter()
        blocks = runner.prefill(cache, [(31 * j + i) % 1000 for j in range(512)])
        per_token.append((time.perf_counter() - began) / 512 * 1e3)
        trips.append(round_trip(blocks[-1]))
    ms = statistics.median(per_token)
    trip = statistics.median(trips)
    return {
        "model": "Qwen3-Next's kinds, 8 layers, hidden 512, random weights",
        "state_bytes": runner.spec.state_bytes,
        "prefill_ms_per_token": round(ms, 2),
        "snapshot_write_and_read_ms": round(trip, 1),
        "worth_tokens": round(trip / ms, 1),
    }


def round_trip(block: SealedBlock) -> float:
    """Write a snapshot durably and read it back. Returns the ms that it took."""
    states = {n: a for n, a in block.arrays.items() if is_state(part_of(n))}
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "state")
        began = time.perf_counter()
        segment.write_durable(path, bytes(segment.encode(to_host(states), {})))
        segment.decode(path.read_bytes())
        return (time.perf_counter() - began) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    result: dict[str, Any] = {"benchmark": "state_interval", "machine": describe_machine()}
    result["models"] = {name: bytes_of(published(name)) for name in SHAPES}
    for name, figures in result["models"].items():
        print(
            f"{name}: {figures['sealed_bytes']:,} bytes a sealed token, "
            f"{figures['state_bytes']:,} a snapshot, default every {figures['default']:,} tokens"
        )
        for row in figures["rows"]:
            per_token = f"{row['state_bytes_per_token']:>9,.1f} bytes a token"
            share = row["over_sealed"]
            of_sealed = "" if share is None else f", {share:.2f} of the sealed"
            print(f"  every {row['interval']:>5}: {per_token}{of_sealed}")
    result["measured"] = measured(args.repeats)
    print(result["measured"])
    write_result(result, args.json)


if __name__ == "__main__":
    main()
