"""GET /v1/models: the one model that is served, as every API's clients know models."""

from datetime import UTC, datetime
from typing import Any

from fastapi import FastAPI

from ..answer import Services


def add_routes(app: FastAPI, services: Services) -> None:
    engine = services.engine
    created = datetime.now(UTC).replace(microsecond=0)
    model = {
        "id": engine.model_name,
        "max_context": engine.max_context,
        # OpenAI's
        "object": "model",
        "created": int(created.timestamp()),
        "owned_by": "agentmem",
        # Anthropic's
        "type": "model",
        "display_name": engine.model_name,
        "created_at": created.isoformat(),
        "max_input_tokens": engine.max_context,
        "max_tokens": engine.max_context,
        "lifecycle": "active",
    }
    page = {"first_id": engine.model_name, "last_id": engine.model_name, "has_more": False}

    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [model], **page}

    @app.get("/v1/models/{model_id:path}")
    async def get_model(model_id: str) -> dict[str, Any]:
        services.check_model(model_id)
        return model
