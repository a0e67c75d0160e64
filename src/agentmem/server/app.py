"""The HTTP application: the APIs that it serves, and what every request passes first."""

from importlib import import_module

from fastapi import FastAPI
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, Response

from .. import __version__
from ..chat.grammar_compiler import GrammarCompiler
from ..chat.renderer import ChatRenderer
from ..config import Settings
from ..engine.engine import Engine
from ..transcripts.registry import MAX_DISK, TranscriptRegistry
from .answer import Services
from .api.agents import IMPORT_PATH
from .auth import ApiKeyCheck, ApiKeys
from .errors import REQUEST_ID_HEADERS, ErrorResponses
from .middleware import BodyLimit, HeadAsGet, HostCheck, RequestId
from .rate_limits import RateLimits

# files under api/: each adds its routes, and its shape of errors where that is not OpenAI's; agents
# comes last, as its paths begin like those of others
APIS = (
    "chat_completions",
    "completions",
    "tokenize",
    "messages",
    "responses",
    "models",
    "ollama",
    "ollama_models",
    "context",
    "explain",
    "agents",
)


def create_app(engine: Engine, settings: Settings, keys: ApiKeys | None) -> FastAPI:
    """Return the app that serves `engine`, which must outlive it, to whoever has one of `keys`.

    `keys` None: to everybody.
    """
    app = FastAPI(
        title="agentmem", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False
    )
    services = Services(
        engine=engine,
        settings=settings,
        renderer=ChatRenderer(
            engine.tokenizer,
            engine.max_context,
            engine.why_max_context,
            generic_tools=settings.generic_tools,
        ),
        compiler=GrammarCompiler(engine.tokenizer),
        transcripts=_transcripts(engine),
        errors=ErrorResponses(),
    )
    _add_middleware(app, services, keys)
    services.errors.add_handlers(app)
    for name in APIS:
        import_module(f".api.{name}", __package__).add_routes(app, services)
    _add_state_routes(app, engine)
    return app


def _transcripts(engine: Engine) -> TranscriptRegistry:
    """Return what was said, kept in the engine's store; agents are deleted through it."""
    max_disk = min(MAX_DISK, engine.archives.room_bytes // 4)
    transcripts = TranscriptRegistry(engine.turn_table, engine.is_ephemeral, max_disk)
    engine.agents.on_forget = transcripts.forget
    return transcripts


def _add_middleware(app: FastAPI, services: Services, keys: ApiKeys | None) -> None:
    """Add what every request passes, the last one added first."""
    settings = services.settings
    respond = services.errors.response
    hosts = ["localhost", "127.0.0.1", "::1", settings.host, *settings.allowed_hosts]
    unlimited = (IMPORT_PATH,)
    app.add_middleware(HeadAsGet)
    app.add_middleware(
        BodyLimit,
        limit=settings.max_body,
        patience=settings.client_timeout,
        unlimited=unlimited,
        on_error=respond,
    )
    app.add_middleware(
        RateLimits,
        requests=settings.requests_per_minute,
        tokens=settings.tokens_per_minute,
        on_error=respond,
    )
    app.add_middleware(ApiKeyCheck, keys=keys, on_error=respond)
    if settings.cors:  # around the keys: a browser asks without one whether it may ask
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors,
            allow_methods=["*"],
            allow_headers=["*"],
            allow_private_network=True,
            expose_headers=[*REQUEST_ID_HEADERS, "retry-after"],
        )
    app.add_middleware(HostCheck, allowed=hosts, on_error=respond)
    app.add_middleware(RequestId)


def _add_state_routes(app: FastAPI, engine: Engine) -> None:
    @app.get("/health", response_model=None)
    async def health() -> Response:
        health = engine.health()
        return JSONResponse(health, 200 if health["status"] in ("ok", "degraded") else 503)

    @app.get("/metrics", response_model=None)
    async def metrics() -> Response:
        return Response(engine.metrics(), media_type=CONTENT_TYPE_LATEST)
