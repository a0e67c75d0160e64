"""GET /v1/models: the one model that is served, as every API's clients know models."""

import time
from typing import Any

from fastapi import FastAPI

from ..answer import Services


def add_routes(app: FastAPI, services: Services) -> None:
    model = {
        "id": services.engine.model_name,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "agentmem",
        "max_context": services.engine.max_context,
    }

    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{model_id:path}")
    async def get_model(model_id: str) -> dict[str, Any]:
        services.check_model(model_id)
        return model
