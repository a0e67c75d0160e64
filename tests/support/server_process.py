"""A real server process for tests and benchmarks: start it, talk to it, stop or kill it."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

_SERVE = (sys.executable, "-m", "agentmem", "serve")


class ServerProcess:
    def __init__(
        self,
        home: Path,
        *flags: str,
        model: str | Path | None = None,
        command: Sequence[str] = _SERVE,
    ):
        """`home` gets the store; `model` a directory; `command` is what `serve`'s options are
        appended to.
        """
        command = [*command, "--home", str(home), "--port", "0", *flags]
        command += ["--model", str(model)] if model else []
        home.mkdir(parents=True, exist_ok=True)
        self.home = home
        self._log = (home / "server.log").open("a")
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )
        self.output = []
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.output.append(line)
            if line.startswith("Ready: "):
                self.url = line.split()[1]
                break
        else:
            raise AssertionError(f"the server ended with {self.process.wait()}: {self.output}")
        self.client = httpx.Client(base_url=self.url, timeout=120)

    def chat(
        self, messages: list[dict[str, str]], agent: str = "alice", **body: Any
    ) -> dict[str, Any]:
        body = {"messages": messages, "agent_id": agent, "temperature": 0, "max_tokens": 24} | body
        response = self.client.post("/chat/completions", json=body)
        assert response.status_code == 200, response.text
        return response.json()

    def stop(self, signal_number: int = signal.SIGTERM) -> int:
        """The exit code."""
        self.client.close()
        self.process.send_signal(signal_number)
        code = self.process.wait(60)
        assert self.process.stdout is not None
        self.process.stdout.close()
        self._log.close()
        return code

    def __enter__(self) -> "ServerProcess":
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.stop(signal.SIGKILL)
