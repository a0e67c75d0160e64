"""`agentmem bench scenario`: a workflow of several agents, with persistent caches and without."""

from itertools import product
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from ..cli.agents import table
from ..errors import StartupError
from .common import Passes, Shared, Shown, benchmark

if TYPE_CHECKING:
    from ..bench.scenario_file import Mode
    from ..bench.scenario_result import PhaseRow, ScenarioResult

Name = Annotated[str, typer.Argument(help="prisoner, routing, or a YAML file", show_default=False)]
Compare = Annotated[
    str | None,
    typer.Option(help="of persistent, restart and cold, comma-separated (default: the scenario's)"),
]
Tokens = Annotated[
    int | None, typer.Option(min=16, help="of each document that is cut from the corpus")
]


@benchmark
def scenario(
    shared: Shared,
    name: Name,
    compare: Compare = None,
    tokens: Tokens = None,
    passes: Passes = 1,
) -> "ScenarioResult":
    """Agents that work in phases, between which the server restarts.

    persistent: agentmem as it is. restart: a server that keeps caches in RAM and loses them with
    its process. cold: each turn is prefilled whole. Turns and texts are the same in all; time to
    first token is the client's, streamed.

    prisoner: a prisoner's dilemma, 4 agents, 25 turns in 5 phases. routing: 10 experts with an
    article each, primed, asked after a restart, asked again. How to write one:
    benchmarks/scenarios/README.md.

    JSON: {"rows": [{"phase": .., "mode": .., "ttft": {..}, "wall_s": {..}, "prefilled_tokens": ..},
    ...], "totals": [..], "answers_equal": true, "checks": [..], "turns": [..]}; the whole is in
    benchmarks/schemas/scenario.json.
    """
    from ..bench.scenario_file import read_scenario

    script, directory = read_scenario(name)
    modes = _modes(compare) if compare else script.compare
    if tokens and not any(agent.corpus for agent in script.agents):
        raise StartupError(f"--tokens {tokens}: no agent of {name} has a document from the corpus")
    with shared.run() as run:
        from ..bench import scenario as bench
        from ..bench.scenario_result import Times, TurnRow

        prompts = run.prompts()
        cast = bench.cast_of(script, directory, prompts, tokens)
        times, answers = Times(), list[str]()
        turns = list[TurnRow]()
        task = run.progress.add_task("turns", total=passes * len(modes) * script.num_turns)
        for number in range(passes):
            plays = [bench.Play(cast, mode, number, answers, prompts) for mode in modes]
            for act, play in product(bench.acts(script.phases), plays):
                run.progress.update(
                    task, description=f"{play.mode}, {act[0].name}, pass {number + 1}"
                )
                play.act(
                    act,
                    run.session,
                    run.settings,
                    run.model,
                    times,
                    lambda: run.progress.advance(task),
                )
                run.session.cool_down()
            turns += [row for play in plays for row in play.rows]
        return bench.result_of(name, cast, modes, turns, times, run.head(passes))


def _modes(text: str) -> "list[Mode]":
    from ..bench.scenario_file import Mode

    modes: list[Mode] = [
        mode for part in text.split(",") for mode in get_args(Mode) if mode == part.strip()
    ]
    if len(modes) < len(text.split(",")) or len(set(modes)) < len(modes):
        raise StartupError(f"--compare {text}: choose from {', '.join(get_args(Mode))}, each once")
    return modes


def tables(result: "ScenarioResult") -> list[Shown]:
    lines = table(
        "phase",
        "mode",
        "turns by cache",
        "prompt",
        "prefilled",
        "TTFT ms",
        "mean ms",
        "wall s",
        "mean/persistent",
        left=3,
    )
    for row in result.rows:
        lines.add_row(row.phase if row.mode == result.modes[0] else "", *_cells(row))
    shown: list[Shown] = [
        f"{result.scenario}, {result.model}, passes: {result.passes}. {result.description}",
        lines,
        *(
            f"{row.phase}, {row.mode}: {factor.median:.1f}x faster to the first token than {other} (medians)"
            for row in result.rows
            for other, factor in row.faster_than.items()
        ),
    ]
    lines = table("in all", "prompt", "prefilled", "wall s", "restarts s", "persistent saves")
    for total in result.totals:
        saves = "--" if total.persistent_saves is None else f"{total.persistent_saves:.0%}"
        times = (f"{total.wall_s.median:,.1f}", f"{total.restart_s.median:,.1f}")
        lines.add_row(
            total.mode, f"{total.prompt_tokens:,}", f"{total.prefilled_tokens:,}", *times, saves
        )
    return [*shown, lines, *_said(result)]


def _said(result: "ScenarioResult") -> list[Shown]:
    """About the answers."""
    others = sum(not turn.same_answer for turn in result.turns)
    shown: list[Shown] = [
        "All answers equal."
        if result.answers_equal
        else f"{others} answers differ from the first's."
    ]
    for check in result.checks:
        failed = f"; not {', '.join(check.failed[:4])}" + (" ..." if len(check.failed) > 4 else "")
        shown.append(
            f"{check.passed} of {check.of} {check.mode}: {check.check}{failed if check.failed else ''}"
        )
    return shown


def _cells(row: "PhaseRow") -> list[str]:
    caches = ", ".join(f"{n} {cache}" for cache, n in row.cache.items())
    counts = [f"{row.prompt_tokens:,}", f"{row.prefilled_tokens:,}"]
    times = [f"{row.ttft.ttft_ms:,.0f}", f"{row.ttft_mean_ms:,.0f}", f"{row.wall_s.median:,.1f}"]
    over = row.over_persistent
    return [row.mode, caches, *counts, *times, f"{over.mean:.1f}x" if over else ""]
