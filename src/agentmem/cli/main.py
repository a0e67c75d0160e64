"""The command line: which commands there are. Each is imported when it is called.

What is imported here is what `agentmem --help` waits for.
"""

import sys
from typing import Annotated, ClassVar

import typer

from .. import __version__
from ..errors import AgentMemError, StartupError
from .lazy import Lazy, LazyGroup

# exit codes
_REFUSED = 1
_FAULT = 2
_INTERRUPTED = 130  # 128 and SIGINT's number


def main() -> None:
    """Run the command line.

    A user's fault is one line on stderr and exit code 2; what the server refuses is exit code 1.
    """
    try:
        app()
    except AgentMemError as e:
        print(f"agentmem: {e}", file=sys.stderr)
        code = _FAULT if isinstance(e, StartupError) else _REFUSED
        raise SystemExit(code) from None
    except KeyboardInterrupt:
        raise SystemExit(_INTERRUPTED) from None


class _Commands(LazyGroup):
    lazy: ClassVar = {
        "serve": Lazy(
            "agentmem.cli.serve",
            "serve",
            "Serve a model over the OpenAI API, with a cache for each agent.",
        ),
        "pull": Lazy("agentmem.cli.serve", "pull", "Download a model and check it."),
        "chat": Lazy(
            "agentmem.cli.chat",
            "chat",
            "Chat with an agent of a running server, which remembers.",
        ),
        "status": Lazy(
            "agentmem.cli.status",
            "status",
            "Show the running server: model, agents, memory and store.",
        ),
        "agents": Lazy(
            "agentmem.cli.agents",
            "app",
            "List the agents of a running server, and manage their caches.",
        ),
        "store": Lazy(
            "agentmem.cli.store",
            "app",
            "Look at the caches on disk, check every byte of them, make room.",
        ),
        "service": Lazy(
            "agentmem.cli.service",
            "app",
            "Run the server in the background, from login on.",
        ),
        "doctor": Lazy(
            "agentmem.cli.doctor",
            "doctor",
            "Check this machine, the model and the store; say what to do.",
        ),
        "bench": Lazy(
            "agentmem.bench.app", "app", "Measure on this machine what the cache costs and gains."
        ),
    }


def _print_version(asked: bool) -> None:
    if asked:
        print(__version__)
        raise typer.Exit


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # its tables cut the names of options in a terminal of 80 columns
    context_settings={"max_content_width": 200},
)


@app.callback()
def _agentmem(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", is_eager=True, callback=_print_version
        ),
    ] = False,
) -> None:
    """Serve a model to many agents, each with a persistent KV cache, over an OpenAI-compatible API.

    Each command has a --help of its own.
    """


@app.command()
def version() -> None:
    """Print the version."""
    print(__version__)
