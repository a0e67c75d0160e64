"""A workflow of several agents in phases, between which the server restarts.

Each turn is asked over HTTP, streamed. The same turns are played in up to three modes:

- persistent: agentmem as it is, one store over all restarts.
- restart: a server that forgets with its process. Agents are ephemeral: never written, kept in RAM
while it runs. So the first turn of an agent after a restart is prefilled whole. A prefix cache in
RAM, as most servers have, does this.
- cold: nothing is reused at all. Each turn is by an agent of its own, ephemeral, which shares
nothing.

Modes take turns, from one restart to the next, so that a machine that gets slower gets so for all
of them. Each agent sends its own messages so far, as agent frameworks do. What it answered is taken
from the mode that came first, so that all modes read the same text; `same_answer` says whether a
mode's own answer was that one, as an exact cache promises. Answers are greedy, and end where the
model ends them. A phase's wall time is that of its turns; restarts are timed apart.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, cast, get_args

import typer

from ..cli.show import table
from ..errors import StartupError
from .harness.corpus import Prompts
from .harness.options import BenchRun, Passes, Shared, Shown, benchmark
from .harness.server import WARM_UP, BenchError, ChatMessages, Server, TimedAnswer, ask
from .scenario_checks import Said, judge
from .scenario_file import Mode, Scenario, ScenarioPhase, ScenarioTurn, read_scenario
from .scenario_result import (
    PhaseRow,
    PhaseTimes,
    ScenarioResult,
    TurnRow,
    phase_rows,
    totals,
)

Act = Sequence[ScenarioPhase]  # between two restarts


def acts(phases: Sequence[ScenarioPhase]) -> Iterator[Act]:
    starts = [i for i, phase in enumerate(phases) if phase.restart or i == 0]
    for start, end in zip(starts, [*starts[1:], len(phases)], strict=True):
        yield phases[start:end]


@dataclass(frozen=True)
class Cast:
    """The scenario, and the documents of its agents."""

    scenario: Scenario
    documents: dict[str, str]  # by agent, of those that have one

    def system(self, name: str) -> ChatMessages:
        """Return the system message of one agent."""
        text = next(agent.system for agent in self.scenario.agents if agent.name == name)
        if document := self.documents.get(name):
            text = f"{text}\n\n{document}"
        return [{"role": "system", "content": text}]


def cast_of(
    scenario: Scenario, directory: Path, prompts: Prompts, tokens: int | None = None
) -> Cast:
    """Read and cut the documents; `tokens` in place of each `corpus: N`. Raises StartupError."""
    documents = {}
    for agent in scenario.agents:
        if agent.file is not None:
            path = directory / agent.file
            try:
                documents[agent.name] = path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as e:
                raise StartupError(f"the document of {agent.name}: {path}: {e}") from None
        elif agent.corpus is not None:
            documents[agent.name] = prompts.text(tokens or agent.corpus)
        elif agent.document is not None:
            documents[agent.name] = agent.document
    return Cast(scenario, documents)


class Stage:
    """What each agent was told and answered so far."""

    def __init__(self, cast: Cast):
        self._messages = {agent.name: cast.system(agent.name) for agent in cast.scenario.agents}
        self._said: list[tuple[ScenarioPhase, str, str]] = []  # (phase, agent, answer)
        self._heard: dict[str, set[int]] = {name: set() for name in self._messages}

    def prompt(self, phase: ScenarioPhase, turn: ScenarioTurn) -> ChatMessages:
        """Return all that `turn.agent` has, and what it is asked now."""
        heard = self._heard[turn.agent]
        lines = []
        for i, (when, who, text) in enumerate(self._said):
            recent = turn.since == "start" or when is phase
            if who in turn.hear and i not in heard and recent:
                lines.append(f"{who}: {text}")
                heard.add(i)
        content = "\n\n".join([*lines, turn.message])
        self._messages[turn.agent].append({"role": "user", "content": content})
        return list(self._messages[turn.agent])

    def answered(self, phase: ScenarioPhase, turn: ScenarioTurn, text: str) -> None:
        self._messages[turn.agent].append({"role": "assistant", "content": text})
        self._said.append((phase, turn.agent, text))


class Play:
    """One pass in one mode.

    `script` has the answers that all modes go on with, of who was first to come to each turn.
    """

    def __init__(self, cast: Cast, mode: Mode, number: int, script: list[str], *, run: BenchRun):
        """`number` is that of the pass, from 0."""
        self.mode = mode
        self.rows: list[TurnRow] = []
        self._number = number
        self._script = script
        self._run = run
        self._prompts = run.prompts
        self._stage = Stage(cast)
        self._stopping = 0.0  # s that the last server took to stop

    def act(self, phases: Act, times: PhaseTimes, done: Callable[[], None]) -> None:
        """Play what is between two restarts. `done` is called after each turn."""
        settings = self._run.settings
        if self.mode == "cold":
            settings = settings.model_copy(update={"sharing": "agent"})
        home = self._run.session.directory / f"{self.mode}-{self._number}"
        began = time.perf_counter()
        with self._run.server(home, settings) as server:
            if self.rows:
                took = self._stopping + time.perf_counter() - began
                times.restart[self.mode, phases[0].name].append(took)
            server.warm_up(self._prompts.messages(WARM_UP))
            for phase in phases:
                began = time.perf_counter()
                for number, turn in enumerate(phase.turns, start=1):
                    self._turn(server, phase, turn, number)
                    done()
                ended = time.perf_counter()
                times.wall[self.mode, phase.name].append(ended - began)
        self._stopping = time.perf_counter() - ended

    def _turn(self, server: Server, phase: ScenarioPhase, turn: ScenarioTurn, number: int) -> None:
        """Play one turn; `number` is that in its phase."""
        place = len(self.rows)
        back = any(row.agent == turn.agent for row in self.rows)
        messages = self._stage.prompt(phase, turn)
        options: dict[str, Any] = {
            "agent_id": f"{turn.agent}-{place}" if self.mode == "cold" else turn.agent,
            "agentmem": {"ephemeral": self.mode != "persistent"},
        }
        answer = ask(server.client, messages, turn.max_tokens, may_be_empty=True, **options)
        if not back:  # later, the tokens of an answer need not be those that its text has
            self._prompts.check(messages, answer.prompt_tokens)
        if place == len(self._script):
            self._script.append(answer.text)
        said = Said(
            run=self._number,
            mode=self.mode,
            phase=phase.name,
            turn=number,
            agent=turn.agent,
            answer=answer.text,
        )
        row = _row(said, answer, same=answer.text == self._script[place])
        _check_cache(row, back)
        self.rows.append(row)
        self._stage.answered(phase, turn, self._script[place])


def _check_cache(row: TurnRow, back: bool) -> None:
    """Raise BenchError where it isn't what the mode says; `back`: the agent had a turn before."""
    wrong = {
        "cold": row.cached_tokens > 0,
        "restart": row.cache == "warm",
        "persistent": back and row.cache == "cold",
    }
    if wrong[row.mode]:
        raise BenchError(
            f"{row.where}: {row.cache} with {row.cached_tokens} tokens cached, in mode {row.mode}"
        )


