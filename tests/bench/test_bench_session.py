"""A benchmark is alone on its machine, and leaves nothing behind however it ends."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from agentmem.bench.harness.process import Process
from agentmem.bench.harness.session import bench_session
from support.bench_process import BENCH, FAULT, environment, run_bench, write_words
from support.tiny_model_dir import write_tiny_model


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> list[str]:
    directory = tmp_path_factory.mktemp("inputs")
    model, words = write_tiny_model(directory / "tiny"), write_words(directory / "words.txt")
    return ["--model", str(model), "--corpus", str(words), "--home", str(directory / "home")]


def eventually(condition, seconds: float = 60.0) -> bool:
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


def processes_of(temporary: Path) -> list[int]:
    """Find those whose command line names a path under `temporary`: servers and guards."""
    listed = subprocess.run(
        ["ps", "-A", "-ww", "-o", "pid=,command="], capture_output=True, text=True, check=True
    )
    return [
        int(line.split()[0])
        for line in listed.stdout.splitlines()
        if f"{temporary}/agentmem-bench-" in line
    ]


def directories(temporary: Path) -> list[Path]:
    return [path for path in temporary.glob("agentmem-bench-*") if path.is_dir()]


@contextmanager
def running(temporary: Path, inputs: list[str]) -> "Iterator[subprocess.Popen[str]]":
    """A benchmark whose server is up and is being asked."""
    command = [*BENCH, "ttft", "--contexts", "900", "--passes", "1000", *inputs]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=environment(temporary)
    )
    try:
        assert eventually(lambda: len(processes_of(temporary)) == 2), "no server came up"
        assert eventually(lambda: list(temporary.glob("agentmem-bench-*/*/store"))), (
            "the server has no store"
        )
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_an_interrupted_benchmark_leaves_no_server_and_no_directory(tmp_path, inputs, number):
    with running(tmp_path, inputs) as process:
        (directory,) = directories(tmp_path)
        assert directory.stat().st_mode & 0o777 == 0o700
        os.kill(process.pid, number)
        assert process.wait(30) == (-signal.SIGKILL if number == signal.SIGKILL else 130)
        assert eventually(lambda: not processes_of(tmp_path), 20), "a process is left"
        assert not directories(tmp_path)
    if number == signal.SIGKILL:  # the lock, which the guard holds longest then, is free again
        done = run_bench(tmp_path, "restore", "--tokens", "600", "--passes", "1", *inputs)
        assert done.returncode == 0, done.stderr


def test_a_server_that_dies_is_one_line(tmp_path, inputs):
    with running(tmp_path, inputs) as process:
        listed = subprocess.run(
            ["ps", "-A", "-ww", "-o", "pid=,command="], capture_output=True, text=True, check=True
        )
        mine = [
            line.split()[0]
            for line in listed.stdout.splitlines()
            if f"{tmp_path}/" in line and " serve " in line
        ]
        os.kill(int(mine[0]), signal.SIGKILL)
        assert process.wait(30) == 1
        (line,) = process.stderr.read().strip().splitlines()
        assert "a server broke off" in line or "the server ended" in line
        assert not directories(tmp_path)


def test_two_benchmarks_at_once_are_refused(tmp_path, inputs):
    with running(tmp_path, inputs):
        done = run_bench(tmp_path, "persistence", *inputs)
        assert done.returncode == FAULT
        assert "another benchmark is running" in done.stderr
        assert len(directories(tmp_path)) == 1


def test_a_server_that_does_not_start_is_one_line_with_its_reason(tmp_path, inputs):
    config = tmp_path / "bad.toml"
    config.write_text('kv_budget = "1K"\n')
    done = run_bench(tmp_path, "persistence", *inputs, "--config", config)
    assert done.returncode != 0
    assert "the server ended" in done.stderr
    assert "kv_budget" in done.stderr
    assert "Traceback" not in done.stderr
    assert not directories(tmp_path)


def test_an_engine_that_is_interrupted_says_nothing(tmp_path, inputs):
    command = [
        *BENCH,
        "ablation",
        "--components",
        "batching",
        "--context",
        "300",
        "--passes",
        "1000",
        *inputs,
    ]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=environment(tmp_path)
    )
    assert eventually(lambda: list(tmp_path.glob("agentmem-bench-*/engine/store/*/blocks"))), (
        "no engine came up"
    )
    time.sleep(1.0)
    process.send_signal(signal.SIGTERM)
    assert (process.communicate(timeout=30)[1], process.returncode) == ("", 130)
    assert not directories(tmp_path)


STUBBORN = """
import http.server, signal, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)

class Healthy(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Healthy).serve_forever()
"""


def test_a_server_of_others_that_will_not_stop_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("agentmem.bench.harness.process._PATIENCE", 0.3)
    with bench_session(lambda line: None) as session:
        server = Process(session, [sys.executable, "-c", STUBBORN], session.directory / "log")
        server.stop()
        assert server.process.returncode == -signal.SIGKILL
