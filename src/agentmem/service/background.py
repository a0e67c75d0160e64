"""A plain process in the background, where there is no init system of the user's."""

import os
import subprocess
from pathlib import Path

from .kinds import COMMAND, Description


class Background:
    name = "background process"
    limits = (
        "There is neither launchd nor a systemd user session here, so nothing starts it at login or after a reboot: "
        "run `agentmem service start` then, say from cron's @reboot or a login script."
    )

    def __init__(self, description: Description):
        self._files = description.files

    @property
    def file(self) -> Path:
        return self._files.settings

    def available(self) -> bool:
        return True

    def install(self) -> None:
        pass  # the settings are all it needs

    def uninstall(self) -> None:
        pass

    def start(self) -> None:
        with open(self._files.log, "a", opener=_private) as log:
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


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
