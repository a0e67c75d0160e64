"""The HTTP application: routes, and the one place where errors become responses."""

import time
from typing import Any, cast

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response

from .. import __version__
from ..config import Settings
from ..engine.api import EngineAPI
from ..errors import AgentMemError, Busy, Unauthorized
from .api.agents import IMPORT_PATH, add_agent_routes
from .api.chat_completions import ChatCompletions, check_model
from .api.responses import add_response_routes
from .api.wire import ChatCompletionRequest, error_body, validation_error_body
from .auth import ApiKeyCheck, ApiKeys
from .middleware import BodyLimit, HostCheck, RequestId


def create_app(engine: EngineAPI, settings: Settings, keys: ApiKeys | None) -> FastAPI:
    """The app that serves `engine`, which must outlive it, to whoever has one of `keys`; to all
    where it is None.
    """
    app = FastAPI(
        title="agentmem", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False
    )
    app.add_middleware(BodyLimit, limit=settings.max_body, unlimited=(IMPORT_PATH,))
    app.add_middleware(ApiKeyCheck, keys=keys, on_error=_agentmem_error)
    hosts = ["localhost", "127.0.0.1", "::1", settings.host, *settings.allowed_hosts]
    app.add_middleware(HostCheck, allowed=hosts)
    app.add_middleware(RequestId)  # the last one added is the outermost
    app.add_exception_handler(AgentMemError, _agentmem_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(ClientDisconnect, _client_gone)
    app.add_exception_handler(Exception, _unexpected)
    completions = ChatCompletions(engine, settings)
    _add_chat_routes(app, engine, completions)
    _add_state_routes(app, engine)
    add_response_routes(app, engine, completions.renderer, settings)
    add_agent_routes(app, engine, completions.renderer, settings)
    return app


def _add_chat_routes(app: FastAPI, engine: EngineAPI, completions: ChatCompletions) -> None:
    model = {
        "id": engine.model_name,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "agentmem",
        "max_context": engine.max_context,
    }

    @app.post("/v1/chat/completions", response_model=None)
    async def create_chat_completion(body: ChatCompletionRequest, request: Request) -> Response:
        return await completions.create(body, request)

    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{model_id:path}")
    async def get_model(model_id: str) -> dict[str, Any]:
        check_model(model_id, engine.model_name)
        return model


def _add_state_routes(app: FastAPI, engine: EngineAPI) -> None:
    @app.get("/health", response_model=None)
    async def health() -> Response:
        health = engine.health()
        return JSONResponse(health, 200 if health["status"] in ("ok", "degraded") else 503)

    @app.get("/metrics", response_model=None)
    async def metrics() -> Response:
        return Response(engine.metrics(), media_type=CONTENT_TYPE_LATEST)


async def _agentmem_error(request: Request, exc: Exception) -> Response:
    error = cast(AgentMemError, exc)
    headers = {"retry-after": str(error.retry_after)} if isinstance(error, Busy) else {}
    headers |= {"www-authenticate": "Bearer"} if isinstance(error, Unauthorized) else {}
    body = error_body(error.message, type=error.type, param=error.param, code=error.code)
    return JSONResponse(body, error.status, headers)


async def _validation_error(request: Request, exc: Exception) -> Response:
    return JSONResponse(validation_error_body(cast(RequestValidationError, exc).errors()[0]), 400)


async def _http_error(request: Request, exc: Exception) -> Response:
    """Starlette's own: unknown routes (404), methods (405), and a body that FastAPI can't decode
    (400).
    """
    error = cast(HTTPException, exc)
    codes = {400: "invalid_body", 404: "not_found", 405: "method_not_allowed"}
    message = f"{error.detail} ({request.method} {request.url.path[:200]})"
    body = error_body(message, type="invalid_request_error", code=codes.get(error.status_code))
    return JSONResponse(body, error.status_code, error.headers)


async def _client_gone(request: Request, exc: Exception) -> Response:
    return Response(status_code=499)  # nobody is there to read it


async def _unexpected(request: Request, exc: Exception) -> Response:
    """Starlette raises `exc` again after this, and uvicorn logs its traceback. This runs outside of
    RequestId.
    """
    body = error_body(
        "The server had an internal error; its log says more.",
        type="server_error",
        code="internal_error",
    )
    return JSONResponse(body, 500, {"x-request-id": request.scope["agentmem.request_id"]})
