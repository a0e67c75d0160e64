"""The command line as a whole: what each call imports, and that help tells what commands do."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from agentmem import __version__, errors
from agentmem.cli.lazy import Lazy, load
from agentmem.cli.main import _Commands
from agentmem.config import Settings

HEAVY = {
    "mlx",
    "mlx_lm",
    "transformers",
    "fastapi",
    "starlette",
    "uvicorn",
    "numpy",
    "cryptography",
}
PROBE = """
import atexit, json, sys
atexit.register(lambda: print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules}))))
sys.argv = ["agentmem", *sys.argv[1:]]
from agentmem.cli.main import main
main()
"""


def imported(*arguments: str) -> set[str]:
    """Return the packages that are imported when a command has run."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *arguments], capture_output=True, text=True, timeout=60
    )
    return set(done.stdout.splitlines()[-1].strip('[]"').split('", "'))


@pytest.mark.parametrize(
    "arguments",
    [
        ("--help",),
        ("--version",),
        ("agents", "--help"),
        ("agents", "list", "--url", "http://127.0.0.1:1"),
        ("status", "--url", "http://127.0.0.1:1"),
    ],
)
def test_what_needs_no_model_imports_no_model(arguments):
    found = imported(*arguments)
    assert "typer" in found and not HEAVY & found


def test_help_of_all_imports_no_command():
    assert not {"httpx", "pydantic"} & imported("--help")
    assert "httpx" in imported("agents", "--help")


def test_help_fits_80_columns_and_cuts_no_option():
    done = subprocess.run(
        [sys.executable, "-m", "agentmem", "serve", "--help"],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"COLUMNS": "80"},
    )
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    for name in Settings.model_fields:
        assert f"  --{name.replace('_', '-')} " in done.stdout


@pytest.mark.parametrize(("name", "lazy"), _Commands.lazy.items(), ids=_Commands.lazy)
def test_a_command_is_listed_with_the_first_sentence_of_its_own_help(name: str, lazy: Lazy):
    command = load(name, lazy)
    assert command.name == name
    assert " ".join(command.help.split()).startswith(lazy.help)
    assert lazy.help.endswith(".")


def test_the_version_is_an_option_and_a_command_of_the_module_too():
    for argument in ("--version", "version"):
        done = subprocess.run(
            [sys.executable, "-m", "agentmem", argument], capture_output=True, text=True, timeout=60
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, f"{__version__}\n", "")


def test_hints_name_the_command_as_it_was_called(tmp_path, monkeypatch):
    command = tmp_path / "bin" / "agentmem"
    command.parent.mkdir()
    command.touch(mode=0o755)

    def program(argument: Path) -> str:
        monkeypatch.setattr(sys, "argv", [str(argument)])
        return errors.program()

    monkeypatch.setenv("PATH", "/usr/bin")
    assert program(command) == str(command)
    monkeypatch.setenv("PATH", f"{command.parent}:/usr/bin")
    assert program(command) == "agentmem"
    assert program(tmp_path / "agentmem" / "__main__.py") == f"{sys.executable} -m agentmem"
    assert program(tmp_path / "pytest" / "__main__.py") == "agentmem"