def _row(said: Said, answer: TimedAnswer, *, same: bool) -> TurnRow:
    return TurnRow(
        **said.model_dump(),
        cache=answer.details["cache"],
        prompt_tokens=answer.prompt_tokens,
        cached_tokens=answer.cached_tokens,
        prefilled_tokens=answer.prompt_tokens - answer.cached_tokens,
        completion_tokens=answer.usage["completion_tokens"],
        ttft_ms=round(answer.ttft_ms, 2),
        wall_ms=round(answer.total_ms, 2),
        same_answer=same,
    )


def measure(
    run: BenchRun, cast: Cast, modes: Sequence[Mode], *, passes: int, times: PhaseTimes
) -> list[TurnRow]:
    """Play all passes in all modes. Returns their turns; `times` takes the phases'."""
    answers: list[str] = []
    turns: list[TurnRow] = []
    total = passes * len(modes) * cast.scenario.num_turns
    task = run.progress.add_task("turns", total=total)
    for number in range(passes):
        plays = [Play(cast, mode, number, answers, run=run) for mode in modes]
        for act in acts(cast.scenario.phases):
            for play in plays:
                what = f"{play.mode}, {act[0].name}, pass {number + 1}"
                run.progress.update(task, description=what)
                play.act(act, times, lambda: run.progress.advance(task))
                run.session.cool_down()
        for play in plays:
            turns += play.rows
    return turns


