"""Results as pictures. matplotlib is an optional dependency, imported only here."""

import importlib.util
from pathlib import Path
from typing import Any

from ..errors import StartupError


def check_plot(path: Path) -> None:
    """Raises StartupError where matplotlib can't draw it: with the command that installs it, with
    the formats.
    """
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise StartupError(f"--plot {path}: its name must end in .png, .svg or .pdf")
    if importlib.util.find_spec("matplotlib") is None:
        raise StartupError("--plot needs matplotlib: pip install 'agentmem[bench]'")


def plot_perplexity(result: dict[str, Any], path: Path) -> None:
    """Cost in quality over size, one point a preset: dPPL with its interval, and KL on a
    logarithmic axis.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    change, divergence = figure.subplots(1, 2)
    rows = [row for row in result["presets"] if row["kv_bits"] != "16" and row["ppl"] is not None]
    for row in rows:
        low, high = row["delta_ci95_percent"] or (row["delta_percent"],) * 2
        errors = [[row["delta_percent"] - low], [high - row["delta_percent"]]]
        change.errorbar(row["ratio_to_fp16"], row["delta_percent"], yerr=errors, fmt="o", capsize=4)
        divergence.plot(row["ratio_to_fp16"], row["kl"], "o")
        for axes, y in ((change, row["delta_percent"]), (divergence, row["kl"])):
            axes.annotate(
                row["kv_bits"], (row["ratio_to_fp16"], y), xytext=(8, 4), textcoords="offset points"
            )
    change.axhline(0, color="grey", linewidth=0.8)
    change.set_ylabel("change of perplexity, %, with its 95 % interval")
    if any(row["kl"] > 0 for row in rows):
        divergence.set_yscale("log")
    divergence.set_ylabel("KL divergence from 16 bits, nats a token")
    for axes in (change, divergence):
        axes.margins(0.15)
        axes.set_xlabel("size of a sealed token over FP16")
    figure.suptitle(
        f"{result['model']}, {result['corpus']}: {result['tokens']:,} tokens, windows of {result['window']:,}"
    )
    _write(figure, path)


def plot_ttft(result: dict[str, Any], path: Path) -> None:
    """Time to first token over context, a line for each state with its range, both axes
    logarithmic.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    contexts = [row["context"] for row in result["rows"]]
    for state in ("cold", "warm", "hot"):
        cells = [row[state] for row in result["rows"]]
        axes.plot(contexts, [cell["ttft_ms"] for cell in cells], "o-", label=state)
        axes.fill_between(
            contexts, [c["min_ms"] for c in cells], [c["max_ms"] for c in cells], alpha=0.2
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(contexts, [f"{n:,}" for n in contexts])
    axes.set_xlabel("prompt tokens")
    axes.set_ylabel("ms to the first token, over HTTP")
    axes.legend()
    figure.suptitle(
        f"{result['model']}: time to first token, medians of {result['passes']} passes, and their range"
    )
    _write(figure, path)


def plot_scenario(result: dict[str, Any], path: Path) -> None:
    """Time to first token turn by turn of the first pass, a line for each mode; and wall time by
    phase.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.5), layout="constrained")
    by_turn, by_phase = figure.subplots(1, 2, width_ratios=[2, 1])
    phases = list(dict.fromkeys(_plain(row["phase"]) for row in result["rows"]))
    width = 0.8 / len(result["modes"])
    for i, mode in enumerate(result["modes"]):
        turns = [turn for turn in result["turns"] if turn["mode"] == mode and turn["run"] == 0]
        by_turn.plot(
            range(1, len(turns) + 1), [turn["ttft_ms"] for turn in turns], "o-", label=mode
        )
        walls = [row["wall_s"]["median"] for row in result["rows"] if row["mode"] == mode]
        by_phase.bar([x + i * width for x in range(len(phases))], walls, width, label=mode)
    at = 0.5
    for row in (row for row in result["rows"] if row["mode"] == result["modes"][0]):
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
    by_phase.set_xticks(
        [x + 0.4 - width / 2 for x in range(len(phases))], phases, rotation=30, ha="right"
    )
    by_phase.set_ylabel("wall time, s")
    figure.suptitle(f"{result['scenario']}, {result['model']}")
    _write(figure, path)


def plot_throughput(result: dict[str, Any], path: Path) -> None:
    """Tokens/s over agents at once, by state: while all stream, and end to end."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    titles = {
        "tokens_per_s": "while all of them stream",
        "end_to_end_tokens_per_s": "prefill and restore included",
    }
    for axes, (name, title) in zip(panels, titles.items(), strict=True):
        for state in ("cold", "warm", "hot"):
            cells = [
                (row["agents"], row[state][name]) for row in result["rows"] if row[state][name]
            ]
            agents = [n for n, _ in cells]
            axes.plot(agents, [of["median"] for _, of in cells], "o-", label=state)
            axes.fill_between(
                agents, [of["min"] for _, of in cells], [of["max"] for _, of in cells], alpha=0.2
            )
        axes.set_xticks([row["agents"] for row in result["rows"]])
        axes.set_xlabel("agents at once")
        axes.set_title(title)
    panels[0].set_ylabel("tokens/s over all agents, over HTTP")
    panels[0].set_ylim(bottom=0)
    panels[0].legend()
    figure.suptitle(
        f"{result['model']}: {result['context']:,} tokens each, medians of {result['passes']} passes"
    )
    _write(figure, path)


