"""GET /api/tags, /api/ps and /api/version, POST /api/show: the served model, as Ollama tells it."""

import hashlib
from datetime import UTC, datetime
from typing import Any

from fastapi import FastAPI

from ...chat.template import source_of
from ...engine.engine import Engine
from ..answer import Services
from .ollama_wire import OllamaShowRequest, add_post

# of the Ollama whose API this is, since clients ask for a least one
VERSION = "0.32.7"
_FOR_EVER = "9999-12-31T23:59:59Z"
# numbers of config.json, under the names that GGUF has for them
_CONFIG = {
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "vocab_size": "vocab_size",
}


def add_routes(app: FastAPI, services: Services) -> None:
    engine = services.engine
    listed = _listed(engine)

    @app.get("/api/version")
    async def version() -> dict[str, Any]:
        return {"version": VERSION, "agentmem": app.version}

    @app.get("/api/tags")
    async def list_tags() -> dict[str, Any]:
        return {"models": [listed | {"capabilities": await _capabilities(services)}]}

    @app.get("/api/ps")
    async def list_running() -> dict[str, Any]:
        size = engine.model_dir.bytes
        running = {
            "size_vram": size if engine.on_gpu else 0,
            "context_length": engine.max_context,
            "expires_at": _FOR_EVER,
        }
        return {"models": [listed | running]}

    async def show(body: OllamaShowRequest) -> dict[str, Any]:
        services.check_model(body.model or body.name)
        return {
            "modelfile": f"FROM {listed['name']}\n",
            "parameters": "",
            "template": source_of(engine.tokenizer),
            "details": listed["details"],
            "model_info": _model_info(engine),
            "capabilities": await _capabilities(services),
            "modified_at": listed["modified_at"],
        }

    add_post(app, "/api/show", show)


def _listed(engine: Engine) -> dict[str, Any]:
    """Return what every list says of the model."""
    found = engine.model_dir
    name = engine.model_name.rstrip("/")
    if name.startswith(("/", ".", "~")):  # a path says nothing to a client
        name = name.rpartition("/")[2]
    name = name if ":" in name else f"{name}:latest"
    modified = datetime.fromtimestamp(found.modified, UTC).isoformat().replace("+00:00", "Z")
    return {
        "name": name,
        "model": name,
        "modified_at": modified,
        "size": found.bytes,
        "digest": hashlib.sha256(engine.weights_hash.encode()).hexdigest(),
        "details": {
            "parent_model": "",
            "format": "safetensors",
            "family": found.model_type,
            "families": [found.model_type],
            "parameter_size": _human(found.parameters),
            "quantization_level": found.dtype,
            "context_length": engine.max_context,
        },
    }


def _human(number: int) -> str:
    """Return a number of parameters as Ollama writes it: 8.0B, 134M, 328K."""
    if number >= 1e9:
        return f"{number / 1e9:.1f}B"
    return f"{number / 1e6:.0f}M" if number >= 1e6 else f"{number / 1e3:.0f}K"


def _model_info(engine: Engine) -> dict[str, Any]:
    config = engine.model_dir.config
    text = config.get("text_config")
    sections = (config, text if isinstance(text, dict) else {})
    family = engine.model_dir.model_type
    found = {
        "general.architecture": family,
        "general.parameter_count": engine.model_dir.parameters,
        f"{family}.context_length": engine.max_context,
    }
    for name, key in _CONFIG.items():
        for section in sections:
            if isinstance(section.get(key), int):
                found[f"{family}.{name}"] = section[key]
    return found


async def _capabilities(services: Services) -> list[str]:
    thinks = "reasoning" in services.renderer.markup.edges
    takes_tools = await services.renderer.takes_tools()
    return [
        "completion",
        *(["tools"] if takes_tools else []),
        *(["thinking"] if thinks else []),
    ]
