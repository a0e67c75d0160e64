"""Results as pictures. matplotlib is an optional dependency, imported only here."""

import importlib.util
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

from ...errors import StartupError

Plotter = Callable[[dict[str, Any], Path], None]  # a result, and where to draw it


def check_plot(path: Path) -> None:
    """Raise StartupError where matplotlib can't draw it: with what would help."""
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise StartupError(f"--plot {path}: its name must end in .png, .svg or .pdf")
    if importlib.util.find_spec("matplotlib") is None:
        raise StartupError("--plot needs matplotlib: pip install 'agentmem[bench]'")


def plot_perplexity(result: dict[str, Any], path: Path) -> None:
    """Draw cost in quality over size, one point a preset.

    dPPL has its interval, and KL a logarithmic axis.
    """
    figure = _figure(10, 4)
    change, divergence = figure.subplots(1, 2)
    presets = result["presets"]
    rows = [row for row in presets if row["kv_bits"] != "16" and row["ppl"] is not None]
    for row in rows:
        delta = row["delta_percent"]
        low, high = row["delta_ci95_percent"] or (delta, delta)
        errors = [[delta - low], [high - delta]]
        size = row["ratio_to_fp16"]
        change.errorbar(size, delta, yerr=errors, fmt="o", capsize=4)
        divergence.plot(size, row["kl"], "o")
        for axes, y in ((change, delta), (divergence, row["kl"])):
            axes.annotate(row["kv_bits"], (size, y), xytext=(8, 4), textcoords="offset points")
    change.axhline(0, color="grey", linewidth=0.8)
    change.set_ylabel("change of perplexity, %, with its 95 % interval")
    if any(row["kl"] > 0 for row in rows):
        divergence.set_yscale("log")
    divergence.set_ylabel("KL divergence from 16 bits, nats a token")
    for axes in (change, divergence):
        axes.margins(0.15)
        axes.set_xlabel("size of a sealed token over FP16")
    tokens = f"{result['tokens']:,} tokens, windows of {result['window']:,}"
    figure.suptitle(f"{result['model']}, {result['corpus']}: {tokens}")
    _write(figure, path)


def plot_ttft(result: dict[str, Any], path: Path) -> None:
    """Draw time to first token over context, a line for each state with its range.

    Both axes are logarithmic.
    """
    figure = _figure(7, 4.5)
    axes = figure.subplots()
    contexts = [row["context"] for row in result["rows"]]
    for state in ("cold", "warm", "hot"):
        cells = [row[state] for row in result["rows"]]
        axes.plot(contexts, [cell["ttft_ms"] for cell in cells], "o-", label=state)
        least = [cell["min_ms"] for cell in cells]
        most = [cell["max_ms"] for cell in cells]
        axes.fill_between(contexts, least, most, alpha=0.2)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(contexts, [f"{n:,}" for n in contexts])
    axes.set_xlabel("prompt tokens")
    axes.set_ylabel("ms to the first token, over HTTP")
    axes.legend()
    figure.suptitle(
        f"{result['model']}: time to first token, "
        f"medians of {result['passes']} passes, and their range"
    )
    _write(figure, path)


def plot_scenario(result: dict[str, Any], path: Path) -> None:
    """Draw time to first token turn by turn of the first pass, a line for each mode.

    Beside it is wall time by phase.
    """
    figure = _figure(12, 4.5)
    by_turn, by_phase = figure.subplots(1, 2, width_ratios=[2, 1])
    phases = list(dict.fromkeys(_plain(row["phase"]) for row in result["rows"]))
    width = 0.8 / len(result["modes"])
    for i, mode in enumerate(result["modes"]):
        turns = [turn for turn in result["turns"] if turn["mode"] == mode and turn["run"] == 0]
        times = [turn["ttft_ms"] for turn in turns]
        by_turn.plot(range(1, len(turns) + 1), times, "o-", label=mode)
        walls = [row["wall_s"]["median"] for row in result["rows"] if row["mode"] == mode]
        places = [x + i * width for x in range(len(phases))]
        by_phase.bar(places, walls, width, label=mode)
    at = 0.5
    for row in result["rows"]:
        if row["mode"] != result["modes"][0]:
            continue
        by_turn.axvline(at, color="grey", linewidth=0.8)
        by_turn.text(
            at,
            1.01,
            f" {_plain(row['phase'])}",
            transform=by_turn.get_xaxis_transform(),
            fontsize="small",
        )
        at += row["turns"]
    by_turn.set_yscale("log")
    by_turn.set_xlabel("turn")
    by_turn.set_ylabel("ms to the first token, over HTTP")
    by_turn.legend()
    middles = [x + 0.4 - width / 2 for x in range(len(phases))]
    by_phase.set_xticks(middles, phases, rotation=30, ha="right")
    by_phase.set_ylabel("wall time, s")
    figure.suptitle(f"{result['scenario']}, {result['model']}")
    _write(figure, path)


