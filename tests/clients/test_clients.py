"""Real clients, as PyPI has them, against a live server: each asks in all of its ways.

They live in an environment of their own, `.venv-clients`, which scripts/test makes.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest

from support.agent_model import ANSWER, CITY, HELLO, write_agent_model
from support.chat_http import FLAGS
from support.server_process import ServerProcess

HERE = Path(__file__).parent
PYTHON = HERE.parents[1] / ".venv-clients/bin/python"
PROGRAMS = sorted(path.stem for path in (HERE / "programs").glob("use_*.py"))
QUIET = {  # clients that would like to reach their makers
    "CREWAI_DISABLE_TELEMETRY": "true",
    "CREWAI_DISABLE_VERSION_CHECK": "true",
    "CREWAI_TRACING_ENABLED": "false",
    "LITELLM_LOCAL_MODEL_COST_MAP": "true",
    "OPENAI_AGENTS_DISABLE_TRACING": "1",
    "OTEL_SDK_DISABLED": "true",
}

pytestmark = pytest.mark.skipif(
    not PYTHON.exists(), reason="no .venv-clients: its packages could not be installed here"
)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A server whose model calls tools, and answers from their results."""
    home = tmp_path_factory.mktemp("clients")
    model = write_agent_model(home / "model")
    with ServerProcess(home / "home", *FLAGS, model=model) as server:
        yield server
        assert server.client.get("/models").status_code == 200
        assert server.stop() == 0


def run(program: str, server: ServerProcess, home: Path) -> dict:
    """Return what a program reports; its home directory is `home`."""
    report = home / "report.json"
    command = [PYTHON, HERE / f"programs/{program}.py"]
    arguments = [server.url.removesuffix("/v1"), program, report]
    ended = subprocess.run(
        [*map(str, command), *map(str, arguments)],
        env=os.environ | QUIET | {"HOME": str(home)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert report.exists(), ended.stdout[-2000:] + ended.stderr[-2000:]
    return json.loads(report.read_text())


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_client_chats_streams_calls_tools_and_reads_structures(program, server, tmp_path):
    told = run(program, server, tmp_path)
    wrong = {name: value for name, value in told.items() if not is_right(name, value, told)}
    assert not wrong, "\n".join(f"{name}: {value}" for name, value in wrong.items())
    if program not in ("use_claude_code", "use_codex"):  # they name the agent themselves
        assert server.client.get(f"/agents/{program}").json()["hit_tokens"] > 0


def is_right(name: str, value: object, told: dict) -> bool:
    """Tell whether a check returned what the model is known to say."""
    if name.endswith("asked for"):
        return value == [CITY]
    if "tools" in name:
        return value == ANSWER and f"{name}: asked for" in told
    if "structured" in name:
        return isinstance(value, dict) and set(value) == {"city", "degrees", "is_raining"}
    if "stream" in name:
        return isinstance(value, list) and len(value) > 1 and "".join(value) == HELLO
    if "cached" in name:
        return isinstance(value, int) and value > 0
    if name in ("group", "turns"):  # of two speakers, or of one
        return value in ([HELLO] * 3, [HELLO] * 2)
    return value == HELLO
