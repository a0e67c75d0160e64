"""A launchd agent: launchd.plist(5), launchctl(1)."""

import os
import plistlib
import shutil
import time
from pathlib import Path

from .files import ServiceError, write_private
from .kinds import COMMAND, Description, tool

LABEL = "local.agentmem.server"

_COMMENTS = {
    "Label": "Written by `agentmem service install`, taken away by `agentmem service uninstall`.",
    "ProgramArguments": (
        "The supervisor: it starts the server, again after a crash, and keeps its log within "
        "bounds."
    ),
    "RunAtLoad": "Start it at login.",
    "KeepAlive": (
        "Start the supervisor again should it end, but not more often than every so many seconds."
    ),
    "ExitTimeOut": (
        "Seconds from SIGTERM to SIGKILL: running answers may finish, caches are written."
    ),
    "ProcessType": "As much CPU and disk as an app gets: launchd slows down agents of other types.",
    "Umask": "0077: nobody else reads what it writes.",
    "EnvironmentVariables": "What a model's download needs; from the shell that installed it.",
}


class Launchd:
    """A launchd agent of this user."""

    name = "launchd agent"
    limits = (
        "launchd runs it while you are logged in at the Mac's screen, and starts it at that login."
    )

    def __init__(self, description: Description):
        self._description = description

    @property
    def file(self) -> Path:
        return Path.home() / "Library" / "LaunchAgents" / f"{LABEL}.plist"

    def available(self) -> bool:
        """Return whether there is a session to run it in; over SSH alone there is none."""
        return (
            shutil.which("launchctl") is not None
            and tool("launchctl", "print", _domain(), check=False).returncode == 0
        )

    def text(self) -> str:
        """Return the plist, with a comment on each entry."""
        d = self._description
        log = str(d.files.log)
        values = {
            "Label": LABEL,
            "ProgramArguments": list(COMMAND),
            "RunAtLoad": True,
            "KeepAlive": True,
            "ThrottleInterval": 2,
            "ExitTimeOut": d.stop_seconds,
            "ProcessType": "Interactive",
            "Umask": 0o077,
            "StandardOutPath": log,
            "StandardErrorPath": log,
        }
        if d.environment:
            values["EnvironmentVariables"] = d.environment
        text = plistlib.dumps(values, sort_keys=False).decode()
        for key, comment in _COMMENTS.items():
            entry = f"\n\t<key>{key}</key>"
            text = text.replace(entry, f"\n\t<!-- {comment} -->{entry}")
        return text

    def install(self) -> None:
        write_private(self.file, self.text())

    def uninstall(self) -> None:
        self.file.unlink(missing_ok=True)

    def start(self) -> None:
        if _loaded():  # since login
            tool("launchctl", "kickstart", _target())
        else:
            tool("launchctl", "bootstrap", _domain(), str(self.file))

    def stop(self) -> None:
        """Stop it, and wait until it is gone.

        bootout may return early, with "in progress"; bootstrap fails until it is done.
        """
        if not _loaded():
            return
        said = tool("launchctl", "bootout", _target(), check=False)
        deadline = time.monotonic() + self._description.stop_seconds + 5
        while _loaded():
            if time.monotonic() >= deadline:
                raise ServiceError(
                    f"launchctl bootout {_target()}: it is still there: {said.stderr.strip()}"
                )
            time.sleep(0.2)


def _domain() -> str:
    return f"gui/{os.getuid()}"


def _target() -> str:
    return f"{_domain()}/{LABEL}"


def _loaded() -> bool:
    return tool("launchctl", "print", _target(), check=False).returncode == 0