def tables(result: ScenarioResult) -> list[Shown]:
    shown: list[Shown] = [
        f"{result.scenario}, {result.model}, passes: {result.passes}. {result.description}"
    ]
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
    shown.append(lines)
    for row in result.rows:
        for other, factor in row.faster_than.items():
            faster = f"{factor.median:.1f}x faster to the first token than {other} (medians)"
            shown.append(f"{row.phase}, {row.mode}: {faster}")
    return [*shown, _totals_table(result), *_said(result)]


def _cells(row: PhaseRow) -> list[str]:
    over = row.over_persistent
    return [
        row.mode,
        ", ".join(f"{n} {cache}" for cache, n in row.cache.items()),
        f"{row.prompt_tokens:,}",
        f"{row.prefilled_tokens:,}",
        f"{row.ttft.ttft_ms:,.0f}",
        f"{row.ttft_mean_ms:,.0f}",
        f"{row.wall_s.median:,.1f}",
        f"{over.mean:.1f}x" if over else "",
    ]


def _totals_table(result: ScenarioResult) -> Shown:
    lines = table("in all", "prompt", "prefilled", "wall s", "restarts s", "persistent saves")
    for total in result.totals:
        saves = total.persistent_saves
        lines.add_row(
            total.mode,
            f"{total.prompt_tokens:,}",
            f"{total.prefilled_tokens:,}",
            f"{total.wall_s.median:,.1f}",
            f"{total.restart_s.median:,.1f}",
            "--" if saves is None else f"{saves:.0%}",
        )
    return lines


def _said(result: ScenarioResult) -> list[Shown]:
    """Tell of the answers."""
    others = sum(not turn.same_answer for turn in result.turns)
    shown: list[Shown] = ["All answers equal."]
    if not result.answers_equal:
        shown = [f"{others} answers differ from the first's."]
    for check in result.checks:
        line = f"{check.passed} of {check.of} {check.mode}: {check.check}"
        if check.failed:
            line += f"; not {', '.join(check.failed[:4])}"
        if len(check.failed) > 4:
            line += " ..."
        shown.append(line)
    return shown


NameOrFile = Annotated[
    str, typer.Argument(help="prisoner, routing, or a YAML file", show_default=False)
]
Compare = Annotated[
    str | None,
    typer.Option(help="of persistent, restart and cold, comma-separated (default: the scenario's)"),
]
Tokens = Annotated[
    int | None, typer.Option(min=16, help="of each document that is cut from the corpus")
]


@benchmark(tables)
def scenario(
    shared: Shared,
    name: NameOrFile,
    compare: Compare = None,
    tokens: Tokens = None,
    passes: Passes = 1,
) -> ScenarioResult:
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
    script, directory = read_scenario(name)
    modes = _modes(compare) if compare else script.compare
    if tokens and not any(agent.corpus for agent in script.agents):
        raise StartupError(f"--tokens {tokens}: no agent of {name} has a document from the corpus")
    with shared.run() as run:
        cast = cast_of(script, directory, run.prompts, tokens)
        times = PhaseTimes()
        turns = measure(run, cast, modes, passes=passes, times=times)
        return ScenarioResult(
            scenario=name,
            description=script.description,
            modes=modes,
            rows=phase_rows(script, modes, turns, times),
            totals=totals(modes, turns, times),
            answers_equal=all(turn.same_answer for turn in turns),
            checks=judge(script, cast.documents, turns),
            turns=turns,
            **run.head(passes),
        )


def _modes(text: str) -> list[Mode]:
    """Return the modes in an option's text, each once. Raises StartupError."""
    known = get_args(Mode)
    names = [part.strip() for part in text.split(",")]
    if not set(names) <= set(known) or len(set(names)) < len(names):
        raise StartupError(f"--compare {text}: choose from {', '.join(known)}, each once")
    return cast(list[Mode], names)
