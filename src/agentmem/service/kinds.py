"""What the three kinds of service have in common: what is installed, and how their tools are
called.
"""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from .files import ServiceError, ServiceFiles

COMMAND = (sys.executable, "-m", "agentmem.service.supervisor")
STOP_SECONDS = 60  # beyond the grace time: tails are written, the model leaves
_ENVIRONMENT = (
    *("AGENTMEM_BLAS", "HF_HOME", "HF_HUB_CACHE", "HF_ENDPOINT", "HF_HUB_OFFLINE"),
    *("HTTPS_PROXY", "HTTP_PROXY", "NO_PROXY", "https_proxy", "http_proxy", "no_proxy"),
)


@dataclass(frozen=True)
class Description:
    files: ServiceFiles
    grace: float  # seconds that the server's running answers get

    @property
    def stop_seconds(self) -> int:
        """After SIGTERM, before SIGKILL."""
        return int(self.grace) + STOP_SECONDS

    @property
    def environment(self) -> dict[str, str]:
        """What a model's download needs, and an init system would not hand on."""
        return {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}


def tool(*command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Of an init system. Raises ServiceError with what it says."""
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if check and done.returncode:
        said = " ".join((done.stderr or done.stdout).split()) or "no message"
        raise ServiceError(f"{' '.join(command)} failed with {done.returncode}: {said}")
    return done


def write_private(path: Path, text: str) -> None:
    """0600, whole or not at all."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.new")
    new.unlink(missing_ok=True)
    with os.fdopen(
        os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8"
    ) as file:
        file.write(text)
    new.replace(path)
