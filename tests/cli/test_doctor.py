"""`agentmem doctor` names what is wrong and the command that fixes it."""

import json
from pathlib import Path
from typing import Any

import pytest

from agentmem.cli.doctor import _check_cache, collect, render
from agentmem.config import load_settings
from agentmem.linux_cpu.blas import load_fast_blas
from support.zoo import config_of


def examine(home: Path, **flags: Any) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    report = collect(load_settings({"home": home, **flags}), load_fast_blas())
    return report, {check["name"]: check for check in report["checks"]}


@pytest.fixture
def home(tmp_path) -> Path:
    path = tmp_path / "home"
    (path / "store").mkdir(mode=0o700, parents=True)
    path.chmod(0o700)
    return path


def test_a_fresh_home_is_no_failure_and_stays_untouched_and_the_report_is_json(tmp_path):
    report, checks = examine(tmp_path / "fresh")
    assert not (tmp_path / "fresh").exists()
    assert report["ok"] and json.loads(json.dumps(report)) == report
    assert checks["model"]["fix"] == "agentmem pull demo"
    assert checks["store"]["free_bytes"] > 0 and checks["blas"]["gflops"] > 0
    assert all(name in render(report) for name in checks)


@pytest.mark.demo
def test_the_model_is_described_without_loading_it(home, demo_model_dir):
    _, checks = examine(home, model=str(demo_model_dir))
    model = checks["model"]
    assert (model["status"], model["type"], model["max_context"]) == ("ok", "llama", 8192)
    assert model["parameters"] == 134_515_008  # 135M, as the name says
    assert checks["cache"]["sealed_bytes_per_token"] == 6480


@pytest.mark.parametrize(
    ("model_type", "status", "says"),
    [
        ("gpt_oss", "ok", "1 sliding over 40 (2 heads of 32, with sinks)"),
        ("falcon_h1", "ok", "recurrent state in full precision"),
        ("mamba2", "ok", "2 recurrent; recurrent state in full precision"),
        (
            "deepseek_v41",
            "warn",
            "nothing is kept after an answer: it uses a LayerCache of its own",
        ),
        ("no_such_type", "fail", "no_such_type"),
    ],
)
def test_what_of_a_models_cache_is_kept_is_said_in_words(model_type, status, says):
    config = {"model_type": model_type} if model_type.startswith("no") else config_of(model_type)
    check = _check_cache(load_settings({}), config)
    assert check["status"] == status
    assert says in check["summary"]


def test_a_missing_and_a_broken_model_are_failures(home, tmp_path):
    for name in ("nowhere", str(tmp_path)):
        report, checks = examine(home, model=name)
        assert not report["ok"] and checks["model"]["status"] == "fail"


def test_an_exposed_store_is_a_failure_and_the_fix_repairs_it(home):
    home.chmod(0o755)
    report, checks = examine(home)
    assert checks["modes"]["status"] == "warn"  # the store under it is still closed
    (home / "store").chmod(0o750)
    report, checks = examine(home)
    assert report["status"] == checks["modes"]["status"] == "fail"
    assert str(home / "store") in checks["modes"]["fix"] and "chmod 700" in render(report)
    for path in checks["modes"]["too_open"]:
        Path(path).chmod(0o700)
    assert examine(home)[1]["modes"]["status"] == "ok"
