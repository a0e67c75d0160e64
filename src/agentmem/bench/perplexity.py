"""What fewer bits cost: the production cache at each precision against 16 bits.

Both are fed windows of a text. Each window starts an empty cache and is fed block by block as in
serving. KL divergence is of the next token's distribution from that of 16 bits, a mean over all
tokens scored; top-1 how often both have the same likeliest token. The interval of the change of
perplexity is of 95 %, by Student's t over the windows. Nothing here is timed.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from math import exp
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..cli.show import table
from ..errors import StartupError
from .harness.corpus import Window, Windows, cut_windows, read_corpus
from .harness.machine import describe_machine
from .harness.options import Shared, Shown, benchmark

if TYPE_CHECKING:
    from ..models.loading import LoadedModel
    from .perplexity_scores import Preset, Score

# the order of the table; 16 bits are what the others are compared with
PRESETS = ("16", "8", "k5v4", "k5v3", "4", "plain4")


@dataclass(frozen=True)
class PresetResult:
    """A row of the table; figures are None where `unavailable` says why."""

    kv_bits: str
    # of a sealed token, sinks and snapshots of state aside; 16-bit values count 2 bytes on a CPU
    # too
    bytes_per_token: float | None
    ratio_to_fp16: float | None
    ppl: float | None = None
    delta_percent: float | None = None  # of perplexity, against 16 bits
    delta_ci95_percent: tuple[float, float] | None = None  # None for one window
    kl: float | None = None  # nats a token
    top1: float | None = None  # share of tokens, 0 to 1
    unavailable: str | None = None

    def to_json(self) -> dict[str, Any]:
        row = asdict(self)
        if not self.unavailable:
            del row["unavailable"]
        return row


def measure(
    loaded: "LoadedModel",
    windows: Sequence[Window],
    names: Sequence[str],
    *,
    block_size: int = 256,
    progress: Callable[[int], object] = lambda tokens: None,
) -> list[PresetResult]:
    """Return a row of each preset, those that are not available last.

    `names` are in the order of PRESETS, 16 bits among them.
    """
    from .perplexity_scores import presets, score_windows

    made = presets(loaded, names, block_size)
    begin = [preset.begin for preset in made if preset.begin]
    scores = score_windows(begin, windows, block_size, progress)
    ready = [preset for preset in made if preset.begin]
    missing = [preset for preset in made if not preset.begin]
    rows = [_row(preset, scores[0], of) for preset, of in zip(ready, scores, strict=True)]
    for preset in missing:
        rows.append(PresetResult(preset.kv_bits, None, None, unavailable=preset.unavailable))
    return rows


def _row(preset: "Preset", reference: list["Score"], scores: list["Score"]) -> PresetResult:
    from .perplexity_scores import Score, delta_percent

    total = sum(scores, Score())
    change, interval = delta_percent(reference, scores)
    return PresetResult(
        preset.kv_bits,
        bytes_per_token=preset.bytes_per_token,
        ratio_to_fp16=preset.ratio_to_fp16,
        ppl=exp(total.nll / total.tokens),
        delta_percent=change,
        delta_ci95_percent=interval,
        kl=total.kl / total.tokens,
        top1=total.agreed / total.tokens,
    )


def tables(result: dict[str, Any]) -> list[Shown]:
    rows = [PresetResult(**row) for row in result["presets"]]
    windows = 1 + (result["tokens"] - result["window"]) // result["stride"]
    text = f"{result['corpus']}, {result['tokens']:,} tokens in {windows} windows"
    lines = table(
        "kv bits", "ppl", "dPPL", "95 % interval", "KL", "top-1", "bytes/token", "of FP16"
    )
    missing = []
    for row in rows:
        if row.unavailable:
            lines.add_row(row.kv_bits, *["-"] * 7)
            missing.append(f"{row.kv_bits}: not available: {row.unavailable}")
            continue
        ci = row.delta_ci95_percent
        lines.add_row(
            row.kv_bits,
            f"{row.ppl:.3f}",
            f"{row.delta_percent:+.2f} %",
            f"{ci[0]:+.2f} ... {ci[1]:+.2f} %" if ci else "-",
            f"{row.kl:.5f}",
            f"{row.top1:.2%}",
            f"{row.bytes_per_token:,.0f}",
            f"{row.ratio_to_fp16:.3f}",
        )
    return [f"{result['model']}, {text}", lines, *missing]


WindowTokens = Annotated[int, typer.Option(help="tokens fed into one cache")]
Stride = Annotated[
    int | None,
    typer.Option(
        help="tokens from window to window; a window's last STRIDE are scored (default: the window)"
    ),
]
Tokens = Annotated[int, typer.Option(help="tokens to score at least; rounded up to whole windows")]
Presets = Annotated[
    str,
    typer.Option(
        help="rows besides 16, comma-separated: 8, k5v4, k5v3, 4, or plain4, 4 bits as in mlx-lm"
    ),
]
BlockSize = Annotated[int | None, typer.Option(help="tokens a block (default: 256)")]


@benchmark(tables)
def perplexity(
    shared: Shared,
    window: WindowTokens = 2048,
    stride: Stride = None,
    tokens: Tokens = 8192,
    kv_bits: Presets = "16,8,k5v4,4,plain4",
    block_size: BlockSize = None,
) -> dict[str, Any]:
    """What fewer bits cost in quality: perplexity, KL divergence and top-1 agreement against 16
    bits.

    The cache is the server's own, fed block by block as in serving. The interval of dPPL is of 95
    %, by Student's t over the windows. The paper's protocol: --window 512 --stride 256 --tokens
    7935.
    """
    with shared.run(block_size=block_size) as run:
        names = _presets(kv_bits)
        asked = Windows(window, window if stride is None else stride, tokens)
        corpus, text = read_corpus(run.corpus)
        loaded = run.load()
        if asked.window > loaded.max_context:
            raise StartupError(
                f"--window {window} is more than the model's context of {loaded.max_context} tokens"
            )
        ids = _encode(loaded, text, asked)
        windows = list(cut_windows(ids, asked, _bos(loaded)))
        done = run.task("scoring", len(windows) * window * len(names))
        block = run.settings.block_size
        rows = measure(loaded, windows, names, block_size=block, progress=done)
        machine = describe_machine()
        return {
            "benchmark": "perplexity",
            "presets": [row.to_json() for row in rows],
            "machine": machine,
            "model": run.settings.model,
            "corpus": corpus,
            "window": asked.window,
            "stride": asked.stride,
            "tokens": asked.num_scored,
            "date": machine["date"],
        }


def _presets(text: str) -> list[str]:
    """Return the presets in an option's text, and 16 bits. Raises StartupError."""
    asked = [part.strip() for part in text.split(",") if part.strip()]
    if unknown := [name for name in asked if name not in PRESETS]:
        raise StartupError(
            f"--kv-bits {', '.join(unknown)}: not known; choose from {','.join(PRESETS)}"
        )
    return [name for name in PRESETS if name in asked or name == "16"]


def _encode(loaded: "LoadedModel", text: str, asked: Windows) -> list[int]:
    """Encode as much of the corpus as can be needed: few tokens are longer than 32 characters."""
    text = text[: 32 * (asked.num_scored + 1)]
    # it would warn of a text longer than the model's context
    tokens: list[int] = loaded.tokenizer.encode(text, add_special_tokens=False, verbose=False)
    return tokens


def _bos(loaded: "LoadedModel") -> list[int]:
    """Return what the tokenizer puts before any text, if it puts anything."""
    bos = loaded.tokenizer.bos_token_id
    return [bos] if bos is not None and loaded.tokenizer.encode("")[:1] == [bos] else []