def plot_staggered(result: dict[str, Any], path: Path) -> None:
    """When each agent asked, and when its tokens came, in the last pass."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 0.5 * len(result["timeline"]) + 1.5), layout="constrained")
    axes = figure.subplots()
    for i, line in enumerate(result["timeline"]):
        first, last = line["tokens_s"][0], line["tokens_s"][-1]
        axes.plot(
            [line["asked_s"], first], [i, i], color="lightgrey", linewidth=6, solid_capstyle="butt"
        )
        axes.plot([first, last], [i, i], color="C0", linewidth=1)
        axes.plot(line["tokens_s"], [i] * len(line["tokens_s"]), "|", color="C0", markersize=12)
    axes.set_yticks(range(len(result["timeline"])), [line["agent"] for line in result["timeline"]])
    axes.invert_yaxis()
    axes.set_xlabel("s; grey: waits for its first token; strokes: tokens")
    figure.suptitle(
        f"{result['model']}: A prefills {result['context']:,} tokens while C answers and others come back"
    )
    _write(figure, path)


def _plain(text: str) -> str:
    """A user's own name, in which a dollar begins no formula."""
    return text.replace("$", r"\$")


def _write(figure: Any, path: Path) -> None:
    figure.suptitle(_plain(figure.get_suptitle()))
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as e:
        raise StartupError(f"--plot {path}: {e}") from None


def plot_write(result: dict[str, Any], path: Path) -> None:
    """Bytes written so far over tokens so far, beside the line of what is kept in the end."""
    from itertools import accumulate

    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    tokens = list(accumulate(row["tokens"] for row in result["rows"]))
    written = [nbytes / 1e6 for nbytes in accumulate(row["bytes"] for row in result["rows"])]
    # the end of the line is what the server writes when it stops
    axes.step(
        [*tokens, tokens[-1]],
        [*written, result["written_bytes"] / 1e6],
        where="post",
        label="written by then",
    )
    axes.plot(
        [0, tokens[-1]],
        [0, result["kept_bytes"] / 1e6],
        "--",
        color="grey",
        label="kept in the end",
    )
    axes.set_xlabel("tokens of the conversation")
    axes.set_ylabel("MB of block and tail files")
    axes.legend()
    figure.suptitle(
        f"{result['model']}: {result['amplification']:.2f} bytes written for each that is kept"
    )
    _write(figure, path)


def plot_compare(result: dict[str, Any], path: Path) -> None:
    """Bars by server: time to first token in each state, on a logarithmic axis, and tokens/s;
    whiskers are ranges.
    """
    from matplotlib.figure import Figure

    names, contexts = (
        [about["name"] for about in result["servers"]],
        sorted({r["context"] for r in result["rows"]}),
    )
    figure = Figure(figsize=(4.5 * (len(contexts) + 1), 4.5), layout="constrained")
    *times, speed = figure.subplots(1, len(contexts) + 1)
    states = ("cold", "second_turn", "after_restart", "resumed")
    for axes, context in zip(times, contexts, strict=True):
        rows = {row["server"]: row for row in result["rows"] if row["context"] == context}
        for i, name in enumerate(names):
            cells = [(x, rows[name][state]) for x, state in enumerate(states) if rows[name][state]]
            bars = [(x, cell["ttft_ms"], cell["min_ms"], cell["max_ms"]) for x, cell in cells]
            _bars(axes, bars, name, i, len(names))
        axes.set_yscale("log")
        axes.set_xticks(range(len(states)), [state.replace("_", "\n") for state in states])
        axes.set_title(f"{context:,} tokens: ms to the first one")
    for i, name in enumerate(names):
        found = [row["tokens_per_s"] for row in result["decode"] if row["server"] == name]
        _bars(
            speed,
            [(x, s["median"], s["min"], s["max"]) for x, s in enumerate(found)],
            name,
            i,
            len(names),
        )
    decoded = [row for row in result["decode"] if row["server"] == names[0]]
    labels = [f"{row['batch']} at once,\n{row['context']:,} each" for row in decoded]
    speed.set_xticks(range(len(labels)), labels)
    speed.set_title("decoded tokens/s")
    speed.legend()
    figure.suptitle(f"{result['model']}, medians of {result['passes']} passes, and their range")
    _write(figure, path)


def _bars(
    axes: Any, bars: list[tuple[int, float, float, float]], name: str, i: int, of: int
) -> None:
    """(place, median, min, max) of the `i`th of several that stand beside each other."""
    width = 0.8 / of
    errors = [
        [median - low for _, median, low, _ in bars],
        [high - median for _, median, _, high in bars],
    ]
    at = [x + (i - (of - 1) / 2) * width for x, *_ in bars]
    axes.bar(at, [median for _, median, *_ in bars], width, yerr=errors, capsize=3, label=name)
