"""The fast BLAS has to be loaded before any test module imports MLX."""

import os
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from agentmem.linux_cpu.blas import load_fast_blas

HOME = Path(os.environ.get("AGENTMEM_TEST_HOME") or "~/.agentmem").expanduser()

load_fast_blas(HOME)

import mlx.core as mx  # noqa: E402

if os.environ.get("AGENTMEM_TEST_DEVICE") == "cpu" and mx.default_device() != mx.Device(mx.cpu):
    mx.set_default_device(mx.cpu)
    # the servers that tests start need it too: a sitecustomize.py there does the same
    cpu_device = str(Path(__file__).parent / "support" / "cpu_device")
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, [cpu_device, os.environ.get("PYTHONPATH")])
    )

# a shell's background jobs ignore Ctrl-C, and so would every process that a test starts
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_report_header() -> str:
    return f"MLX's device: {mx.default_device()}"


@pytest.fixture(scope="session")
def demo_model_dir() -> Path:
    """The converted demo model; downloaded on the first run."""
    from agentmem.linux_cpu.demo_model import pull_demo

    return pull_demo(HOME)


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    """The directory of a tiny model."""
    from support.tiny_model_dir import write_tiny_model

    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    """A real server on the tiny model, which is well in the end."""
    from support.chat_http import FLAGS
    from support.server_process import ServerProcess

    with ServerProcess(tmp_path_factory.mktemp("server") / "home", *FLAGS, model=model) as server:
        yield server
        assert (
            server.client.get(server.url.removesuffix("/v1") + "/health").json()["status"] == "ok"
        )
        assert server.stop() == 0


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys) -> Callable[..., str]:
    """`agentmem bench` with wrong arguments: the one line that it says.

    In this process, and without a look at the noise: a process of its own takes seconds to say it.
    """
    from agentmem.bench.harness import options, session
    from agentmem.cli.main import main
    from support.bench_process import FAULT

    for name in [name for name in os.environ if name.startswith("AGENTMEM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(session, "probe_ms", lambda: 1.0)
    # the allocator stays as it is for other tests
    monkeypatch.setattr(options, "prepare_mlx", lambda home: None)

    def bench(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["agentmem", "bench", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        assert (ended.value.code, said.out, len(said.err.splitlines())) == (FAULT, "", 1), said.err
        assert not list(tmp_path.glob("agentmem-bench-*/"))
        return said.err

    return bench
