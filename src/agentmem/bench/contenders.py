"""Who takes part in a comparison: agentmem, mlx-lm and llama.cpp, which are started, and servers
that run already.
"""

import importlib.metadata
import shlex
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from mlx_lm.utils import load_config

from ..config import Settings
from ..errors import StartupError
from .float32 import on_cpu, write_float32
from .process import Process, connect
from .result import Part
from .server import Answer, BenchError, Messages, Server, ask
from .session import Session

AGENTMEM, MLX_LM, LLAMA_CPP = "agentmem", "mlx-lm", "llama.cpp"


class About(Part):
    """What was compared, for whoever wants to know whether it was fair."""

    name: str
    what: str  # the command that started it, or its URL
    version: str | None
    weights: str
    preparation: str | None  # what was done beside starting it


@dataclass
class Contender:
    about: About
    start: (
        Callable[[], Server | Process] | None
    )  # None: it runs already, and keeps what it has cached
    body: dict[str, Any]  # of each request
    client: httpx.Client | None = None
    running: Server | Process | None = field(default=None, init=False)

    @property
    def name(self) -> str:
        return self.about.name

    def restart(self) -> None:
        """Stopped as an administrator would, and started again; what it persisted, it has."""
        if self.start:
            self.stop()
            self.running = self.start()
            self.client = self.running.client

    def stop(self) -> None:
        if self.running:
            self.running.stop()
            self.running = None

    def warm_up(self, text: str) -> None:
        """Without a chat template where one's first tokens would stay cached, and the next prompt
        not be cold.
        """
        assert self.client
        if self.name not in (MLX_LM, LLAMA_CPP):
            self.ask("warm-up", [{"role": "user", "content": text}], 2)
            return
        response = self.client.post(
            "/completions", json={"prompt": text, "max_tokens": 2, "temperature": 0}
        )
        if response.status_code != 200:
            raise BenchError(f"{self.name}: {response.status_code} {response.text[:300]}")

    def ask(self, agent: str, messages: Messages, max_tokens: int) -> Answer:
        """Greedy. The end of an answer is made unlikely where a server knows `logit_bias` or
        `ignore_eos`.
        """
        assert self.client
        of_agent: dict[str, Any] = {"agent_id": agent} if self.name == AGENTMEM else {}
        return ask(self.client, messages, max_tokens, **self.body, **of_agent)


@dataclass(frozen=True)
class Place:
    """Where and with what contenders are started."""

    session: Session
    settings: Settings
    model: Path  # a directory
    gguf: Path | None
    tokens: int  # of the longest prompt with its answers
    agents: int  # most that are held at once

    def contenders(self, names: list[str]) -> list[Contender]:
        """Of command line arguments that passed `check_names`; `restart` starts them. Raises
        StartupError.
        """
        makers = {AGENTMEM: self._agentmem, MLX_LM: self._mlx_lm, LLAMA_CPP: self._llama_cpp}
        model, weights = self.model, "as in the model directory"
        if on_cpu() and {AGENTMEM, MLX_LM} & set(names):
            model = write_float32(
                self.model, self.settings.home_dir, self.session.directory / "float32" / "model"
            )
            weights = "dequantized to float32, one copy for agentmem and mlx-lm (the only dtype that is fast on a CPU)"
        return [
            makers[name](model, weights, self._body())
            if name in makers
            else _connected(name, self._body())
            for name in names
        ]

    def _body(self) -> dict[str, Any]:
        eos = load_config(self.model).get("eos_token_id")
        ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
        return {"ignore_eos": True, "logit_bias": {str(i): -100 for i in ids}}

    def _agentmem(self, model: Path, weights: str, body: dict[str, Any]) -> Contender:
        home = self.session.directory / AGENTMEM
        start = lambda: Server(self.session, self.settings, model, home)  # noqa: E731
        about = About(
            name=AGENTMEM,
            what="agentmem serve",
            version=importlib.metadata.version("agentmem"),
            weights=weights,
            preparation=None,
        )
        return Contender(about, start, body)

    def _mlx_lm(self, model: Path, weights: str, body: dict[str, Any]) -> Contender:
        options = ["--model", str(model), "--prompt-cache-size", "64", "--log-level", "WARNING"]
        if on_cpu():
            # 1,000 tokens took 10 % more time in its default, one step of 2,048
            options += ["--prefill-step-size", str(self.settings.prefill_chunk)]
            home = str(self.session.directory / "blas")
            command = [sys.executable, "-m", "agentmem.bench.mlx_lm_server", home, *options]
            preparation = "agentmem's BLAS and allocator settings are loaded before MLX, so that both compute alike"
        else:
            command, preparation = [sys.executable, "-m", "mlx_lm", "server", *options], None
        about = About(
            name=MLX_LM,
            what=f"mlx_lm.server {shlex.join(options[2:])}",
            version=importlib.metadata.version("mlx-lm"),
            weights=weights,
            preparation=preparation,
        )
        return Contender(
            about,
            lambda: Process(self.session, command, self.session.directory / "mlx-lm.log"),
            body,
        )

    def _llama_cpp(self, model: Path, weights: str, body: dict[str, Any]) -> Contender:
        """A slot for each agent, so that none loses its cache to another. Its defaults otherwise."""
        assert self.gguf
        options = ["--parallel", str(self.agents), "--ctx-size", str(self.agents * self.tokens)]
        command = ["llama-server", "--model", str(self.gguf), *options]
        about = About(
            name=LLAMA_CPP,
            what=f"llama-server {shlex.join(options)}",
            version=None,
            weights=f"{self.gguf.name}, not those of the others",
            preparation=None,
        )
        return Contender(
            about,
            lambda: Process(self.session, command, self.session.directory / "llama.log"),
            body,
        )


def check_names(names: list[str], gguf: Path | None) -> None:
    """Before any work. Raises StartupError."""
    if LLAMA_CPP in names and (
        shutil.which("llama-server") is None or gguf is None or not gguf.is_file()
    ):
        raise StartupError(
            "llama.cpp needs llama-server on the PATH, and a model of its own kind: --gguf FILE"
        )
    for name in names:
        if name not in (AGENTMEM, MLX_LM, LLAMA_CPP) and not name.partition("=")[2].startswith(
            ("http://", "https://")
        ):
            raise StartupError(
                f"{name}: name {AGENTMEM}, {MLX_LM}, {LLAMA_CPP}, or NAME=http://host:port/v1"
            )
    known = [name.partition("=")[0] for name in names]
    if len(set(known)) < len(known):
        raise StartupError(f"{', '.join(known)}: each server needs a name of its own")


def _connected(argument: str, body: dict[str, Any]) -> Contender:
    """One that runs already. The model it is asked for is the one it lists; of several, its
    default.
    """
    name, _, url = argument.partition("=")
    client = connect(url, proxies=True)
    try:
        models = client.get("/models").json()["data"]
    except (httpx.HTTPError, ValueError, KeyError) as e:
        raise StartupError(
            f"{name}: {url}/models does not answer: {type(e).__name__}: {e}"
        ) from None
    if len(models) == 1:
        body = body | {"model": models[0]["id"]}
    about = About(name=name, what=url, version=None, weights="its own", preparation=None)
    return Contender(about, None, body, client)
