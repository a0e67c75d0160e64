"""Kinds of service: what all of them need, and the plain one, where there is no init system."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from ..errors import program
from .files import ServiceError, ServiceFiles, open_private

COMMAND = (sys.executable, "-m", "agentmem.service.supervisor")
STOP_SECONDS = 60  # beyond the grace time: tails are written, the model leaves
_ENVIRONMENT = (
    "AGENTMEM_BLAS",
    "HF_HOME",
    "HF_HUB_CACHE",
    "HF_ENDPOINT",
    "HF_HUB_OFFLINE",
    "HTTPS_PROXY",
    "HTTP_PROXY",
    "NO_PROXY",
    "https_proxy",
    "http_proxy",
    "no_proxy",
)


@dataclass(frozen=True)
class Description:
    """What a service is made of."""

    files: ServiceFiles
    grace: float  # seconds that the server's running answers get

    @property
    def stop_seconds(self) -> int:
        """The time from SIGTERM to SIGKILL."""
        return int(self.grace) + STOP_SECONDS

    @property
    def environment(self) -> dict[str, str]:
        """What a model's download needs, and an init system would not hand on."""
        return {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}


def tool(*command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Call a tool of an init system. Raise ServiceError with what it says."""
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if check and done.returncode:
        said = " ".join((done.stderr or done.stdout).split()) or "no message"
        raise ServiceError(f"{' '.join(command)} failed with {done.returncode}: {said}")
    return done


class Background:
    """A plain process: its settings are all that is installed."""

    name = "background process"

    def __init__(self, description: Description):
        self._files = description.files

    @property
    def limits(self) -> str:
        return (
            "There is neither launchd nor a systemd user session here, so nothing starts it at "
            f"login or after a reboot: run `{program()} service start` then, say from cron's "
            "@reboot or a login script."
        )

    @property
    def file(self) -> Path:
        return self._files.settings

    def available(self) -> bool:
        return True

    def install(self) -> None:
        pass

    def uninstall(self) -> None:
        pass

    def start(self) -> None:
        with open(self._files.log, "a", opener=open_private) as log:
            subprocess.Popen(
                COMMAND,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                start_new_session=True,
            )

    def stop(self) -> None:
        pass  # whoever holds the locks is ended, see control.py
