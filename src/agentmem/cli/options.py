"""Options that several commands have, and what is made of them."""

import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import typer

from ..client import Client
from ..config import Settings, Unit, default_text
from ..errors import program
from ..service.files import ServiceState, holder, service_files

_DEFAULT_URL = "http://127.0.0.1:8000"
# settings that are lists
_LISTS = {
    name for name, field in Settings.model_fields.items() if get_origin(field.annotation) is list
}

Url = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="Address of the server (default: AGENTMEM_URL, else where the service runs, "
        f"else {_DEFAULT_URL}).",
        show_default=False,
    ),
]
Key = Annotated[
    str | None,
    typer.Option(
        metavar="KEY",
        help="API key, where the server needs one (default: AGENTMEM_API_KEY).",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
Home = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR", help="Directory that holds models and stores (default: ~/.agentmem)."
    ),
]
Config = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", help="TOML file with settings, see configs/."),
]


def connect(url: str | None, api_key: str | None) -> Client:
    """Make a client of the server at `url`.

    Without one it is AGENTMEM_URL's, then this user's service if that runs, then where `agentmem
    serve` listens by default.
    """
    api_key = api_key or os.environ.get("AGENTMEM_API_KEY")
    url = url or os.environ.get("AGENTMEM_URL")
    if url:
        return Client(url, api_key)
    files = service_files()
    if not files.settings.exists():
        return Client(_DEFAULT_URL, api_key)
    if holder(files.supervisor) is None and holder(files.server) is None:
        hint = f"the service is stopped: {program()} service start, or give --url"
        return Client(_DEFAULT_URL, api_key, if_absent=hint)
    state = ServiceState.read(files.state)
    told = state.told if state else "starting"
    hint = f"the service is {told}; {program()} service status says more"
    return Client((state and state.url) or _DEFAULT_URL, api_key, if_absent=hint)


def with_client(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command of a group --url and --api-key in place of its `client`.

    Those that stand before the command, of `group_options`, count where it has none itself.
    """
    context_option = inspect.Parameter(
        "context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context
    )

    def run(context: typer.Context, url: str | None, api_key: str | None, **values: Any) -> Any:
        before: dict[str, str | None] = context.obj
        client = connect(url or before["url"], api_key or before["api_key"])
        return command(client=client, **values)

    own = [p for p in _parameters(command) if p.name != "client"]
    _take_over(run, command, [context_option, *own, _keyword("url", Url), _keyword("api_key", Key)])
    return run


def group_options(context: typer.Context, url: Url = None, api_key: Key = None) -> None:
    """Keep the options that stand before a command, for `with_client`."""
    context.obj = {"url": url, "api_key": api_key}


def with_settings(*only: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a command an option for each setting (all, or `only` these) in place of its `flags`."""
    names = only or tuple(Settings.model_fields)

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        def run(**values: Any) -> Any:
            flags = {name: values.pop(name) for name in names}
            for name in _LISTS.intersection(names):
                flags[name] = flags[name] or None  # [] is what Typer gives for none
            return command(flags=flags, **values)

        own = [p for p in _parameters(command) if p.name != "flags"]
        _take_over(run, command, [*own, *(_keyword(name, _option(name)) for name in names)])
        return run

    return decorate


def _option(name: str) -> Any:
    """Make the option of a setting: its help, its unit or choices, and its default in words."""
    field = Settings.model_fields[name]
    default = default_text(name)
    told = f" (default: {default})" if default is not None else ""
    flag = "--" + name.replace("_", "-")
    kind: Any = list[str] if name in _LISTS else str
    metavar: str | None = next((unit.name for unit in field.metadata if isinstance(unit, Unit)), "")
    if str(field.annotation).startswith("typing.Literal"):
        metavar = "|".join(get_args(field.annotation))
    if field.annotation is bool:
        kind = bool
        metavar = None
        flag = f"{flag}/--no{flag[1:]}"
    option = typer.Option(flag, help=f"{field.description}{told}.", metavar=metavar)
    return Annotated[kind | None, option]


def _keyword(name: str, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation
    )


def _parameters(command: Callable[..., Any]) -> list[inspect.Parameter]:
    return list(inspect.signature(command, eval_str=True).parameters.values())


def _take_over(
    run: Callable[..., Any], command: Callable[..., Any], parameters: list[inspect.Parameter]
) -> None:
    """Let `run` look to Typer like `command` with these parameters."""
    run.__name__ = command.__name__
    run.__doc__ = command.__doc__
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
