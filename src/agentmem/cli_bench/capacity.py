"""`agentmem bench capacity`: agents that fit into a budget."""

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..cli.agents import console, size, table
from ..config import Settings, load_settings, parse_bytes, parse_share, resolve
from ..errors import StartupError
from .common import Config, Home, JsonFile, Shown, check_writable

if TYPE_CHECKING:
    from ..bench.capacity import Capacity, KindRow

Models = Annotated[
    list[str] | None,
    typer.Argument(
        help="config.json, model directory, model as serve takes it, or a built-in (default: the paper's three)",
        metavar="MODEL_OR_CONFIG",
        show_default=False,
    ),
]
Budget = Annotated[
    str,
    typer.Option(help="RAM for caches: a size (10.2G is 10.2 GiB), or a share of this machine's"),
]
PrefixCache = Annotated[str, typer.Option(help="tokens an agent has, comma-separated")]
KVBits = Annotated[
    str | None, typer.Option(help="4, k5v4, 8 or 16, of agentmem's blocks (default: 4)")
]
BlockSize = Annotated[int | None, typer.Option(help="tokens a block (default: 256)")]
Paper = Annotated[
    bool, typer.Option("--paper", help="the paper's table beside ours; without a model always")
]
_MAX_CONTEXT = 1 << 30
_COLUMN_NAMES = ("FP16, all layers", "FP16, windows", "paper's Q4", "agentmem")


def capacity(
    models: Models = None,
    budget: Budget = "10.2G",
    contexts: PrefixCache = "4k,8k,16k,32k,64k,128k",
    kv_bits: KVBits = None,
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
    settings = load_settings({"home": home, "kv_bits": kv_bits, "block_size": block_size}, config)
    lengths = _prefix_cache(contexts)
    if json_file:
        check_writable(json_file)
    nbytes = _budget(budget)
    from ..bench.paper import PAPER_TABLE

    rows = [
        _measure(name, lengths, settings) for name in models or [row.model for row in PAPER_TABLE]
    ]
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
        }
        result |= {"models": [row.to_json(nbytes) for row in rows], "paper": comparison}
        json_file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def tables(result: dict[str, Any]) -> list[Shown]:
    """Of a result file; the command itself shows more."""
    from ..bench.capacity import COLUMNS

    shown: list[Shown] = [
        f"agents at rest in {size(result['budget_bytes'])}: bytes of one, and how many fit"
    ]
    for model in result["models"]:
        lines = table("tokens", *_COLUMN_NAMES)
        for cell in model["contexts"]:
            parts = (cell[column] for column in COLUMNS)
            lines.add_row(
                f"{cell['tokens']:,}",
                *(f"{size(p['bytes'])}: {p['agents']:,}" if p else "-" for p in parts),
            )
        shown += [model["model"], lines]
    return shown


def _prefix_cache(text: str) -> list[int]:
    """Ascending. "32k" is 32,768."""
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


def _measure(name: str, lengths: list[int], settings: Settings) -> "Capacity":
    from ..bench.capacity import Capacity, footprint
    from ..bench.find_config import find, read_config
    from ..kvcache.spec_of_config import spec_of_config

    found = read_config(find(name, settings.home_dir))
    spec = spec_of_config(
        found,
        kv_bits=settings.kv_bits,
        block_size=settings.block_size,
        state_interval=settings.state_interval,
    )
    return Capacity(name, found["model_type"], spec, tuple(footprint(spec, n) for n in lengths))


def _paper_rows(settings: Settings) -> list[dict[str, Any]]:
    from ..bench.paper import PAPER_TABLE, compare

    rows = []
    for row in PAPER_TABLE:
        cells = compare(row, _measure(row.model, [], settings).spec)
        rows.append(
            {
                "model": row.model,
                "budget_bytes": row.budget,
                "contexts": [asdict(cell) for cell in cells],
            }
        )
    return rows


def _print_model(row: "Capacity", budget: int) -> None:
    from ..bench.capacity import COLUMNS, agents, kinds, open_block_bytes

    spec = row.spec
    print(
        f"{row.model} ({row.model_type}): agents at rest in {size(budget)} ({budget / 2**30:.4g} GiB)"
    )
    if spec.opaque:
        print(f"mlx-lm's own caches, nothing is kept after an answer: {spec.opaque.reason}")
    else:
        _print_kinds(kinds(spec))
        print(
            f"each with up to {size(open_block_bytes(spec))} for the unfinished block, in full precision"
        )
        if spec.unquantized_reason:
            print(f"not quantized: {spec.unquantized_reason}")
    lines = table(
        "tokens",
        *(part for name in _COLUMN_NAMES for part in (name, "agents")),
        "at worst",
        "on disk",
    )
    for cell in row.footprints:
        parts = []
        for column in COLUMNS:
            nbytes = getattr(cell, column)
            parts += ["-", "-"] if nbytes is None else [size(nbytes), f"{agents(budget, nbytes):,}"]
        more = ("-" if n is None else size(n) for n in (cell.agentmem_at_worst, cell.agentmem_disk))
        lines.add_row(f"{cell.tokens:,}", *parts, *more)
    console().print(lines)
    print()


def _print_kinds(rows: list["KindRow"]) -> None:
    lines = table("kind", "layers", "heads x dim", "FP16 B/token", "sealed B/token", "at most")
    for row in rows:
        dims = f"{row.k_dim}" if row.k_dim == row.v_dim else f"{row.k_dim}/{row.v_dim}"
        shape = f"{row.num_kv_heads} x {dims}" if row.k_dim else "-"
        per_token = (
            (f"{row.fp16_bytes_per_token:,}", f"{row.sealed_bytes_per_token:,}")
            if row.k_dim
            else ("-", "-")
        )
        kind = (
            row.kind
            + (f" {row.window:,}" if row.window else "")
            + (", sinks" if row.attention_sinks else "")
        )
        lines.add_row(
            kind,
            str(row.layers),
            shape,
            *per_token,
            "-" if row.fixed_bytes is None else size(row.fixed_bytes),
        )
    console().print(lines)


def _print_paper(rows: list[dict[str, Any]]) -> None:
    print("The paper's table, agents in FP16 / Q4: its figures | by its rule | agentmem")
    lengths = [cell["tokens"] for cell in rows[0]["contexts"]]
    lines = table("model", "budget", *(f"{n // 1024}K" for n in lengths))
    for row in rows:
        cells = (
            f"{'/'.join(map(str, c['paper']))} | {'/'.join(map(str, c['by_its_rule']))} | {c['agentmem']}"
            for c in row["contexts"]
        )
        lines.add_row(row["model"], f"{row['budget_bytes'] / 2**20:,.0f} MiB", *cells)
    console().print(lines)
