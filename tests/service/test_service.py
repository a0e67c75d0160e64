"""`agentmem service`, as processes, with a tiny model: supervised for real; launchd and systemd by
stand-ins that run what the plist and the unit say, and these by parsers.
"""

import asyncio
import json
import os
import plistlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from agentmem.config import Settings, load_settings
from agentmem.service import kinds, supervisor
from agentmem.service.control import Service
from agentmem.service.files import (
    ServiceFiles,
    ServiceState,
    acquire,
    holder,
    service_files,
    write_private,
)
from agentmem.service.kinds import Description
from agentmem.service.launchd import Launchd
from agentmem.service.settings_file import render
from agentmem.service.systemd import Systemd
from support.chat_http import words
from support.tiny import BLOCK
from support.tiny_model_dir import write_tiny_model

COMMAND = (sys.executable, "-m", "agentmem", "service")
# exit codes
UNHEALTHY = 1
FAULT = 2
STOPPED = 3
FAKE = Path(__file__).parents[1] / "support" / "fake_init.py"
TOOLS = {"process": None, "launchd": "launchctl", "systemd": "systemctl"}
PLIST = "Library/LaunchAgents/local.agentmem.server.plist"
UNIT = ".config/systemd/user/agentmem.service"
FILES = {
    "process": [],
    "launchd": [PLIST],
    "systemd": [UNIT, ".config/systemd/user/default.target.wants/agentmem.service"],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


class User:
    """A user with a home directory of their own, and perhaps an init system."""

    def __init__(self, home: Path, bin: Path, tool: str | None):
        self.home = home
        self.root = home / ".agentmem" / "service"
        home.mkdir()
        bin.mkdir()
        for name in filter(None, TOOLS.values()):  # none of the machine's own
            script = bin / name
            script.write_text(
                f'#!/bin/sh\nexec "{sys.executable}" "{FAKE}" {name} "$@"\n'
                if name == tool
                else "#!/bin/sh\nexit 1\n"
            )
            script.chmod(0o755)
        plain = {k: v for k, v in os.environ.items() if not k.startswith("AGENTMEM_")}
        self.environment = plain | {"HOME": str(home), "PATH": f"{bin}:/usr/bin:/bin"}

    def service(self, *arguments: object, code: int = 0, **environment: str) -> str:
        """What it says, on stdout, or on stderr where it fails."""
        command = [*COMMAND, *map(str, arguments)]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=120, env=self.environment | environment
        )
        assert done.returncode == code, (done.stdout, done.stderr)
        return done.stderr if code in (UNHEALTHY, FAULT) and done.stderr else done.stdout

    def status(self) -> dict:
        done = subprocess.run(
            [*COMMAND, "status", "--json"], capture_output=True, text=True, env=self.environment
        )
        found = json.loads(done.stdout)
        assert done.returncode == (
            0 if found["healthy"] else UNHEALTHY if found["running"] else STOPPED
        )
        return found

    def files(self) -> list[str]:
        return sorted(
            str(path.relative_to(self.home)) for path in self.home.rglob("*") if not path.is_dir()
        )

    def __enter__(self) -> "User":
        return self

    def __exit__(self, *_: object) -> None:
        self.service("uninstall")


@pytest.fixture(params=["process"])
def user(request, tmp_path):
    with User(tmp_path / "home", tmp_path / "bin", TOOLS[request.param]) as user:
        user.kind = request.param
        yield user


def until(found: Callable[[], object], seconds: float) -> float:
    """The seconds that it took."""
    began = time.monotonic()
    while not found():
        assert time.monotonic() - began < seconds
        time.sleep(0.1)
    return time.monotonic() - began


