"""`agentmem service`: a server that is simply there, and is kept running."""

import time
from dataclasses import asdict
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ..config import load_settings
from ..errors import StartupError, program
from ..service.control import Service, ServiceStatus, check
from .options import Config, Json, with_settings
from .show import ago, print_json, progress_bar

# exit codes of status
_UNHEALTHY = 1
_STOPPED = 3  # as systemctl's


class _ServiceCommands(TyperGroup):
    """Makes a user's fault of a file that can't be read or written."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except OSError as e:
            if e.filename is None:
                raise
            raise StartupError(f"{e.filename}: {e.strerror}") from None


app = typer.Typer(
    cls=_ServiceCommands,
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Run the server in the background, from login on. It is started again after a crash.",
)


@app.command()
@with_settings()
def install(
    flags: dict[str, Any],
    config: Config = None,
    force: Annotated[
        bool, typer.Option("--force", help="Stop and replace an installed service that runs.")
    ] = False,
) -> None:
    """Install the service for this user, with the options of serve.

    It starts at the next login, or by start.
    """
    settings = load_settings(flags, config)
    service = Service()
    service.refuse_if_running(force=force)
    check(settings)
    kind = service.install(settings)
    command = f"{program()} service"
    print(f"Installed, a {kind.name}: {kind.file}")
    print(f"Settings: {service.files.settings} (a copy: edit it, then {command} restart)")
    print(f"{kind.limits}\nStart it now: {command} start")


@app.command()
def start() -> None:
    """Start the service, and return when the model answers.

    The exit code is 1, with the log's last lines, if it ends instead.
    """
    _start(Service())


@app.command()
def status(as_json: Json = False) -> None:
    """Show whether the service is installed, runs and is healthy.

    The exit code is 0 where it is healthy, 1 where it is not, and 3 where it does not run.
    """
    found = Service().status()
    running = found.phase != "stopped"
    if as_json:
        print_json({"running": running} | asdict(found))
    else:
        installed = f"{found.installed}, {found.file}" if found.installed else "no"
        print(f"installed  {installed}")
        print(f"running    {_running(found) if running else 'no'}")
        print(f"healthy    {'yes' if found.healthy else 'no'}")
    if found.healthy:
        raise typer.Exit(0)
    raise typer.Exit(_UNHEALTHY if running else _STOPPED)


def _running(found: ServiceStatus) -> str:
    parts = [found.phase if found.url is None else f"{found.phase} at {found.url}"]
    if found.pid and found.since:
        moment = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(found.since))
        parts.append(f"pid {found.pid}, since {moment} ({ago(found.since)})")
    last = f", the last time {found.ended}" if found.ended else ""
    parts.append(f"{found.restarts} restarts{last}")
    if found.phase == "orphaned":
        parts.append("its supervisor is gone, and start replaces it")
    return "; ".join(parts)


@app.command()
def logs(
    follow: Annotated[
        bool, typer.Option("-f", "--follow", help="Go on with what is written, until Ctrl-C.")
    ] = False,
    lines: Annotated[int, typer.Option("-n", "--lines", min=0, help="Lines of the end.")] = 50,
) -> None:
    """Show the log of the server and of its supervisor."""
    service = Service()
    if not service.files.log.exists():
        raise StartupError(f"there is no log yet: {service.files.log}")
    for text in service.log(lines, follow=follow):
        print(text, end="", flush=True)


@app.command()
def restart() -> None:
    """Stop and start, with settings as they are by now. It returns when the model answers."""
    service = Service()
    service.check_installed()
    _stop(service)
    _start(service)


@app.command()
def stop() -> None:
    """Stop the service until it is started, or until the next login.

    Running answers finish, and agents are saved.
    """
    print("Stopped." if _stop(Service()) else "It was not running.")


@app.command()
def uninstall() -> None:
    """Stop the service and take away all its files. Models, agents and their caches stay."""
    print("Uninstalled." if Service().uninstall() else "There was no service installed.")


def _start(service: Service) -> None:
    began = time.monotonic()
    with progress_bar() as progress:
        task = progress.add_task("starting", total=None)

        def show(said: str) -> None:
            progress.update(task, description=f"starting: {said.strip()[:100]}")

        url = service.start(show)
    print(f"Ready: {url}/v1, after {time.monotonic() - began:.1f} s")


def _stop(service: Service) -> bool:
    with progress_bar() as progress:
        progress.add_task("stopping", total=None)
        return service.stop()
