"""GGUF files of the llama architecture, made into MLX model directories.

Codes, scales and biases are taken as they are: nothing is dequantized or rounded on the way. Every
file is written here byte by byte, without the libraries that could (safetensors, tokenizers),
because their output changes between versions and the result is checked by a digest. Layout of a
GGUF: github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import json
import struct
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

_GROUP_SIZE = 32  # of Q4_0, Q4_1 and Q8_0
_CONTROL = 3  # tokenizer.ggml.token_type of special tokens

_MODULES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def convert_gguf(source: Path, target: Path) -> None:
    """Write config, weights, tokenizer and generation config into the directory `target`.

    The same GGUF gives the same bytes on every machine. Raises ValueError for an architecture other
    than llama.
    """
    loaded: Any = mx.load(str(source), return_metadata=True)
    arrays, metadata = loaded
    if metadata.get("general.architecture") != "llama":
        raise ValueError(
            f"{source.name}: only GGUF files of the llama architecture can be converted"
        )
    tensors = {_mlx_name(name): _numpy(array) for name, array in arrays.items()}
    write_safetensors(target / "model.safetensors", tensors)
    _write_json(target / "config.json", _config(metadata, tensors))
    _write_json(target / "tokenizer.json", _tokenizer(metadata))
    _write_json(target / "tokenizer_config.json", _tokenizer_config(metadata))
    _write_json(
        target / "generation_config.json",
        {"eos_token_id": metadata["tokenizer.ggml.eos_token_id"].item()},
    )


def _mlx_name(name: str) -> str:
    """Name a GGUF tensor as mlx-lm does.

    blk.9.attn_q.scales -> model.layers.9.self_attn.q_proj.scales
    """
    *block, module, part = name.split(".")
    prefix = f"model.layers.{block[1]}." if block else ""
    return f"{prefix}{_MODULES[module]}.{part}"


def _numpy(array: mx.array) -> np.ndarray:
    """Turn an array into NumPy's.

    Norm weights come as float32 and become float16, like the scales, so that the model runs in one
    dtype.
    """
    return np.array(array.astype(mx.float16) if array.dtype == mx.float32 else array)


def write_safetensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Write a safetensors file.

    Eight bytes with the header's length, the header as JSON, then the tensors in the order of their
    names.
    """
    dtypes = {"uint32": "U32", "float16": "F16"}
    header: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    end = 0
    for name in sorted(tensors):
        start, end = end, end + tensors[name].nbytes
        header[name] = {
            "dtype": dtypes[str(tensors[name].dtype)],
            "shape": list(tensors[name].shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in sorted(tensors):
            file.write(np.ascontiguousarray(tensors[name]).tobytes())


def _config(metadata: dict[str, Any], tensors: dict[str, np.ndarray]) -> dict[str, Any]:
    def read(key: str) -> Any:
        return metadata[f"llama.{key}"].item()

    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": read("embedding_length"),
        "num_hidden_layers": read("block_count"),
        "num_attention_heads": read("attention.head_count"),
        "num_key_value_heads": read("attention.head_count_kv"),
        "intermediate_size": read("feed_forward_length"),
        "vocab_size": read("vocab_size"),
        "max_position_embeddings": read("context_length"),
        "rope_theta": read("rope.freq_base"),
        "rope_traditional": True,  # GGUF permutes the rows of Q and K to pair neighbouring channels
        "rms_norm_eps": round(
            read("attention.layer_norm_rms_epsilon"), 12
        ),  # a float32: 9.999999747e-06
        "tie_word_embeddings": "lm_head.weight" not in tensors,
        "torch_dtype": "float16",
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"].item(),
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"].item(),
        "quantization": _quantization(tensors),
    }


def _quantization(tensors: dict[str, np.ndarray]) -> dict[str, Any]:
    """Make mlx-lm's section: 4 bits for all, and an entry for each matrix of another width.

    Widths are read off the shapes.
    """
    section: dict[str, Any] = {"group_size": _GROUP_SIZE, "bits": 4}
    for name in sorted(tensors):
        module = name.removesuffix(".scales")
        if module == name:
            continue
        columns = tensors[name].shape[1] * _GROUP_SIZE
        bits = tensors[f"{module}.weight"].shape[1] * 32 // columns  # codes are packed into uint32
        if bits != 4:
            section[module] = {"group_size": _GROUP_SIZE, "bits": bits}
    return section


def _tokenizer(metadata: dict[str, Any]) -> dict[str, Any]:
    """Make tokenizer.json: byte-level BPE, with numbers split into digits."""
    tokens = metadata["tokenizer.ggml.tokens"]
    types = metadata["tokenizer.ggml.token_type"].tolist()
    flags = {
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": tokens[i], **flags} for i, t in enumerate(types) if t == _CONTROL
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level],
        },
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in metadata["tokenizer.ggml.merges"]],
        },
    }


def _special_token(metadata: dict[str, Any], kind: str) -> str:
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    index: int = metadata[f"tokenizer.ggml.{kind}_token_id"].item()
    return tokens[index]


def _tokenizer_config(metadata: dict[str, Any]) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": _special_token(metadata, "bos"),
        "eos_token": _special_token(metadata, "eos"),
        "pad_token": _special_token(metadata, "padding"),
        "unk_token": _special_token(metadata, "unknown"),
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata["llama.context_length"].item(),
        "chat_template": metadata["tokenizer.chat_template"],
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    # ASCII escapes and "\n": the same bytes whatever the locale
    path.write_bytes(json.dumps(value, indent=1, ensure_ascii=True).encode() + b"\n")