def alive(pid: int) -> bool:
    """Not a zombie, which nobody waits for where process 1 does not."""
    return (
        subprocess.run(
            ["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True
        ).stdout[:1]
        not in "Z"
    )


def overall_status(user: User) -> subprocess.CompletedProcess:
    """Run `agentmem status`."""
    return subprocess.run(
        [sys.executable, "-m", "agentmem", "status", "--json"],
        capture_output=True,
        text=True,
        env=user.environment,
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


QUESTION = {
    "messages": [{"role": "user", "content": words(3 * BLOCK, 1)}],
    "agent_id": "alice",
    "temperature": 0,
    "max_tokens": 4,
}


def ask(url: str) -> dict:
    response = httpx.post(f"{url}/v1/chat/completions", json=QUESTION, timeout=60)
    assert response.status_code == 200, response.text
    return response.json()


def answers(url: str) -> dict | None:
    try:
        return httpx.get(f"{url}/health").json()
    except httpx.TransportError:
        return None


# -- its life


@pytest.mark.parametrize("user", TOOLS, indirect=True)
def test_a_killed_server_is_back_with_its_agents_warm_and_uninstall_leaves_no_file(
    user, model, tmp_path
):
    flags = (
        "--block-size",
        BLOCK,
        "--tail-delay",
        "0.05",
        "--port",
        free_port(),
        "--home",
        tmp_path / "store",
    )
    user.service("install", "--model", model, *flags)
    assert user.files() == sorted([*FILES[user.kind], ".agentmem/service/serve.toml"])
    assert not user.status()["running"]
    began = time.monotonic()
    said = user.service("start")
    took = time.monotonic() - began
    first = user.status()
    assert (first["phase"], first["healthy"], first["restarts"]) == ("ready", True, 0)
    found = overall_status(user)
    assert json.loads(found.stdout)["status"] == "ok", "not found where the service listens"
    assert f"Ready: {first['url']}/v1" in said
    assert user.service("start").startswith("Ready: ") and user.status()["pid"] == first["pid"]
    answer = ask(first["url"])
    assert answer["agentmem"]["cache"] == "cold"
    until(lambda: answers(first["url"])["store"]["blocks"] == 3, 10)

    killed = time.time()
    os.kill(first["pid"], signal.SIGKILL)
    until(lambda: not answers(first["url"]), 5)
    found = overall_status(user)
    if found.returncode:  # it is not back yet
        assert "the service is " in found.stderr and "service status" in found.stderr
    until(lambda: answers(first["url"]), max(10, 2 * took))  # a busy machine is slow at both
    second = user.status()
    assert second["since"] - killed < 3
    assert (second["supervisor_pid"], second["url"]) == (first["supervisor_pid"], first["url"])
    assert (second["restarts"], second["ended"]) == (1, "killed by signal 9")
    again = ask(second["url"])
    assert again["agentmem"]["cache"] == "warm"
    assert again["agentmem"]["cached_tokens"] >= 3 * BLOCK
    assert again["choices"] == answer["choices"]

    assert "--force" in user.service("install", "--model", model, code=FAULT)
    assert user.service("stop") == "Stopped.\n"
    assert (
        user.status()["phase"] == "stopped"
        and not alive(second["pid"])
        and not alive(second["supervisor_pid"])
    )
    assert user.service("stop") == "It was not running.\n"
    assert user.service("uninstall") == "Uninstalled.\n"
    assert user.files() == [] and not (user.home / ".agentmem").exists()


@pytest.mark.parametrize("user", ["process", "launchd"], indirect=True)
def test_a_killed_supervisor_leaves_a_server_that_the_next_one_replaces(user, model, tmp_path):
    user.service("install", "--model", model, "--port", free_port(), "--home", tmp_path / "store")
    user.service("start")
    first = user.status()
    os.kill(first["supervisor_pid"], signal.SIGKILL)
    if user.kind == "process":
        until(lambda: user.status()["supervisor_pid"] is None, 5)
        orphan = user.status()
        assert (orphan["phase"], orphan["pid"], orphan["healthy"]) == (
            "orphaned",
            first["pid"],
            True,
        )
        assert "start" in user.service("status")
        user.service("start")
    until(
        lambda: (
            (s := user.status())["healthy"] and s["phase"] == "ready" and s["pid"] != first["pid"]
        ),
        60,
    )
    second = user.status()
    assert (
        second["url"] == first["url"] and second["pid"] != first["pid"] and not alive(first["pid"])
    )
    if user.kind == "process":  # one that stays alone is stopped all the same
        os.kill(second["supervisor_pid"], signal.SIGKILL)
        assert user.service("stop") == "Stopped.\n"
        assert not alive(second["pid"]) and not user.status()["running"]


FAULTY = """
import sys
if "serve" in sys.orig_argv:
    from pathlib import Path
    from agentmem.engine.model_runner import ModelRunner
    decode, fault = ModelRunner.decode, Path({fault!r})
    def broken(*arguments):
        if fault.exists():
            fault.unlink()
            raise RuntimeError("out of paper")
        return decode(*arguments)
    ModelRunner.decode = broken
"""


def test_a_server_whose_engine_failed_tells_who_waits_ends_and_is_back_with_its_agents_warm(
    user, model, tmp_path
):
    fault = tmp_path / "fault"
    (tmp_path / "sitecustomize.py").write_text(FAULTY.format(fault=str(fault)))
    user.environment["PYTHONPATH"] = str(tmp_path)
    flags = (
        "--block-size",
        BLOCK,
        "--tail-delay",
        "0.05",
        "--port",
        free_port(),
        "--home",
        tmp_path / "store",
    )
    user.service("install", "--model", model, *flags)
    user.service("start")
    first = user.status()
    answer = ask(first["url"])
    until(lambda: answers(first["url"])["store"]["blocks"] == 3, 10)
    fault.touch()
    refused = httpx.post(f"{first['url']}/v1/chat/completions", json=QUESTION, timeout=60)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_failed")
    until(lambda: (s := user.status())["restarts"] == 1 and s["healthy"], 60)
    second = user.status()
    assert second["ended"] == "exit code 1" and second["pid"] != first["pid"]
    assert "out of paper" in user.service("logs", "-n", 100)
    again = ask(second["url"])
    assert again["agentmem"]["cache"] == "warm" and again["choices"] == answer["choices"]


def test_restart_and_a_forced_install_bring_the_new_settings(user, model, tmp_path):
    user.service("install", "--model", model, "--port", 0, "--home", tmp_path / "store")
    user.service("start")
    settings = user.root / "serve.toml"
    settings.write_text(settings.read_text() + "max_context = 512\n")
    assert user.service("restart").startswith("Ready: ")
    assert httpx.get(f"{user.status()['url']}/health").json()["max_context"] == 512
    before = user.status()["pid"]
    settings.write_text(settings.read_text() + "max_contest = 1\n")
    assert "max_contest" in user.service("restart", code=FAULT)
    assert user.status()["pid"] == before  # it was looked at first
    user.service("install", "--force", "--model", model, "--max-context", 256)
    assert not user.status()["running"] and not alive(before)
    assert load_settings({}, settings).max_context == 256


def test_a_start_that_fails_says_why_and_leaves_nothing_running(user, model, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        user.service("install", "--model", model, "--port", port, "--home", tmp_path / "store")
        said = user.service("start", code=UNHEALTHY)
    assert "exit code 2" in said and f"port {port} is in use" in said
    assert not user.status()["running"]
    assert user.service("start").startswith("Ready: ")


def test_a_server_that_keeps_failing_is_tried_again_less_and_less_often(user, model):
    user.service("install", "--model", model)
    (user.root / "serve.toml").write_text("port = -1\n")
    process = subprocess.Popen(kinds.COMMAND, env=user.environment, cwd="/")
    log = user.root / "server.log"
    until(lambda: log.exists() and log.read_text().count("again in") == 3, 60)
    assert re.findall(r"again in (\S+) s", log.read_text()) == ["0.5", "1", "2"]
    assert user.status()["restarts"] == 3 and "exit code 2" in user.service(
        "status", code=UNHEALTHY
    )
    assert "port" in user.service("start", code=FAULT)
    process.terminate()  # while it waits
    assert process.wait(5) == 0


def test_status_knows_the_service_where_nobody_answers(user, model):
    assert "serve)" in overall_status(user).stderr  # there is none: start a server
    user.service("install", "--model", model, "--port", 1)
    stopped = overall_status(user)
    assert (stopped.returncode, stopped.stdout) == (UNHEALTHY, "")
    assert "the service is stopped: " in stopped.stderr and "service start" in stopped.stderr
    lock = acquire(user.root / "supervisor.lock")
    ServiceState("waiting", 1.0, restarts=2, ended="killed by signal 9").write(
        user.root / "state.json"
    )
    waiting = overall_status(user)
    os.close(lock)
    told = "the service is waiting after 2 restarts, the last time killed by signal 9; "
    assert waiting.returncode == UNHEALTHY and told in waiting.stderr


def test_pid_files_of_processes_long_gone_do_no_harm(user, model):
    user.service("install", "--model", model)
    with subprocess.Popen(["sleep", "60"]) as other:
        for name in ("supervisor.lock", "server.lock"):
            (user.root / name).write_text(str(other.pid))
        (user.root / "state.json").write_text(
            '{"phase": "ready", "since": 1, "url": "http://127.0.0.1:1"}'
        )
        assert user.status()["phase"] == "stopped"
        assert user.service("stop") == "It was not running.\n"
        for broken in ("", '{"phase": "ready", "since": 1, "of_another_version": 1}'):
            (user.root / "state.json").write_text(broken)
            assert user.status()["phase"] == "stopped"
        user.service("uninstall")
        assert other.poll() is None
        other.kill()


DEAF = """
import signal, sys, time
from pathlib import Path
from agentmem.service.files import acquire, note_pid
signal.signal(signal.SIGTERM, signal.SIG_IGN)
lock = acquire(Path(sys.argv[1]))
note_pid(lock, __import__("os").getpid())
time.sleep(60)
"""


def test_a_server_that_hangs_and_its_supervisor_are_killed_within_one_stop_time(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(kinds, "STOP_SECONDS", 3)
    files = service_files()
    write_private(files.settings, "grace = 0.0\n")
    locks = (files.supervisor, files.server)
    processes = [subprocess.Popen([sys.executable, "-c", DEAF, str(lock)]) for lock in locks]
    until(lambda: all(map(holder, locks)), 20)
    began = time.monotonic()
    assert Service().stop()
    assert 3 <= time.monotonic() - began < 5
    assert [process.wait(5) for process in processes] == [-signal.SIGKILL] * 2


# -- install


def test_what_a_user_put_beside_the_services_files_outlives_it(user, model):
    user.service("install", "--model", model)
    (user.root / "master.key").write_text("0" * 64)
    (user.root / "mine").mkdir()
    user.service("install", "--model", model)
    user.service("uninstall")
    assert user.files() == [".agentmem/service/master.key"] and (user.root / "mine").is_dir()


def test_a_home_that_can_not_be_written_is_one_line(user, model):
    user.home.joinpath(".agentmem").touch()
    for command in (("install", "--model", model), ("status",), ("uninstall",)):
        said = user.service(*command, code=FAULT)
        assert said.startswith(f"agentmem: {user.root}") and said.endswith(": Not a directory\n"), (
            said
        )
    user.home.joinpath(".agentmem").unlink()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--port", "99999"), "port"),
        (("--model", "./none"), "no such directory"),
        (("--config", "none.toml"), "none.toml"),
        (("--api-keys", "none.toml"), "none.toml"),
        (("--encrypt",), "--key-file"),
    ],
)
def test_what_can_not_run_is_refused_before_anything_is_written(user, flags, said):
    assert said in user.service("install", *flags, code=FAULT, AGENTMEM_MASTER_KEY="0" * 64)
    assert user.files() == []


def test_without_an_install_there_is_nothing_to_start_and_nothing_is_made(user):
    assert "not installed" in user.service("start", code=FAULT)
    assert "not installed" in user.service("restart", code=FAULT)
    assert user.service("uninstall") == "There was no service installed.\n"
    assert user.files() == []


@pytest.mark.parametrize("user", TOOLS, indirect=True)
def test_files_are_private_and_hold_what_flags_environment_and_file_said(user, model, tmp_path):
    config = tmp_path / "my.toml"
    config.write_text('kv_bits = "8"\nport = 1\n')
    user.service(
        "install",
        "--config",
        config,
        "--model",
        model,
        "--allowed-hosts",
        "a",
        "--allowed-hosts",
        "b",
        AGENTMEM_PORT="8017",
        AGENTMEM_MASTER_KEY="5ecret",
        HF_HOME="/hub & co",
        HF_TOKEN="5ecret",
    )
    settings = load_settings({}, user.root / "serve.toml")
    assert (settings.kv_bits, settings.port, settings.model) == ("8", 8017, str(model))
    assert settings.allowed_hosts == ["a", "b"]
    for path in map(user.home.joinpath, user.files()):
        assert path.stat().st_mode & 0o777 == 0o600, path
        assert "5ecret" not in path.read_text()
        assert user.kind == "process" or path.suffix == ".toml" or "/hub &" in path.read_text()


@pytest.mark.parametrize(
    "values",
    [
        {},
        {
            "model": "a/b",
            "home": Path("/x \"y\" 'z' \\ é 𝄞"),
            "kv_budget": "8G",
            "store_quota": "10%",
        },
        {
            "tail_delay": float("inf"),
            "max_itl_ms": 1e-05,
            "encrypt": True,
            "api_keys": Path("/k"),
            "allowed_hosts": [],
        },
    ],
)
def test_settings_come_back_as_they_were(values, tmp_path):
    settings = Settings(**values)
    path = tmp_path / "serve.toml"
    path.write_text(render(settings))
    assert load_settings({}, path) == settings


def test_paths_are_where_the_user_stood(tmp_path, monkeypatch, model):
    monkeypatch.chdir(model.parent)
    path = tmp_path / "serve.toml"
    path.write_text(render(Settings(model="tiny", home=Path("h"), key_file=Path("~/k"))))
    found = load_settings({}, path)
    assert (found.model, found.home, found.key_file) == (
        str(model),
        model.parent / "h",
        Path.home() / "k",
    )


# -- the files of the init systems


@pytest.fixture
def awkward(tmp_path, monkeypatch) -> Description:
    monkeypatch.setenv("HF_HOME", '/a "b" %h <&> \\ é')
    root = tmp_path / "a & b 100%" / ".agentmem" / "service"
    root.mkdir(parents=True)
    return Description(ServiceFiles(root), 12.5)


def test_the_plist_says_what_launchd_is_to_do(awkward):
    text = Launchd(awkward).text()
    found = plistlib.loads(text.encode())
    assert found["ProgramArguments"] == [sys.executable, "-m", "agentmem.service.supervisor"]
    assert found["EnvironmentVariables"]["HF_HOME"] == os.environ["HF_HOME"]
    assert found["StandardErrorPath"] == str(awkward.files.log)
    assert (found["RunAtLoad"], found["KeepAlive"], found["Umask"]) == (True, True, 0o077)
    assert found["ExitTimeOut"] == 72  # beyond the grace time
    assert text.count("<!-- ") >= 7 and max(line.count("<key>") for line in text.splitlines()) == 1


def test_systemd_finds_no_fault_with_the_unit(awkward, tmp_path):
    if not shutil.which("systemd-analyze"):
        pytest.skip("systemd-analyze is not installed: the unit is NOT checked")
    unit = tmp_path / "agentmem.service"
    unit.write_text(Systemd(awkward).text())
    command = ["systemd-analyze", "verify", "--user", "--man=no", str(unit)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"XDG_RUNTIME_DIR": str(tmp_path)}
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    assert "TimeoutStopSec=72\n" in unit.read_text() and "KillMode=mixed\n" in unit.read_text()
    unit.write_text(unit.read_text().replace("KillMode=mixed", "KillMode=soft"))  # it does look
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"XDG_RUNTIME_DIR": str(tmp_path)}
    )
    assert "kill mode" in done.stderr.lower()


