"""A tiny model that behaves like an agent's: it calls a tool, reads the result, and answers.

What it says is written in its weights, so that a client's whole path can be tried in seconds: a
prompt that ends with a tool's result is answered with ANSWER, any other one that offers get_weather
with CALL, and the rest with HELLO. Where a grammar leaves no such choice, it ends what it says as
soon as the grammar lets it: strings are empty, numbers have one digit.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from mlx_lm.tokenizer_utils import load

from support.chat_tokenizers import QWEN3, save_tokenizer

CITY = "Oslo"
HELLO = "Good day."
ANSWER = f"It rains in {CITY}."
CALL = f'{{"name": "get_weather", "arguments": {{"city": "{CITY}"}}}}'
CONTEXT = 131_072  # tokens, most of which are bytes
_SIZE = 512  # of the vocabulary, and of the hidden states: each token has a dimension of its own
_SCRIPTS: Mapping[str, Sequence[str]] = {
    "<|hello|>": ("Good ", "day."),
    "<|call|>": ("<tool_call>", f"\n{CALL}\n", "</tool_call>"),
    "<|answer|>": ("It rains ", f"in {CITY}."),
}
# the first of them that a grammar allows comes next, where no script goes on
_SOON = '"}]{[:,1te'
_PROMPT_END = "{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}"
_TEMPLATE = QWEN3.replace(
    _PROMPT_END,
    f"""{_PROMPT_END}
    {{%- set offered = tools | default([]) | tojson %}}
    {{%- if messages[-1].role == 'tool' %}}{{{{- '<|answer|>' }}}}
    {{%- elif 'get_weather' in offered or 'final_result' in offered %}}{{{{- '<|call|>' }}}}
    {{%- else %}}{{{{- '<|hello|>' }}}}{{%- endif %}}""",
)
assert _TEMPLATE != QWEN3


def write_agent_model(path: Path) -> Path:
    """Write the model, a llama whose attention and MLP add nothing, to `path`; returns it."""
    path.mkdir(parents=True)
    markers = ("<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>", "</tool_call>")
    said = [piece for pieces in _SCRIPTS.values() for piece in pieces if piece not in markers]
    save_tokenizer(path, _TEMPLATE, *markers, *_SCRIPTS, *said)
    config = {
        "model_type": "llama",
        "num_hidden_layers": 2,
        "hidden_size": _SIZE,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "rms_norm_eps": 1e-5,
        "vocab_size": _SIZE,
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": False,
    }
    mx.random.seed(0)
    weights = dict(tree_flatten(llama.Model(llama.ModelArgs(**config)).parameters()))
    for name in weights:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weights[name] = mx.zeros_like(weights[name])
    weights["model.embed_tokens.weight"] = mx.eye(_SIZE)
    weights["lm_head.weight"] = mx.array(_next_tokens(load(path)))
    (path / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(path / "model.safetensors"), weights, {"format": "mlx"})
    return path


def _next_tokens(tokenizer) -> np.ndarray:
    """Return float32 [to, from]: how much one token wants to come after another one."""
    ids = tokenizer.convert_tokens_to_ids
    wanted = np.zeros((_SIZE, _SIZE), np.float32)
    end = ids("<|im_end|>")
    for rank, character in enumerate(_SOON):
        wanted[ids(character), :] = 2 * (len(_SOON) - rank)
    wanted[end, :] = 30
    for start, pieces in _SCRIPTS.items():
        at = ids(start)
        for piece in pieces:
            wanted[ids(piece), at] = 60
            at = ids(piece)
    return wanted