def plot_throughput(result: dict[str, Any], path: Path) -> None:
    """Draw tokens/s over agents at once, by state: while all stream, and end to end."""
    figure = _figure(10, 4)
    panels = figure.subplots(1, 2, sharey=True)
    titles = {
        "tokens_per_s": "while all of them stream",
        "end_to_end_tokens_per_s": "prefill and restore included",
    }
    for axes, (name, title) in zip(panels, titles.items(), strict=True):
        for state in ("cold", "warm", "hot"):
            rows = [row for row in result["rows"] if row[state][name]]
            agents = [row["agents"] for row in rows]
            rates = [row[state][name] for row in rows]
            axes.plot(agents, [rate["median"] for rate in rates], "o-", label=state)
            least = [rate["min"] for rate in rates]
            most = [rate["max"] for rate in rates]
            axes.fill_between(agents, least, most, alpha=0.2)
        axes.set_xticks([row["agents"] for row in result["rows"]])
        axes.set_xlabel("agents at once")
        axes.set_title(title)
    panels[0].set_ylabel("tokens/s over all agents, over HTTP")
    panels[0].set_ylim(bottom=0)
    panels[0].legend()
    passes = f"medians of {result['passes']} passes"
    figure.suptitle(f"{result['model']}: {result['context']:,} tokens each, {passes}")
    _write(figure, path)


def plot_staggered(result: dict[str, Any], path: Path) -> None:
    """Draw when each agent asked, and when its tokens came, in the last pass."""
    timeline = result["timeline"]
    figure = _figure(10, 0.5 * len(timeline) + 1.5)
    axes = figure.subplots()
    for i, line in enumerate(timeline):
        tokens = line["tokens_s"]
        waits = [line["asked_s"], tokens[0]]
        axes.plot(waits, [i, i], color="lightgrey", linewidth=6, solid_capstyle="butt")
        axes.plot([tokens[0], tokens[-1]], [i, i], color="C0", linewidth=1)
        axes.plot(tokens, [i] * len(tokens), "|", color="C0", markersize=12)
    axes.set_yticks(range(len(timeline)), [line["agent"] for line in timeline])
    axes.invert_yaxis()
    axes.set_xlabel("s; grey: waits for its first token; strokes: tokens")
    what = f"A prefills {result['context']:,} tokens while C answers and others come back"
    figure.suptitle(f"{result['model']}: {what}")
    _write(figure, path)


def plot_write(result: dict[str, Any], path: Path) -> None:
    """Draw bytes written so far over tokens so far, beside the line of what is kept in the end."""
    figure = _figure(7, 4.5)
    axes = figure.subplots()
    tokens = list(accumulate(row["tokens"] for row in result["rows"]))
    written = list(accumulate(row["bytes"] / 1e6 for row in result["rows"]))
    # the end of the line is what the server writes when it stops
    tokens.append(tokens[-1])
    written.append(result["written_bytes"] / 1e6)
    axes.step(tokens, written, where="post", label="written by then")
    kept = [0, result["kept_bytes"] / 1e6]
    axes.plot([0, tokens[-1]], kept, "--", color="grey", label="kept in the end")
    axes.set_xlabel("tokens of the conversation")
    axes.set_ylabel("MB of block and tail files")
    axes.legend()
    amplification = f"{result['amplification']:.2f} bytes written for each that is kept"
    figure.suptitle(f"{result['model']}: {amplification}")
    _write(figure, path)


def plot_compare(result: dict[str, Any], path: Path) -> None:
    """Draw bars by server: time to first token in each state, and tokens/s; whiskers are ranges.

    Times have a logarithmic axis.
    """
    names = [about["name"] for about in result["servers"]]
    contexts = sorted({row["context"] for row in result["rows"]})
    figure = _figure(4.5 * (len(contexts) + 1), 4.5)
    *times, speed = figure.subplots(1, len(contexts) + 1)
    states = ("cold", "second_turn", "after_restart", "resumed")
    for axes, context in zip(times, contexts, strict=True):
        rows = {row["server"]: row for row in result["rows"] if row["context"] == context}
        for i, name in enumerate(names):
            cells = [(x, rows[name][state]) for x, state in enumerate(states)]
            bars = [
                (x, cell["ttft_ms"], cell["min_ms"], cell["max_ms"]) for x, cell in cells if cell
            ]
            _bars(axes, bars, name=name, i=i, of=len(names))
        axes.set_yscale("log")
        axes.set_xticks(range(len(states)), [state.replace("_", "\n") for state in states])
        axes.set_title(f"{context:,} tokens: ms to the first one")
    for i, name in enumerate(names):
        found = [row["tokens_per_s"] for row in result["decode"] if row["server"] == name]
        bars = [(x, rate["median"], rate["min"], rate["max"]) for x, rate in enumerate(found)]
        _bars(speed, bars, name=name, i=i, of=len(names))
    decoded = [row for row in result["decode"] if row["server"] == names[0]]
    labels = [f"{row['batch']} at once,\n{row['context']:,} each" for row in decoded]
    speed.set_xticks(range(len(labels)), labels)
    speed.set_title("decoded tokens/s")
    speed.legend()
    figure.suptitle(f"{result['model']}, medians of {result['passes']} passes, and their range")
    _write(figure, path)


def _bars(
    axes: Any, bars: list[tuple[int, float, float, float]], *, name: str, i: int, of: int
) -> None:
    """Draw (place, median, min, max) of the `i`th of several that stand beside each other."""
    width = 0.8 / of
    below = [median - low for _, median, low, _ in bars]
    above = [high - median for _, median, _, high in bars]
    at = [bar[0] + (i - (of - 1) / 2) * width for bar in bars]
    medians = [bar[1] for bar in bars]
    axes.bar(at, medians, width, yerr=[below, above], capsize=3, label=name)


def _figure(width: float, height: float) -> Any:
    """Make an empty figure, in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _plain(text: str) -> str:
    """Return a user's own name, in which a dollar begins no formula."""
    return text.replace("$", r"\$")


def _write(figure: Any, path: Path) -> None:
    figure.suptitle(_plain(figure.get_suptitle()))
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as e:
        raise StartupError(f"--plot {path}: {e}") from None
