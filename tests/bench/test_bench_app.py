"""`agentmem bench`: commands that are imported when they are called."""

import subprocess
import sys

import pytest

from agentmem.bench.app import COMMANDS, command_of

LOADED = """
import sys
from agentmem.cli.main import app
try:
    app({arguments!r})
except SystemExit as ended:
    assert ended.code == 0, ended.code
print("loaded", sorted(set(sys.modules) & {{"mlx.core", "mlx_lm", "agentmem.bench.ttft"}}))
"""


def shown(*arguments: str) -> str:
    """Return what a process of its own prints, and which of three modules it imported."""
    code = LOADED.format(arguments=["bench", *arguments])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_help_names_every_benchmark_and_imports_none():
    text = shown("--help")
    assert all(f" {name} " in text for name in COMMANDS)
    assert text.endswith("loaded []\n")


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_benchmark_is_its_own_and_imports_no_mlx(name):
    text = shown(name, "--help")
    options = {option for one in command_of(name).params for option in one.opts}
    assert all(option.lstrip("-").upper() in text.upper() for option in options)
    assert "mlx" not in text.rpartition("loaded ")[2]


@pytest.mark.parametrize("name", COMMANDS)
def test_the_list_says_of_a_benchmark_what_its_help_begins_with(name):
    first, _, _ = command_of(name).help.partition("\n\n")
    assert " ".join(first.split()) == COMMANDS[name]