# -- the log


def test_the_log_is_rotated_private_and_bounded(tmp_path):
    files = ServiceFiles(tmp_path)
    before = os.umask(0o077)
    try:
        log = supervisor._open_log(files)
        for i in range(600):
            log.info("%06d %s", i, "x" * 100_000)
        for handler in log.handlers:
            handler.close()
    finally:
        os.umask(before)
    kept = sorted(tmp_path.iterdir())
    assert [path.name for path in kept] == [
        "server.log",
        "server.log.1",
        "server.log.2",
        "server.log.3",
    ]
    assert all(
        path.stat().st_size <= supervisor.LOG_BYTES and path.stat().st_mode & 0o077 == 0
        for path in kept
    )


def test_a_line_without_end_is_handed_on_in_parts():
    async def parts() -> list[bytes]:
        stream = asyncio.StreamReader()
        stream.feed_data(b"a\r\nb" + b"x" * 1_000_000 + b"\nc")
        stream.feed_eof()
        return [line async for line in supervisor._lines(stream)]

    found = asyncio.run(parts())
    assert (found[0], found[-1]) == (b"a", b"c") and b"".join(
        found[1:-1]
    ) == b"b" + b"x" * 1_000_000
    assert max(map(len, found)) <= 1 << 18


def test_logs_shows_the_last_lines_and_follows_through_a_rotation(user, model):
    assert "no log" in user.service("logs", code=FAULT)
    user.service("install", "--model", model)
    log = user.root / "server.log"
    older = user.root / "server.log.1"
    older.write_text("a\nb\nc\n")
    log.write_text("d\ne\n")
    assert user.service("logs", "-n", 3) == "c\nd\ne\n"
    assert (user.service("logs", "-n", 0), user.service("logs")) == ("", "a\nb\nc\nd\ne\n")
    with subprocess.Popen(
        [*COMMAND, "logs", "-f", "-n", "1"], stdout=-1, text=True, env=user.environment
    ) as process:
        assert process.stdout.readline() == "e\n"
        time.sleep(0.5)
        with log.open("a") as file:
            file.write("f\n")
        assert process.stdout.readline() == "f\n"
        log.rename(older)
        log.write_text("g\n")
        assert process.stdout.readline() == "g\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
