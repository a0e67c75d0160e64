"""Settings: where they come from, which wins, what a wrong one says. And the command line that takes them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from agentmem.config import Settings, load_settings, parse_bytes, resolve
from agentmem.errors import StartupError


def agentmem(*args: str, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "agentmem.cli", *args], capture_output=True, text=True, timeout=60, **kwargs
    )


def test_a_flag_wins_over_the_environment_over_the_file_over_the_default(tmp_path, monkeypatch):
    file = tmp_path / "x.toml"
    file.write_text('port = 1\nhost = "::1"\nmax_running = 3\n')
    monkeypatch.setenv("AGENTMEM_PORT", "2")
    monkeypatch.setenv("AGENTMEM_HOST", "127.0.0.2")
    settings = load_settings({"port": "3", "model": None}, file)
    assert (settings.port, settings.host, settings.max_running, settings.model) == (3, "127.0.0.2", 3, "demo")


def test_a_list_in_the_environment_is_separated_by_commas(monkeypatch):
    monkeypatch.setenv("AGENTMEM_ALLOWED_HOSTS", "box.local, 10.0.0.7")
    assert load_settings({}).allowed_hosts == ["box.local", "10.0.0.7"]


@pytest.mark.parametrize(
    ("text", "expected"), [("512", 512), ("8G", 8 << 30), ("1.5 gib", 3 << 29), ("64k", 1 << 16), ("2MB", 2 << 20)]
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
        ({"no_such": 1}, "no_such"),
    ],
)
def test_a_wrong_setting_is_one_line_that_names_it(flags, named):
    with pytest.raises(StartupError, match=named) as error:
        load_settings(flags)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("text", "of_8_gib"), [("50%", 4 << 30), ("1.5G", 3 << 29), ("64000", 64000)])
def test_a_budget_is_a_size_or_a_share(text, of_8_gib):
    assert resolve(load_settings({"kv_budget": text}).kv_budget, 8 << 30) == of_8_gib


def test_an_unreadable_config_file_is_a_startup_error(tmp_path):
    bad = tmp_path / "bad.toml"
    bad.write_text("port = = 1")
    for path in (bad, tmp_path / "absent.toml"):
        with pytest.raises(StartupError, match=path.name):
            load_settings({}, path)


def test_every_setting_is_an_option_of_serve_with_its_default():
    text = " ".join(agentmem("serve", "--help", env={"COLUMNS": "400", "PATH": "/usr/bin"}).stdout.split())
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
    assert {c["name"] for c in report["checks"]} >= {"mlx", "blas", "compiler", "model", "store", "modes"}
    assert result.returncode == (0 if report["ok"] else 1)


def test_figures_in_the_readme_are_those_of_the_committed_results():
    root = Path(__file__).parent.parent
    ttft = json.loads((root / "benchmarks/results/ttft-demo.json").read_text())
    median = ttft["median_ms"]
    table = (root / "README.md").read_text().partition("<!-- figures: ttft-demo.json -->")[2]
    assert f"| bare mlx-lm loop | {median['bare']:.0f} |" in table
    assert f"| cold | {median['cold']:.0f} | {median['cold'] / median['bare']:.2f}x of the bare loop |" in table
    assert f"| {median['warm']:.0f} | {ttft['cold_over_warm']:.0f}x faster than cold |" in table
    assert f"| hot | {median['hot']:.0f} | {ttft['cold_over_hot']:.0f}x faster than cold |" in table
    throughput = json.loads((root / "benchmarks/results/throughput-demo.json").read_text())
    for row in throughput["rows"]:
        figures = f"{row['tokens_per_s']:.1f} | {row['speedup']:.2f}x | {row['bytes_ratio']:.2f}x"
        assert f"| {row['case']} | {figures} |" in (root / "README.md").read_text()
    attention = json.loads((root / "benchmarks/results/attention-demo.json").read_text())["rows"]
    page = (root / "docs/architecture.md").read_text()
    for row in attention:
        assert f"{row['dequantized']:.0f} against {row['codes']:.0f}" in page


def test_the_readmes_tables_of_quality_and_capacity_are_those_of_the_committed_results():
    root = Path(__file__).parent.parent
    readme = (root / "README.md").read_text()
    corpora = [
        {
            row["kv_bits"]: row
            for row in json.loads((root / f"benchmarks/results/perplexity-demo-{c}.json").read_text())["presets"]
        }
        for c in ("wikitext", "pydoc")
    ]
    for kv_bits, name in (("8", "8"), ("k5v4", "k5v4"), ("4", "4"), ("plain4", "plain 4 bits")):
        rows = [corpus[kv_bits] for corpus in corpora]
        cells = [f"{r['delta_percent']:+.2f} % ({_interval(r)}) | {r['kl']:.5f} | {r['top1']:.1%}" for r in rows]
        assert f"| {name} | {rows[0]['ratio_to_fp16']:.3f} | {' | '.join(cells)} |" in readme
    capacity = json.loads((root / "benchmarks/results/capacity.json").read_text())
    names = {"gemma-3-12b": "Gemma 3 12B", "gpt-oss-20b": "gpt-oss-20b", "llama-3.1-8b": "Llama 3.1 8B",
             "qwen3-next-80b-a3b": "Qwen3-Next-80B-A3B", "deepseek-v3": "DeepSeek-V3"}  # fmt: skip
    for model in capacity["models"]:
        at_32k = next(c for c in model["contexts"] if c["tokens"] == 32768)
        if model["model"] in names:
            cells = [at_32k[c] for c in ("fp16_all_layers", "fp16_windows", "paper_q4", "agentmem")]
            row = " | ".join(f"{c['agents']} ({_size(c['bytes'])})" for c in cells)
            assert f"| {names[model['model']]}, 32K | {row} |" in readme


def test_the_readmes_sums_of_prefilled_tokens_are_those_of_the_committed_result():
    root = Path(__file__).parent.parent
    rows = json.loads((root / "benchmarks/results/splice.json").read_text()).values()
    sums = {key: f"{sum(row[key] for row in rows):,}" for key in ("requests", "tokens", "prefilled", "ideal", "linear")}
    readme = (root / "README.md").read_text()
    assert f"{sums['prefilled']} of {sums['tokens']} tokens are prefilled; {sums['ideal']} would be" in readme
    assert f"Over {sums['requests']} requests" in readme and f"{sums['linear']} by a server" in readme


def _interval(row):
    low, high = row["delta_ci95_percent"]
    return f"{low:+.2f} to {high:+.2f}"


def _size(nbytes):
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 999.5e6 else f"{nbytes / 1e6:.0f} MB"


@pytest.mark.parametrize("given", ["a.local, b.local", ["a.local,b.local"], ["a.local", "b.local"]])
def test_hosts_are_split_at_commas_wherever_they_come_from(given):
    assert load_settings({"allowed_hosts": given}).allowed_hosts == ["a.local", "b.local"]
