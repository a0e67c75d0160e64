"""Who takes part in a comparison: servers that are started here, and servers that run already.

Started here are agentmem, mlx-lm and llama.cpp.
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

from ...errors import StartupError
from .options import BenchRun
from .process import Process
from .result import ResultPart
from .server import BenchError, ChatMessages, Server, TimedAnswer, ask, connect

AGENTMEM = "agentmem"
MLX_LM = "mlx-lm"
LLAMA_CPP = "llama.cpp"


class About(ResultPart):
    """What was compared, for whoever wants to know whether it was fair."""

    name: str
    what: str  # the command that started it, or its URL
    version: str | None
    weights: str
    preparation: str | None  # what was done beside starting it


@dataclass
class Contender:
    """A server, as one of several that are asked the same."""

    about: About
    # None: it runs already, and keeps what it has cached
    start: Callable[[], Server | Process] | None
    body: dict[str, Any]  # of each request
    client: httpx.Client | None = None
    running: Server | Process | None = field(default=None, init=False)

    @property
    def name(self) -> str:
        return self.about.name

    def restart(self) -> None:
        """Stop it as an administrator would, and start it again; what it persisted, it has."""
        if self.start:
            self.stop()
            self.running = self.start()
            self.client = self.running.client

    def stop(self) -> None:
        if self.running:
            self.running.stop()
            self.running = None

    def warm_up(self, text: str) -> None:
        """Let it answer once.

        No chat template where one's first tokens would stay cached, and the next prompt not be
        cold.
        """
        assert self.client
        if self.name not in (MLX_LM, LLAMA_CPP):
            self.ask("warm-up", [{"role": "user", "content": text}], 2)
            return
        body = {"prompt": text, "max_tokens": 2, "temperature": 0}
        response = self.client.post("/completions", json=body)
        if response.status_code != 200:
            raise BenchError(f"{self.name}: {response.status_code} {response.text[:300]}")

    def ask(self, agent: str, messages: ChatMessages, max_tokens: int) -> TimedAnswer:
        """Return a greedy answer.

        Its end is made unlikely where a server knows `logit_bias` or `ignore_eos`.
        """
        assert self.client
        of_agent: dict[str, Any] = {"agent_id": agent} if self.name == AGENTMEM else {}
        return ask(self.client, messages, max_tokens, **self.body, **of_agent)


@dataclass(frozen=True)
class ContenderFactory:
    """Starts contenders, in one place and with the same model."""

    run: BenchRun
    gguf: Path | None
    tokens: int  # of the longest prompt with its answers
    agents: int  # most that are held at once

    def contenders(self, names: list[str]) -> list[Contender]:
        """Return those that `names`, which passed `check_names`, stand for; `restart` starts them.

        Raises StartupError.
        """
        from .float32 import on_cpu, write_float32

        run = self.run
        model = run.model
        weights = "as in the model directory"
        if on_cpu() and {AGENTMEM, MLX_LM} & set(names):
            copy = run.session.directory / "float32" / "model"
            model = write_float32(run.model, run.settings.home_dir, copy)
            weights = (
                "dequantized to float32, one copy for agentmem and mlx-lm "
                "(the only dtype that is fast on a CPU)"
            )
        makers = {AGENTMEM: self._agentmem, MLX_LM: self._mlx_lm, LLAMA_CPP: self._llama_cpp}
        body = self._body()
        made = []
        for name in names:
            maker = makers.get(name)
            made.append(maker(model, weights, body) if maker else _connected(name, body))
        return made

    def _body(self) -> dict[str, Any]:
        from mlx_lm.utils import load_config

        eos = load_config(self.run.model).get("eos_token_id")
        ids = eos if isinstance(eos, list) else [eos]
        unlikely = {str(i): -100 for i in ids if i is not None}
        return {"ignore_eos": True, "logit_bias": unlikely}

    def _process(self, command: list[str], log: str) -> Process:
        return Process(self.run.session, command, self.run.session.directory / log)

    def _agentmem(self, model: Path, weights: str, body: dict[str, Any]) -> Contender:
        run = self.run
        home = run.session.directory / AGENTMEM
        about = About(
            name=AGENTMEM,
            what="agentmem serve",
            version=importlib.metadata.version("agentmem"),
            weights=weights,
            preparation=None,
        )
        return Contender(about, lambda: Server(run.session, run.settings, model, home), body)

    def _mlx_lm(self, model: Path, weights: str, body: dict[str, Any]) -> Contender:
        from .float32 import on_cpu

        options = ["--model", str(model), "--prompt-cache-size", "64", "--log-level", "WARNING"]
        if on_cpu():
            # 1,000 tokens took 10 % more time in its default, one step of 2,048
            options += ["--prefill-step-size", str(self.run.settings.prefill_chunk)]
            home = str(self.run.session.directory / "blas")
            module = "agentmem.bench.harness.mlx_lm_server"
            command = [sys.executable, "-m", module, home, *options]
            preparation = (
                "agentmem's BLAS and allocator settings are loaded before MLX, "
                "so that both compute alike"
            )
        else:
            command = [sys.executable, "-m", "mlx_lm", "server", *options]
            preparation = None
        about = About(
            name=MLX_LM,
            what=f"mlx_lm.server {shlex.join(options[2:])}",
            version=importlib.metadata.version("mlx-lm"),
            weights=weights,
            preparation=preparation,
        )
        return Contender(about, lambda: self._process(command, "mlx-lm.log"), body)

    def _llama_cpp(self, model: Path, weights: str, body: dict[str, Any]) -> Contender:
        """Give each agent a slot, so that none loses its cache to another; defaults otherwise."""
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
        return Contender(about, lambda: self._process(command, "llama.log"), body)


def check_names(names: list[str], gguf: Path | None) -> None:
    """Raise StartupError, before any work, for a server that can't be started or told apart."""
    has_gguf = gguf is not None and gguf.is_file()
    if LLAMA_CPP in names and (shutil.which("llama-server") is None or not has_gguf):
        raise StartupError(
            "llama.cpp needs llama-server on the PATH, and a model of its own kind: --gguf FILE"
        )
    for name in names:
        url = name.partition("=")[2]
        started = name in (AGENTMEM, MLX_LM, LLAMA_CPP)
        if not started and not url.startswith(("http://", "https://")):
            raise StartupError(
                f"{name}: name {AGENTMEM}, {MLX_LM}, {LLAMA_CPP}, or NAME=http://host:port/v1"
            )
    known = [name.partition("=")[0] for name in names]
    if len(set(known)) < len(known):
        raise StartupError(f"{', '.join(known)}: each server needs a name of its own")


def _connected(argument: str, body: dict[str, Any]) -> Contender:
    """Connect to one that runs already.

    The model it is asked for is the one it lists; of several, its default.
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
