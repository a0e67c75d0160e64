"""A systemd user unit: systemd.service(5), systemd.exec(5), systemd.kill(5)."""

import shutil
from pathlib import Path

from .files import write_private
from .kinds import COMMAND, Description, tool

UNIT = "agentmem.service"

_TEXT = """\
# Written by `agentmem service install`, taken away by `agentmem service uninstall`.

[Unit]
Description=agentmem, a model server with persistent agents
# never give up
StartLimitIntervalSec=0

[Service]
Type=exec
# the supervisor: it starts the server, again after a crash, and keeps its log within bounds
ExecStart={command}
# should the supervisor itself end
Restart=always
RestartSec=2
# SIGTERM to the supervisor alone, which hands it on; what is left after the timeout is killed
KillMode=mixed
TimeoutStopSec={stop_seconds}
UMask=0077
WorkingDirectory=/
StandardOutput=append:{log}
{environment}
[Install]
# start it at login
WantedBy=default.target
"""


class Systemd:
    """A systemd unit of this user."""

    name = "systemd user unit"
    limits = (
        "systemd runs it while you are logged in. To have it from boot on, and after logout: "
        "loginctl enable-linger"
    )

    def __init__(self, description: Description):
        self._description = description

    @property
    def file(self) -> Path:
        # not XDG_CONFIG_HOME, which the user's systemd need not share with this shell
        return Path.home() / ".config" / "systemd" / "user" / UNIT

    def available(self) -> bool:
        return (
            shutil.which("systemctl") is not None
            and _systemctl("show-environment", check=False) == 0
        )

    def text(self) -> str:
        """Return the unit."""
        d = self._description
        variables = (f"{name}={value}" for name, value in d.environment.items())
        environment = "".join(f"Environment={_quoted(variable)}\n" for variable in variables)
        return _TEXT.format(
            command=" ".join(_quoted(part) for part in COMMAND),
            stop_seconds=d.stop_seconds,
            log=str(d.files.log).replace("%", "%%"),
            environment=environment,
        )

    def install(self) -> None:
        write_private(self.file, self.text())
        _systemctl("daemon-reload")
        _systemctl("enable", UNIT)

    def uninstall(self) -> None:
        _systemctl("disable", UNIT, check=False)
        self.file.unlink(missing_ok=True)
        _systemctl("daemon-reload", check=False)
        _systemctl("reset-failed", UNIT, check=False)

    def start(self) -> None:
        _systemctl("start", UNIT)

    def stop(self) -> None:
        _systemctl("stop", UNIT)


def _systemctl(*arguments: str, check: bool = True) -> int:
    return tool("systemctl", "--user", *arguments, check=check).returncode


def _quoted(text: str) -> str:
    """Return text as one word of ExecStart= or Environment=."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%") + '"'
