"""A server process on a tiny model, under load."""

import json
import signal
import subprocess
import sys

from streams import SERVER_FLAGS, run_streams

from support.server_process import ServerProcess
from support.tiny_model_dir import write_tiny_model


def test_streams_of_which_a_third_is_cut_are_complete_or_gone_and_leave_nothing_behind(tmp_path):
    model, trace = write_tiny_model(tmp_path / "tiny"), tmp_path / "trace.json"
    flags = (*SERVER_FLAGS, "--kv-budget", "12M", "--trace", str(trace))
    with ServerProcess(tmp_path / "home", *flags, model=model) as server:
        assert run_streams(server, streams=24, seconds=3).failures() == []
        assert server.stop() == 0
    lines = trace.read_text().splitlines()
    events = [json.loads(line.removesuffix(",")) for line in lines[1:]]
    assert lines[0] == "[" and trace.stat().st_mode & 0o777 == 0o600
    assert {e["name"] for e in events} == {"prefill", "decode", "seal", "restore"}
    assert all(e["ph"] == "X" and e["dur"] >= 0 and e["ts"] > 0 for e in events)


def test_ctrl_c_while_the_model_loads_ends_it_at_once_without_a_crash(tmp_path):
    model = write_tiny_model(tmp_path / "tiny")
    command = [
        sys.executable,
        "-m",
        "agentmem",
        "serve",
        "--model",
        model,
        "--home",
        tmp_path / "home",
    ]
    with subprocess.Popen([*command, "--port", "0"], stdout=-1, stderr=-2, text=True) as process:
        assert process.stdout.readline().startswith("Loading ")
        process.send_signal(signal.SIGINT)
        assert (process.wait(10), process.stdout.read()) == (-signal.SIGINT, "")
