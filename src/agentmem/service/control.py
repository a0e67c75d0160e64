"""What `agentmem service` does, whatever the kind of service."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..client import Client
from ..config import Settings, load_settings
from ..errors import AgentMemError, StartupError, program
from .files import ServiceError, ServiceState, end, holder, service_files, write_private
from .kinds import Background, Description
from .launchd import Launchd
from .settings_file import render
from .supervisor import OLD_LOGS, STARTED
from .systemd import Systemd

ServiceKind = Launchd | Systemd | Background
_STARTS_WITHIN = 15.0  # s: the supervisor, which loads nothing
_SHOWN_LINES = 15  # of the log, where a start fails
# how names of our files begin; a key that a user put there is none
_OURS = ("serve.toml", "server.log", "server.lock", "supervisor.lock", "state.")


@dataclass(frozen=True)
class ServiceStatus:
    """How the service fares.

    `pid` is the server's, `since` its start in Unix seconds; `restarts` counts from the
    supervisor's.
    """

    installed: str | None
    file: str | None
    # stopped, starting, ready, waiting (to start it again), stopping, orphaned (without supervisor)
    phase: str
    healthy: bool
    pid: int | None = None
    supervisor_pid: int | None = None
    url: str | None = None
    since: float | None = None
    restarts: int = 0
    ended: str | None = None  # how the server ended, the last time that it did


class Service:
    """This user's service."""

    def __init__(self) -> None:
        self.files = service_files()
        description = Description(self.files, self._grace())
        self._stop_seconds = description.stop_seconds
        self._kinds: tuple[ServiceKind, ...] = (
            Launchd(description),
            Systemd(description),
            Background(description),
        )

    def _grace(self) -> float:
        """Return the grace time of the installed settings, be they broken by now."""
        try:
            return load_settings({}, self.files.settings).grace
        except StartupError:
            default: float = Settings.model_fields["grace"].default
            return default

    @property
    def installed(self) -> ServiceKind | None:
        return next((kind for kind in self._kinds if kind.file.exists()), None)

    @property
    def running(self) -> bool:
        return holder(self.files.supervisor) is not None or holder(self.files.server) is not None

    def refuse_if_running(self, *, force: bool) -> None:
        if self.running and not force:
            raise StartupError(
                "the service is installed and running: --force stops and replaces it"
            )

    def check_installed(self) -> ServiceKind:
        if (kind := self.installed) is None:
            raise StartupError(f"the service is not installed: {program()} service install")
        load_settings({}, self.files.settings)  # it may have been edited
        return kind

    def install(self, settings: Settings) -> ServiceKind:
        """Write what there is to write, for `settings` that have been checked.

        What was installed goes first.
        """
        self.uninstall()
        write_private(self.files.settings, render(settings))
        new = Service()  # with the new grace time
        kind = next(kind for kind in new._kinds if kind.available())
        try:
            kind.install()
        except BaseException:
            new.uninstall()
            raise
        return kind

    def uninstall(self) -> ServiceKind | None:
        """Stop it and take away every file, not models and stores; None: it was not installed."""
        kind = self.installed
        self.stop()
        if kind:
            kind.uninstall()
        for path in self.files.root.glob("*"):
            if path.name.startswith(_OURS):
                path.unlink()
        for directory in (self.files.root, self.files.root.parent):
            if directory.is_dir() and not any(directory.iterdir()):
                directory.rmdir()
        return kind

    def start(self, progress: Callable[[str], None]) -> str:
        """Start it, and return the server's URL, once that answers.

        Raise ServiceError: it ended before, or the supervisor did not come up.
        """
        kind = self.check_installed()
        if holder(self.files.supervisor) is not None:
            return self._wait_until_ready(progress)
        self.files.state.unlink(missing_ok=True)
        kind.start()
        try:
            return self._wait_until_ready(progress)
        except ServiceError:
            self.stop()
            raise

    def _wait_until_ready(self, progress: Callable[[str], None]) -> str:
        began = time.monotonic()
        before = ServiceState.read(self.files.state)
        restarts = before.restarts if before else 0
        while True:
            state = ServiceState.read(self.files.state)
            if state and (state.restarts > restarts or state.phase == "waiting"):
                raise ServiceError(
                    f"the server ended ({state.ended}) before it answered. {self._last_said()}"
                )
            if state and state.url and health(state.url):
                return state.url
            if holder(self.files.supervisor) is None and time.monotonic() - began > _STARTS_WITHIN:
                raise ServiceError(f"the service does not start. {self._last_said()}")
            progress("".join(self._log_lines(1)))
            time.sleep(0.1)

    def _last_said(self) -> str:
        lines = self._log_lines(_SHOWN_LINES)
        starts = [i for i, line in enumerate(lines) if line.startswith(STARTED)]
        shown = "".join(f"\n  {line.rstrip()}" for line in lines[starts[-1] + 1 if starts else 0 :])
        return f"Its log ({self.files.log}) ends with:{shown}" if shown else "Its log says nothing."

    def stop(self) -> bool:
        """Stop what runs, also a server that lost its supervisor; agents are saved first.

        Return whether there was something to stop.
        """
        was_running = self.running
        if kind := self.installed:
            kind.stop()
        # for both: the supervisor hands SIGTERM on
        deadline = time.monotonic() + self._stop_seconds
        for lock in (self.files.supervisor, self.files.server):
            end(lock, max(0.0, deadline - time.monotonic()))
        return was_running

    def status(self) -> ServiceStatus:
        kind = self.installed
        name = kind.name if kind else None
        file = str(kind.file) if kind else None
        supervisor = holder(self.files.supervisor)
        server = holder(self.files.server)
        state = ServiceState.read(self.files.state)
        if supervisor is None and server is None:
            return ServiceStatus(name, file, phase="stopped", healthy=False)
        if state is None:
            return ServiceStatus(
                name,
                file,
                phase="starting",
                healthy=False,
                pid=server or None,
                supervisor_pid=supervisor or None,
            )
        return ServiceStatus(
            name,
            file,
            phase=state.phase if supervisor is not None else "orphaned",
            healthy=state.url is not None and health(state.url) is not None,
            pid=server or None,
            supervisor_pid=supervisor or None,
            url=state.url,
            since=state.since if server else None,
            restarts=state.restarts,
            ended=state.ended,
        )

    def log(self, n: int, *, follow: bool) -> Iterator[str]:
        """Yield the last n lines; then, with `follow`, what is written from now on, without end.

        It goes on through rotations.
        """
        yield from self._log_lines(n)
        if not follow:
            return
        file = self.files.log.open(errors="replace")
        file.seek(0, os.SEEK_END)
        while True:
            if text := file.read():
                yield text
            elif _replaced(self.files.log, file.fileno()):
                file.close()
                file = self.files.log.open(errors="replace")
            else:
                time.sleep(0.2)

    def _log_lines(self, n: int) -> list[str]:
        """Return the last n of all logs that are kept."""
        log = self.files.log
        older = [log.with_name(f"{log.name}.{i + 1}") for i in range(OLD_LOGS)]
        lines: list[str] = []
        for path in (log, *older):
            if path.exists() and len(lines) < n:
                said = path.read_text(errors="replace").splitlines(keepends=True)
                lines = said[len(lines) - n :] + lines
        return lines


def _replaced(path: Path, fd: int) -> bool:
    try:
        return not os.path.samestat(path.stat(), os.fstat(fd))
    except FileNotFoundError:
        return False


def health(url: str) -> dict[str, Any] | None:
    """Return what a healthy server says of itself; None of one that isn't, or doesn't answer."""
    try:
        found = Client(url).health()
    except AgentMemError:
        return None
    return found if found.get("status") in ("ok", "degraded") else None


def check(settings: Settings) -> None:
    """Check what can be known of settings without starting a server. Raise StartupError."""
    from ..models.loading import find_local
    from ..models.model_dir import read_model_dir
    from ..server.auth import read_api_keys
    from ..store.files.master_key import KEY_VARIABLE

    read_api_keys(settings.api_keys)
    if (path := find_local(settings.model, settings.home_dir)) is not None:
        read_model_dir(path)
    has_keychain = sys.platform == "darwin" and KEY_VARIABLE not in os.environ
    if settings.encrypt and settings.key_file is None and not has_keychain:
        raise StartupError(f"--encrypt needs --key-file here: the service keeps no {KEY_VARIABLE}")
