"""A directory with a tiny model of a true mlx-lm class and random weights, which `agentmem serve
--model DIR` runs.
"""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from support.fake_engine import tiny_tokenizer
from support.tiny import VOCAB, tiny_model


def write_tiny_model(
    path: Path, kind: str = "llama", *, seed: int = 0, max_context: int = 1024
) -> Path:
    """Write a model of one of tiny.KINDS to `path`, which is made; returns `path`.

    Its tokens are VOCAB words ("w8" to "w255", and a few of chat), split at spaces; `max_context`
    is in tokens.
    """
    path.mkdir(parents=True)
    model = tiny_model(kind, seed)
    config = _said(model.args) | {"max_position_embeddings": max_context}
    (path / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(
        str(path / "model.safetensors"), dict(tree_flatten(model.parameters())), {"format": "mlx"}
    )
    tiny_tokenizer(size=VOCAB)._tokenizer.save_pretrained(path)
    return path


def _said(args: Any) -> dict[str, Any]:
    """config.json of mlx-lm's ModelArgs, less nulls that say nothing: transformers reads it too,
    and checks types.
    """
    pairs = ((f, getattr(args, f.name)) for f in fields(args))
    return {f.name: value for f, value in pairs if value is not None or f.default is not None}
