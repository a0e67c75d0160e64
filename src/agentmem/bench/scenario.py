"""A workflow of several agents in phases, between which the server restarts; over HTTP, streamed,
turn by turn.

The same turns in up to three modes:

- persistent: agentmem as it is, one store over all restarts.
- restart: a server that forgets with its process. Agents are ephemeral: never written, kept in RAM
while it runs. So
  the first turn of an agent after a restart is prefilled whole. A prefix cache in RAM, as most servers have, does this.
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
from typing import Any

from ..config import Settings
from ..errors import StartupError
from .prompts import Prompts
from .scenario_checks import Said, judge
from .scenario_file import Mode, Phase, Scenario, Turn
from .scenario_result import ScenarioResult, Times, TurnRow, phase_rows, totals
from .server import WARM_UP, Answer, BenchError, Messages, Server, ask
from .session import Session

Act = Sequence[Phase]  # between two restarts


def acts(phases: Sequence[Phase]) -> Iterator[Act]:
    starts = [i for i, phase in enumerate(phases) if phase.restart or i == 0]
    for start, end in zip(starts, [*starts[1:], len(phases)], strict=True):
        yield phases[start:end]


@dataclass(frozen=True)
class Cast:
    scenario: Scenario
    documents: dict[str, str]  # by agent, of those that have one

    def system(self, name: str) -> Messages:
        text = next(agent.system for agent in self.scenario.agents if agent.name == name)
        return [
            {
                "role": "system",
                "content": "\n\n".join(filter(None, (text, self.documents.get(name)))),
            }
        ]


def cast_of(
    scenario: Scenario, directory: Path, prompts: Prompts, tokens: int | None = None
) -> Cast:
    """Read and cut the documents; `tokens` in place of each `corpus: N`. Raises StartupError."""
    documents = {}
    for agent in scenario.agents:
        if agent.file is not None:
            try:
                documents[agent.name] = (directory / agent.file).read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as e:
                raise StartupError(
                    f"the document of {agent.name}: {directory / agent.file}: {e}"
                ) from None
        elif agent.corpus is not None:
            documents[agent.name] = prompts.text(tokens or agent.corpus)
        elif agent.document is not None:
            documents[agent.name] = agent.document
    return Cast(scenario, documents)


class Stage:
    """What each agent was told and answered so far."""

    def __init__(self, cast: Cast):
        self._messages = {agent.name: cast.system(agent.name) for agent in cast.scenario.agents}
        self._said: list[tuple[Phase, str, str]] = []  # (phase, agent, answer)
        self._heard: dict[str, set[int]] = {name: set() for name in self._messages}

    def prompt(self, phase: Phase, turn: Turn) -> Messages:
        """All that `turn.agent` has, and what it is asked now."""
        heard, lines = self._heard[turn.agent], []
        for i, (when, who, text) in enumerate(self._said):
            if who in turn.hear and i not in heard and (turn.since == "start" or when is phase):
                lines.append(f"{who}: {text}")
                heard.add(i)
        self._messages[turn.agent].append(
            {"role": "user", "content": "\n\n".join([*lines, turn.message])}
        )
        return list(self._messages[turn.agent])

    def answered(self, phase: Phase, turn: Turn, text: str) -> None:
        self._messages[turn.agent].append({"role": "assistant", "content": text})
        self._said.append((phase, turn.agent, text))


class Play:
    """One pass in one mode. `script`: the answers that all modes go on with, of who was first to
    come to each turn.
    """

    def __init__(self, cast: Cast, mode: Mode, run: int, script: list[str], prompts: Prompts):
        self.mode = mode
        self.rows: list[TurnRow] = []
        self._run, self._prompts, self._script = run, prompts, script
        self._stage = Stage(cast)
        self._stopping = 0.0  # s that the last server took to stop

    def act(
        self,
        phases: Act,
        session: Session,
        settings: Settings,
        model: Path,
        times: Times,
        done: Callable[[], None],
    ) -> None:
        """`done` is called after each turn."""
        if self.mode == "cold":
            settings = settings.model_copy(update={"sharing": "agent"})
        began = time.perf_counter()
        with Server(
            session, settings, model, session.directory / f"{self.mode}-{self._run}"
        ) as server:
            if self.rows:
                times.restart[self.mode, phases[0].name].append(
                    self._stopping + time.perf_counter() - began
                )
            server.warm_up(self._prompts.messages(WARM_UP))
            for phase in phases:
                began = time.perf_counter()
                for number, turn in enumerate(phase.turns, start=1):
                    self._turn(server, phase, turn, number)
                    done()
                ended = time.perf_counter()
                times.wall[self.mode, phase.name].append(ended - began)
        self._stopping = time.perf_counter() - ended

    def _turn(self, server: Server, phase: Phase, turn: Turn, number: int) -> None:
        """`number`: of the turn in its phase."""
        place, back = len(self.rows), any(row.agent == turn.agent for row in self.rows)
        messages = self._stage.prompt(phase, turn)
        agent = f"{turn.agent}-{place}" if self.mode == "cold" else turn.agent
        options: dict[str, Any] = {
            "agent_id": agent,
            "agentmem": {"ephemeral": self.mode != "persistent"},
        }
        answer = ask(server.client, messages, turn.max_tokens, may_be_empty=True, **options)
        if not back:  # later, the tokens of an answer need not be those that its text has
            self._prompts.check(messages, answer.prompt_tokens)
        if place == len(self._script):
            self._script.append(answer.text)
        said = Said(
            run=self._run,
            mode=self.mode,
            phase=phase.name,
            turn=number,
            agent=turn.agent,
            answer=answer.text,
        )
        row = _row(said, answer, answer.text == self._script[place])
        _check_cache(row, back)
        self.rows.append(row)
        self._stage.answered(phase, turn, self._script[place])


def _check_cache(row: TurnRow, back: bool) -> None:
    """Raises BenchError where it isn't what the mode says; `back`: the agent had a turn before."""
    wrong = {
        "cold": row.cached_tokens > 0,
        "restart": row.cache == "warm",
        "persistent": back and row.cache == "cold",
    }
    if wrong[row.mode]:
        raise BenchError(
            f"{row.where}: {row.cache} with {row.cached_tokens} tokens cached, in mode {row.mode}"
        )


def _row(said: Said, answer: Answer, same: bool) -> TurnRow:
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


def result_of(
    name: str,
    cast: Cast,
    modes: Sequence[Mode],
    turns: Sequence[TurnRow],
    times: Times,
    head: dict[str, Any],
) -> ScenarioResult:
    """`head`: of the run."""
    return ScenarioResult(
        scenario=name,
        description=cast.scenario.description,
        modes=list(modes),
        rows=phase_rows(cast.scenario, modes, turns, times),
        totals=totals(modes, turns, times),
        answers_equal=all(turn.same_answer for turn in turns),
        checks=judge(cast.scenario, cast.documents, turns),
        turns=list(turns),
        **head,
    )
