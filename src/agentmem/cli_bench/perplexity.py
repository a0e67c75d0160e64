"""`agentmem bench perplexity`: what fewer bits cost in quality."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..cli.agents import table
from ..errors import StartupError
from .common import Shared, Shown, benchmark

if TYPE_CHECKING:
    from ..bench.perplexity import PresetResult
    from ..bench.windows import Protocol
    from ..models.loading import LoadedModel

Presets = Annotated[
    str,
    typer.Option(
        help="rows besides 16, comma-separated: 8, k5v4, k5v3, 4, or plain4, 4 bits as in mlx-lm"
    ),
]


@benchmark
def perplexity(
    shared: Shared,
    window: Annotated[int, typer.Option(help="tokens fed into one cache")] = 2048,
    stride: Annotated[
        int | None,
        typer.Option(
            help="tokens from window to window; a window's last STRIDE are scored (default: the window)"
        ),
    ] = None,
    tokens: Annotated[
        int, typer.Option(help="tokens to score at least; rounded up to whole windows")
    ] = 8192,
    kv_bits: Presets = "16,8,k5v4,4,plain4",
    block_size: Annotated[int | None, typer.Option(help="tokens a block (default: 256)")] = None,
) -> dict[str, Any]:
    """What fewer bits cost in quality: perplexity, KL divergence and top-1 agreement against 16
    bits.

    The cache is the server's own, fed block by block as in serving. The interval of dPPL is of 95
    %, by Student's t over the windows. The paper's protocol: --window 512 --stride 256 --tokens
    7935.
    """
    with shared.run(block_size=block_size) as run:
        from ..bench import perplexity as bench
        from ..bench.windows import Protocol, cut_windows, read_corpus

        presets = _presets(kv_bits, bench.PRESETS)
        protocol = Protocol(window, window if stride is None else stride, tokens)
        name, text = read_corpus(run.corpus)
        loaded = run.load()
        if protocol.window > loaded.max_context:
            raise StartupError(
                f"--window {window} is more than the model's context of {loaded.max_context} tokens"
            )
        windows = list(cut_windows(_encode(loaded, text, protocol), protocol, _bos(loaded)))
        done = run.task("scoring", len(windows) * window * len(presets))
        rows = bench.measure(
            loaded, windows, presets, block_size=run.settings.block_size, progress=done
        )
        return {"benchmark": "perplexity"} | _result(rows, run.settings.model, name, protocol)


def _presets(text: str, known: tuple[str, ...]) -> list[str]:
    """In the order of the table, 16 bits first: they are what the others are compared with."""
    asked = [part.strip() for part in text.split(",") if part.strip()]
    if unknown := [name for name in asked if name not in known]:
        raise StartupError(
            f"--kv-bits {', '.join(unknown)}: not known; choose from {','.join(known)}"
        )
    return [name for name in known if name in asked or name == "16"]


def _encode(loaded: "LoadedModel", text: str, protocol: "Protocol") -> list[int]:
    """As much of the corpus as can be needed: few tokens are longer than 32 characters."""
    text = text[: 32 * (protocol.num_scored + 1)]
    # it would warn of a text longer than the model's context
    tokens: list[int] = loaded.tokenizer.encode(text, add_special_tokens=False, verbose=False)
    return tokens


def _bos(loaded: "LoadedModel") -> list[int]:
    """What the tokenizer puts before any text, if it puts anything."""
    bos = loaded.tokenizer.bos_token_id
    return [bos] if bos is not None and loaded.tokenizer.encode("")[:1] == [bos] else []


def _result(
    rows: list["PresetResult"], model: str, corpus: str, protocol: "Protocol"
) -> dict[str, Any]:
    from ..bench.machine import describe_machine

    machine = describe_machine()
    return {
        "presets": [row.to_json() for row in rows],
        "machine": machine,
        "model": model,
        "corpus": corpus,
        "window": protocol.window,
        "stride": protocol.stride,
        "tokens": protocol.num_scored,
        "date": machine["date"],
    }


def tables(result: dict[str, Any]) -> list[Shown]:
    from ..bench.perplexity import PresetResult

    rows = [PresetResult(**row) for row in result["presets"]]
    windows = 1 + (result["tokens"] - result["window"]) // result["stride"]
    title = (
        f"{result['model']}, {result['corpus']}, {result['tokens']:,} tokens in {windows} windows"
    )
    lines = table(
        "kv bits", "ppl", "dPPL", "95 % interval", "KL", "top-1", "bytes/token", "of FP16"
    )
    for row in rows:
        if row.unavailable:
            lines.add_row(row.kv_bits, *["-"] * 7)
            continue
        ci = row.delta_ci95_percent
        interval = f"{ci[0]:+.2f} ... {ci[1]:+.2f} %" if ci else "-"
        quality = (
            f"{row.ppl:.3f}",
            f"{row.delta_percent:+.2f} %",
            interval,
            f"{row.kl:.5f}",
            f"{row.top1:.2%}",
        )
        lines.add_row(
            row.kv_bits, *quality, f"{row.bytes_per_token:,.0f}", f"{row.ratio_to_fp16:.3f}"
        )
    missing = [
        f"{row.kv_bits}: not available: {row.unavailable}" for row in rows if row.unavailable
    ]
    return [title, lines, *missing]
