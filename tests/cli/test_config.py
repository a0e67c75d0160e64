"""Settings: where they come from, which wins, what a wrong one says, and what --help tells."""

import json
import re
import subprocess
import sys
from typing import get_args

import pytest

from agentmem.config import (
    Settings,
    Unit,
    default_text,
    load_settings,
    parse_bytes,
    parse_share,
    resolve,
)
from agentmem.errors import StartupError


def agentmem(*args: str, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "agentmem", *args],
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


@pytest.mark.parametrize("text", ["1,5G", "8G of RAM", "8X", "G", "1.5.3G", "1e999"])
def test_a_size_is_refused_as_a_whole(text):
    for parse in (parse_bytes, parse_share):
        with pytest.raises(ValueError, match="is not a size"):
            parse(text)


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


def test_an_unknown_setting_of_a_file_is_named_with_the_one_that_is_meant(tmp_path):
    file = tmp_path / "serve.toml"
    file.write_text('port = 1\nkv_bit = "4"\nfrobnicate = 1\n')
    with pytest.raises(StartupError) as error:
        load_settings({}, file)
    meant = f"there is no setting kv_bit: did you mean kv_bits? ({file}: kv_bit = 4)"
    unknown = "there is no setting frobnicate: agentmem serve --help lists them all"
    assert meant in str(error.value) and unknown in str(error.value)


def test_a_wrong_value_is_shown_with_where_it_came_from(tmp_path, monkeypatch):
    file = tmp_path / "serve.toml"
    file.write_text('kv_budget = "lots"\nport = 99999\nmax_running = 0\n')
    monkeypatch.setenv("AGENTMEM_PORT", "-1")
    with pytest.raises(StartupError) as error:
        load_settings({"max_running": "many"}, file)
    said = str(error.value)
    for origin in (f"({file}: kv_budget = lots)", "(AGENTMEM_PORT=-1)", "(--max-running many)"):
        assert origin in said
    assert "99999" not in said


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


@pytest.fixture(scope="module")
def serve_help() -> str:
    """What `agentmem serve --help` tells, in one line; lines break at hyphens too."""
    environment = {"COLUMNS": "200", "PATH": "/usr/bin"}
    text = agentmem("serve", "--help", env=environment).stdout
    return " ".join(re.sub(r"(?<=\w)-\n +", "-", text).split())


def test_every_setting_is_an_option_of_serve_with_its_unit_and_default(serve_help):
    for name, field in Settings.model_fields.items():
        flag = f"--{name.replace('_', '-')}"
        if field.annotation is bool:
            assert f"{flag} / --no{flag[1:]} " in serve_help
            continue
        units = [unit.name for unit in field.metadata if isinstance(unit, Unit)]
        (unit,) = units or ["|".join(get_args(field.annotation))]
        assert f"{flag} {unit} {field.description}" in serve_help


def test_a_default_that_help_shows_can_be_given_back(serve_help):
    for name, field in Settings.model_fields.items():
        if field.default in (None, []):
            assert default_text(name) is None
            continue
        shown = default_text(name)
        assert f"{field.description} (default: {shown})" in serve_help
        assert getattr(load_settings({name: shown}), name) == field.default


def test_help_shows_sizes_as_sizes_and_seconds_only_where_they_are(serve_help):
    assert "SIZE|PERCENT Space that the store leaves free on its disk (default: 1G)" in serve_help
    assert "SIZE Largest request body, such as 8M (default: 8M)" in serve_help
    assert "--kv-budget SIZE|PERCENT" in serve_help and "(default: 60%)" in serve_help
    assert "--date-session HOURS" in serve_help and "--write-amplification RATIO" in serve_help
    assert set(re.findall(r"(\S+) SECONDS", serve_help)) == {
        "--client-timeout",
        "--grace",
        "--max-queue-time",
        "--tail-delay",
    }


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
