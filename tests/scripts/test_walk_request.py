"""Test of scripts/walk_request.py: it runs, and says where a chat request goes."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

TOP = Path(__file__).parents[2]
SCRIPT = TOP / "scripts" / "walk_request.py"


def test_a_chat_request_enters_packages_in_one_direction():
    command = [sys.executable, str(SCRIPT), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    walk = json.loads(done.stdout)
    packages = walk["packages"]
    order = [name for name in packages if name not in ("agentmem", "transcripts", "linux_cpu")]
    assert order == ["server", "chat", "engine", "prefix_cache", "kvcache", "store"]
    assert walk["files"] == sum(map(len, packages.values()))
    paths = [TOP / "src" / "agentmem" / name / file for name in order for file in packages[name]]
    assert paths and all(path.is_file() for path in paths)


def test_another_direction_is_a_fault():
    is_in_direction = runpy.run_path(str(SCRIPT))["is_in_direction"]
    names = ["server", "transcripts", "chat", "engine", "prefix_cache", "kvcache", "store"]
    assert is_in_direction(dict.fromkeys(names))
    assert not is_in_direction(dict.fromkeys(reversed(names)))
    assert not is_in_direction(dict.fromkeys(names[:-1]))
