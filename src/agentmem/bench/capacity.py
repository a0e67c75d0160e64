"""Agents that fit into a budget: computed from a model's config, not measured.

footprints.py has the formulas.
"""

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from ..cli.options import Config, Home
from ..cli.show import console, size, table
from ..config import Settings, load_settings, parse_bytes, parse_share, resolve
from ..errors import StartupError
from .harness.model_config import find, read_config
from .harness.options import JsonFile, Shown, check_writable
from .harness.paper import PAPER_TABLE

if TYPE_CHECKING:
    from .footprints import Footprint, KindRow, ModelCapacity

_MAX_CONTEXT = 1 << 30
# key in the result: name in the table
_COLUMNS = {
    "fp16_all_layers": "FP16, all layers",
    "fp16_windows": "FP16, windows",
    "paper_q4": "paper's Q4",
    "agentmem": "agentmem",
}


def tables(result: dict[str, Any]) -> list[Shown]:
    """Show a result file; the command itself shows more."""
    budget = size(result["budget_bytes"])
    shown: list[Shown] = [f"agents at rest in {budget}: bytes of one, and how many fit"]
    for model in result["models"]:
        lines = table("tokens", *_COLUMNS.values())
        for cell in model["contexts"]:
            parts = [_fit_text(cell[column]) for column in _COLUMNS]
            lines.add_row(f"{cell['tokens']:,}", *parts)
        shown += [model["model"], lines]
    return shown


def _fit_text(part: dict[str, int] | None) -> str:
    return f"{size(part['bytes'])}: {part['agents']:,}" if part else "-"


Models = Annotated[
    list[str] | None,
    typer.Argument(
        help="config.json, model directory, model as serve takes it, or a built-in "
        "(default: the paper's three)",
        metavar="MODEL_OR_CONFIG",
        show_default=False,
    ),
]
Budget = Annotated[
    str,
    typer.Option(help="RAM for caches: a size (10.2G is 10.2 GiB), or a share of this machine's"),
]
Contexts = Annotated[str, typer.Option(help="tokens an agent has, comma-separated")]
BlockBits = Annotated[
    str | None, typer.Option(help="4, k5v4, 8 or 16, of agentmem's blocks (default: 4)")
]
BlockSize = Annotated[int | None, typer.Option(help="tokens a block (default: 256)")]
Paper = Annotated[
    bool,
    typer.Option("--paper", help="the paper's table beside ours; without a model always"),
]


def capacity(
    models: Models = None,
    budget: Budget = "10.2G",
    contexts: Contexts = "4k,8k,16k,32k,64k,128k",
    kv_bits: BlockBits = None,
    block_size: BlockSize = None,
    paper: Paper = False,
    json_file: JsonFile = None,
    home: Home = None,
    config: Config = None,
) -> None:
    """How many agents fit into a budget, for any model; a config file is enough, no weights are
    read.

    Bytes of a resting agent: FP16 with all layers at full length, FP16 with windows as mlx-lm's own
    caches keep them, the paper's Q4 (all layers at full length), and agentmem (in RAM, and what a
    restore reads; at worst: the most up to that length, with an unfinished block or a full chunk).
    A running agent's working copy comes on top.

    Built-ins: deepseek-coder-v2-lite, deepseek-v3, gemma-3-12b, gpt-oss-20b, llama-3.1-8b,
    llama-4-scout, qwen3-next-80b-a3b.

    JSON: {"budget_bytes", "models": [{"model", "layers": [{"kind", "layers", ...}], "contexts":
    [{"tokens", "fp16_all_layers": {"bytes", "agents"}, "fp16_windows", "paper_q4", "agentmem": the
    same, "agentmem_at_worst_bytes", "agentmem_disk_bytes"}]}], "paper": [{"model", "budget_bytes",
    "contexts"}]}.
    """
    flags = {"home": home, "kv_bits": kv_bits, "block_size": block_size}
    settings = load_settings(flags, config)
    lengths = _contexts(contexts)
    if json_file:
        check_writable(json_file)
    nbytes = _budget(budget)
    names = models or [row.model for row in PAPER_TABLE]
    rows = [_capacity_of(name, lengths, settings) for name in names]
    comparison = _paper_rows(settings) if paper or not models else []
    for row in rows:
        _print_model(row, nbytes)
    if comparison:
        _print_paper(comparison)
    if json_file:
        result: dict[str, Any] = {
            "benchmark": "capacity",
            "budget_bytes": nbytes,
            "kv_bits": settings.kv_bits,
            "block_size": settings.block_size,
            "models": [row.to_json(nbytes) for row in rows],
            "paper": comparison,
        }
        json_file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def _contexts(text: str) -> list[int]:
    """Return the lengths in an option's text, ascending. "32k" is 32,768."""
    try:
        lengths = sorted({parse_bytes(part) for part in text.split(",") if part.strip()})
    except ValueError:
        lengths = []
    if not lengths or lengths[0] < 1 or lengths[-1] > _MAX_CONTEXT:
        raise StartupError(
            f"--contexts {text!r}: write numbers of tokens from 1 to 1G, such as 4k,32k,128k"
        )
    return lengths


