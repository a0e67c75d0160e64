"""`agentmem service`: a server that is simply there, kept running by launchd, systemd or a
supervisor of its own.
"""

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from ..config import load_settings
from ..errors import StartupError
from .agents import Json, ago, progress_bar

if TYPE_CHECKING:
    from ..service.control import Service


class _Commands(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except OSError as e:
            if e.filename is None:
                raise
            raise StartupError(f"{e.filename}: {e.strerror}") from None


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    help="Run the server in the background, from login on, and again after a crash.",
)

_UNHEALTHY, _STOPPED = 1, 3  # exit codes of status; systemctl's is 3 too


def install(
    flags: dict[str, Any],
    config: Annotated[
        Path | None, typer.Option("--config", help="TOML file with settings, see configs/")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="stop and replace an installed service that runs")
    ] = False,
) -> None:
    """Install the service for this user, with the options of serve; it starts at the next login, or
    by start.
    """
    from ..service.control import check

    settings = load_settings(flags, config)
    service = _service()
    service.refuse_if_running(force=force)
    check(settings)
    kind = service.install(settings)
    print(f"Installed, a {kind.name}: {kind.file}")
    print(f"Settings: {service.files.settings} (a copy: edit it, then agentmem service restart)")
    print(f"{kind.limits}\nStart it now: agentmem service start")


@app.command()
def uninstall() -> None:
    """Stop the service and take away all its files. Models, agents and their caches stay."""
    print("Uninstalled." if _service().uninstall() else "There was no service installed.")


@app.command()
def start() -> None:
    """Start the service; returns when the model answers. Exit code 1, with the log's last lines, if
    it ends instead.
    """
    _start(_service())


@app.command()
def stop() -> None:
    """Stop the service until it is started, or until the next login: running answers finish, agents
    are saved.
    """
    print("Stopped." if _stop(_service()) else "It was not running.")


@app.command()
def restart() -> None:
    """Stop and start, with settings as they are by now; returns when the model answers."""
    service = _service()
    service.check_installed()
    _stop(service)
    _start(service)


@app.command()
def status(as_json: Json = False) -> None:
    """Whether the service is installed, runs and is healthy. Exit code 0: healthy; 1: not healthy;
    3: not running.
    """
    found = _service().status()
    running = found.phase != "stopped"
    if as_json:
        print(json.dumps({"running": running} | asdict(found), indent=2))
    else:
        print(f"installed  {f'{found.installed}, {found.file}' if found.installed else 'no'}")
        print(f"running    {_running(found) if running else 'no'}")
        print(f"healthy    {'yes' if found.healthy else 'no'}")
    raise typer.Exit(0 if found.healthy else _UNHEALTHY if running else _STOPPED)


def _running(found: Any) -> str:
    parts = [found.phase if found.url is None else f"{found.phase} at {found.url}"]
    if found.pid and found.since:
        moment = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(found.since))
        parts.append(f"pid {found.pid}, since {moment} ({ago(found.since)})")
    parts.append(
        f"{found.restarts} restarts" + (f", the last time {found.ended}" if found.ended else "")
    )
    if found.phase == "orphaned":
        parts.append("its supervisor is gone, and start replaces it")
    return "; ".join(parts)


@app.command()
def logs(
    follow: Annotated[
        bool, typer.Option("-f", "--follow", help="go on with what is written, until Ctrl-C")
    ] = False,
    lines: Annotated[int, typer.Option("-n", "--lines", min=0, help="of the end")] = 50,
) -> None:
    """Show the log of the server and of its supervisor."""
    service = _service()
    if not service.files.log.exists():
        raise StartupError(f"there is no log yet: {service.files.log}")
    for text in service.log(lines, follow=follow):
        print(text, end="", flush=True)


def _start(service: "Service") -> None:
    began = time.monotonic()
    with progress_bar() as progress:
        task = progress.add_task("starting", total=None)
        url = service.start(
            lambda said: progress.update(task, description=f"starting: {said.strip()[:100]}")
        )
    print(f"Ready: {url}/v1, after {time.monotonic() - began:.1f} s")


def _stop(service: "Service") -> bool:
    with progress_bar() as progress:
        progress.add_task("stopping", total=None)
        return service.stop()


def _service() -> "Service":
    from ..service.control import Service

    return Service()
