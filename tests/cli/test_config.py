"""Settings: where they come from, which wins, what a wrong one says. And the command line that
takes them.
"""

import json
import subprocess
import sys

import pytest

from agentmem.config import Settings, load_settings, parse_bytes, resolve
from agentmem.errors import StartupError


def agentmem(*args: str, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "agentmem.cli.main", *args],
        capture_output=True,
        text=True,
        timeout=60,
        **kwargs,
    )


def test_a_flag_wins_over_the_environment_over_the_file_over_the_default(tmp_path, monkeypatch):
    file = tmp_path / "x.toml"
    file.write_text('port = 1\nhost = "::1"\nmax_running = 3\n')
    monkeypatch.setenv("AGENTMEM_PORT", "2")
    monkeypatch.setenv("AGENTMEM_HOST", "127.0.0.2")
    settings = load_settings({"port": "3", "model": None}, file)
    assert (settings.port, settings.host, settings.max_running, settings.model) == (
        3,
        "127.0.0.2",
        3,
        "demo",
    )


def test_a_list_in_the_environment_is_separated_by_commas(monkeypatch):
    monkeypatch.setenv("AGENTMEM_ALLOWED_HOSTS", "box.local, 10.0.0.7")
    assert load_settings({}).allowed_hosts == ["box.local", "10.0.0.7"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("512", 512), ("8G", 8 << 30), ("1.5 gib", 3 << 29), ("64k", 1 << 16), ("2MB", 2 << 20)],
)
def test_sizes_are_read_in_binary_units(text, expected):
    assert parse_bytes(text) == expected


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"port": "x"}, "port"),
        ({"port": "70000"}, "port"),
        ({"kv_bits": "3"}, "kv_bits"),
        ({"kv_budget": "lots"}, "kv_budget"),
        ({"kv_budget": "130%"}, "kv_budget"),
        ({"kv_budget": "0"}, "kv_budget"),
        ({"block_size": "100"}, "block_size"),
        ({"grace": "inf"}, "grace"),
        ({"no_such": 1}, "no_such"),
    ],
)
def test_a_wrong_setting_is_one_line_that_names_it(flags, named):
    with pytest.raises(StartupError, match=named) as error:
        load_settings(flags)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "of_8_gib"), [("50%", 4 << 30), ("1.5G", 3 << 29), ("64000", 64000)]
)
def test_a_budget_is_a_size_or_a_share(text, of_8_gib):
    assert resolve(load_settings({"kv_budget": text}).kv_budget, 8 << 30) == of_8_gib


def test_an_unreadable_config_file_is_a_startup_error(tmp_path):
    bad = tmp_path / "bad.toml"
    bad.write_text("port = = 1")
    for path in (bad, tmp_path / "absent.toml"):
        with pytest.raises(StartupError, match=path.name):
            load_settings({}, path)


def test_every_setting_is_an_option_of_serve_with_its_default():
    text = " ".join(
        agentmem("serve", "--help", env={"COLUMNS": "400", "PATH": "/usr/bin"}).stdout.split()
    )
    for name, field in Settings.model_fields.items():
        assert f"--{name.replace('_', '-')} " in text
        if field.default_factory is None and field.default not in (None, []):
            default = f"{field.default:.0%}" if field.annotation == int | float else field.default
            assert f"(default: {default})" in text


def test_a_wrong_setting_on_the_command_line_exits_with_2():
    result = agentmem("serve", "--port", "abc")
    assert (result.returncode, len(result.stderr.splitlines())) == (2, 1)
    assert "port" in result.stderr


def test_doctor_prints_json_for_programs(tmp_path):
    result = agentmem("doctor", "--json", "--home", str(tmp_path))
    report = json.loads(result.stdout)
    assert {c["name"] for c in report["checks"]} >= {
        "mlx",
        "blas",
        "compiler",
        "model",
        "store",
        "modes",
    }
    assert result.returncode == (0 if report["ok"] else 1)


@pytest.mark.parametrize("given", ["a.local, b.local", ["a.local,b.local"], ["a.local", "b.local"]])
def test_hosts_are_split_at_commas_wherever_they_come_from(given):
    assert load_settings({"allowed_hosts": given}).allowed_hosts == ["a.local", "b.local"]
