"""`launchctl` and `systemctl --user` of a machine that has neither: they run what the plist or the
unit says.

As launchd and systemd do, they start a job again 0.2 s after it ends. `bootout` returns before the
job has ended.
"""

import os
import plistlib
import shlex
import signal
import subprocess
import sys
import time
from configparser import ConfigParser
from pathlib import Path

PIDS = (
    Path(os.environ["HOME"]) / "fake-init"
)  # of the loop, which is gone when the job is; and of the job
UNITS = Path(os.environ["HOME"]) / ".config" / "systemd" / "user"


def loaded() -> bool:
    return PIDS.exists()


def run(command: list[str], environment: dict[str, str]) -> None:
    """Detached."""
    PIDS.touch()
    if os.fork():
        while not PIDS.read_text():
            time.sleep(0.01)
        return
    os.setsid()
    for fd in range(3):  # who called waits for their end
        os.dup2(os.open(os.devnull, os.O_RDWR), fd)
    bare = {"HOME": os.environ["HOME"], "PATH": "/usr/bin:/bin"} | environment
    while loaded():
        job = subprocess.Popen(command, env=bare, stdin=-3, stdout=-3, stderr=-3, cwd="/")
        PIDS.write_text(f"{job.pid}")
        job.wait()
        if PIDS.with_suffix(".stop").exists():
            PIDS.with_suffix(".stop").unlink()
            break
        time.sleep(0.2)
    PIDS.unlink()
    os._exit(0)


def stop() -> None:
    PIDS.with_suffix(".stop").touch()
    os.kill(int(PIDS.read_text()), signal.SIGTERM)


def launchctl(command: str, *arguments: str) -> int:
    if command == "print":
        return 0 if arguments[0].count("/") == 1 or loaded() else 113
    if command == "bootstrap":
        if loaded():
            return 5
        plist = plistlib.loads(Path(arguments[1]).read_bytes())
        run(plist["ProgramArguments"], plist.get("EnvironmentVariables", {}))
        return 0
    assert command == "bootout" and loaded()
    stop()
    return 36


def systemctl(user: str, command: str, *_: str) -> int:
    assert user == "--user"
    unit, wanted = UNITS / "agentmem.service", UNITS / "default.target.wants" / "agentmem.service"
    if command == "enable":
        wanted.parent.mkdir(exist_ok=True)
        wanted.symlink_to(unit)
    elif command == "disable":
        wanted.unlink()
    elif command == "start" and not loaded():
        parser = ConfigParser(interpolation=None)
        parser.read(unit)
        run(shlex.split(parser["Service"]["ExecStart"]), {})
    elif command == "stop" and loaded():
        stop()
        while loaded():
            time.sleep(0.05)
    return 0


if __name__ == "__main__":
    name, *rest = sys.argv[1:]
    raise SystemExit({"launchctl": launchctl, "systemctl": systemctl}[name](*rest))