def _budget(text: str) -> int:
    from ..engine.footprint import physical_memory

    try:
        nbytes = resolve(parse_share(text), physical_memory())
    except ValueError as e:
        raise StartupError(f"--budget: {e}") from None
    if nbytes < 1:
        raise StartupError(f"--budget {text}: must be more than nothing")
    return nbytes


def _capacity_of(name: str, lengths: list[int], settings: Settings) -> "ModelCapacity":
    from ..kvcache.spec_of_config import spec_of_config
    from .footprints import ModelCapacity, footprint

    found = read_config(find(name, settings.home_dir))
    spec = spec_of_config(
        found,
        kv_bits=settings.kv_bits,
        block_size=settings.block_size,
        state_interval=settings.state_interval,
    )
    return ModelCapacity(
        model=name,
        model_type=found["model_type"],
        spec=spec,
        footprints=tuple(footprint(spec, n) for n in lengths),
    )


def _paper_rows(settings: Settings) -> list[dict[str, Any]]:
    from .footprints import compare_with_paper

    rows = []
    for row in PAPER_TABLE:
        cells = compare_with_paper(row, _capacity_of(row.model, [], settings).spec)
        contexts = [asdict(cell) for cell in cells]
        rows.append({"model": row.model, "budget_bytes": row.budget, "contexts": contexts})
    return rows


def _print_model(row: "ModelCapacity", budget: int) -> None:
    from .footprints import kinds, open_block_bytes

    spec = row.spec
    gib = f"{budget / 2**30:.4g} GiB"
    print(f"{row.model} ({row.model_type}): agents at rest in {size(budget)} ({gib})")
    if spec.opaque:
        print(f"mlx-lm's own caches, nothing is kept after an answer: {spec.opaque.reason}")
    else:
        _print_kinds(kinds(spec))
        unfinished = size(open_block_bytes(spec))
        print(f"each with up to {unfinished} for the unfinished block, in full precision")
        if spec.unquantized_reason:
            print(f"not quantized: {spec.unquantized_reason}")
    console().print(_footprint_table(row.footprints, budget))
    print()


def _footprint_table(footprints: "tuple[Footprint, ...]", budget: int) -> Table:
    from .footprints import agents

    names = []
    for name in _COLUMNS.values():
        names += [name, "agents"]
    lines = table("tokens", *names, "at worst", "on disk")
    for cell in footprints:
        parts = []
        for column in _COLUMNS:
            nbytes = getattr(cell, column)
            if nbytes is None:
                parts += ["-", "-"]
            else:
                parts += [size(nbytes), f"{agents(budget, nbytes):,}"]
        for nbytes in (cell.agentmem_at_worst, cell.agentmem_disk):
            parts.append("-" if nbytes is None else size(nbytes))
        lines.add_row(f"{cell.tokens:,}", *parts)
    return lines


def _print_kinds(rows: list["KindRow"]) -> None:
    lines = table("kind", "layers", "heads x dim", "FP16 B/token", "sealed B/token", "at most")
    for row in rows:
        kind = row.kind
        if row.window:
            kind += f" {row.window:,}"
        if row.attention_sinks:
            kind += ", sinks"
        shape = fp16 = sealed = "-"
        if row.k_dim:
            dims = f"{row.k_dim}" if row.k_dim == row.v_dim else f"{row.k_dim}/{row.v_dim}"
            shape = f"{row.num_kv_heads} x {dims}"
            fp16 = f"{row.fp16_bytes_per_token:,}"
            sealed = f"{row.sealed_bytes_per_token:,}"
        at_most = "-" if row.fixed_bytes is None else size(row.fixed_bytes)
        lines.add_row(kind, str(row.layers), shape, fp16, sealed, at_most)
    console().print(lines)


def _print_paper(rows: list[dict[str, Any]]) -> None:
    print("The paper's table, agents in FP16 / Q4: its figures | by its rule | agentmem")
    lengths = [cell["tokens"] for cell in rows[0]["contexts"]]
    lines = table("model", "budget", *[f"{n // 1024}K" for n in lengths])
    for row in rows:
        cells = []
        for cell in row["contexts"]:
            paper = "/".join(map(str, cell["paper"]))
            by_its_rule = "/".join(map(str, cell["by_its_rule"]))
            cells.append(f"{paper} | {by_its_rule} | {cell['agentmem']}")
        lines.add_row(row["model"], f"{row['budget_bytes'] / 2**20:,.0f} MiB", *cells)
    console().print(lines)
