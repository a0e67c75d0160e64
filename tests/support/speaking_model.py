"""A tiny model whose weights say one given text, whatever it is asked."""

import json
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from mlx_lm.tokenizer_utils import load

from support.chat_tokenizers import QWEN3, save_tokenizer

SIZE = 512  # of the vocabulary, and of the hidden states: each token has a dimension of its own


def write_speaking_model(path: Path, pieces: Sequence[str], template: str = QWEN3) -> Path:
    """Write a llama that answers `pieces`, each of them a token, all different; returns `path`.

    Attention and the MLP add nothing, so that every token is followed by one: a piece by the next
    one, the last piece by the end of the answer, and every other token by the first piece.
    """
    path.mkdir(parents=True)
    save_tokenizer(path, template, *pieces)
    tokenizer = load(path)
    said = [tokenizer.convert_tokens_to_ids(piece) for piece in pieces]
    assert len(set(said)) == len(said) and len(tokenizer) <= SIZE
    following = [said[0]] * SIZE
    for token, then in zip(said, [*said[1:], tokenizer.eos_token_id], strict=True):
        following[token] = then
    config = {
        "model_type": "llama",
        "num_hidden_layers": 2,
        "hidden_size": SIZE,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "rms_norm_eps": 1e-5,
        "vocab_size": SIZE,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    }
    mx.random.seed(0)
    model = llama.Model(llama.ModelArgs(**config))
    weights = dict(tree_flatten(model.parameters()))
    for name in weights:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weights[name] = mx.zeros_like(weights[name])
    weights["model.embed_tokens.weight"] = mx.eye(SIZE)
    weights["lm_head.weight"] = mx.eye(SIZE)[:, mx.array(following)] * 10
    (path / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(path / "model.safetensors"), weights, {"format": "mlx"})
    return path
