"""What an agent has after its server was stopped, or killed.

Measured are the time to the first token, tokens lost, and whether the answer is the same. Over
HTTP, streamed: a server answers a new prompt and ends, by SIGTERM, by SIGKILL some seconds after
the answer, or by SIGKILL at once; the next one on the same store is asked the same prompt. Each
ending in each pass has a store and a prompt of its own. Lost are the tokens that the second server
prefills again, but for the last, which always is.
"""

import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import typer

from ..cli.show import table
from .harness.options import BenchRun, Passes, Shared, Shown, benchmark
from .harness.result import Result, ResultPart, Spread, Ttft, spread, ttft
from .harness.server import WARM_UP, check_state

Ending = Literal["stop", "kill after rest", "kill at once"]
ENDINGS: tuple[Ending, ...] = ("stop", "kill after rest", "kill at once")
_ANSWER = 16  # tokens
_REST = 2.0  # s, besides the server's tail_delay


class PersistenceRow(ResultPart):
    # stop: SIGTERM; kill: SIGKILL, tail_delay and 2 s after the answer or right after its last
    # token
    ending: Ending
    prompt_tokens: int
    cold: Ttft
    restarted: Ttft  # the same prompt to the next server
    cached_tokens: Spread
    lost_tokens: Spread  # prefilled again, besides the last one, which always is
    ready_s: Spread  # from starting the next server to its readiness, the model's loading included
    same_answers: bool  # as the server before said to the same prompt


class PersistenceResult(Result):
    benchmark: Literal["persistence"] = "persistence"
    rows: list[PersistenceRow]


def measure(
    run: BenchRun, context: int, passes: int, done: Callable[[], None]
) -> list[PersistenceRow]:
    """Measure each ending in each pass. `done` is told of each of passes x ENDINGS."""
    found: dict[Ending, list[_Life]] = {ending: [] for ending in ENDINGS}
    for number in range(passes):
        for ending in ENDINGS:
            home = run.session.directory / f"{ending.replace(' ', '-')}-{number}"
            found[ending].append(_live(run, home, context, ending))
            done()
        run.session.cool_down()
    return [_row(ending, lives) for ending, lives in found.items()]


class _Life(ResultPart):
    prompt_tokens: int
    cold_ms: float
    restarted_ms: float
    cached_tokens: int
    ready_s: float
    same_answer: bool


def _live(run: BenchRun, home: Path, context: int, ending: Ending) -> _Life:
    prompts = run.prompts
    messages = prompts.messages(context)
    with run.server(home) as server:
        server.ask("warm-up", prompts.messages(WARM_UP), 2)
        cold = server.ask("agent", messages, _ANSWER)
        check_state(cold, "cold")
        prompts.check(messages, cold.prompt_tokens)
        if ending == "kill after rest":
            time.sleep(run.settings.tail_delay + _REST)
        server.stop(signal.SIGTERM if ending == "stop" else signal.SIGKILL)
    began = time.perf_counter()
    with run.server(home) as server:
        ready_s = time.perf_counter() - began
        server.warm_up(prompts.messages(WARM_UP))
        again = server.ask("agent", messages, _ANSWER)
    return _Life(
        prompt_tokens=cold.prompt_tokens,
        cold_ms=cold.ttft_ms,
        restarted_ms=again.ttft_ms,
        cached_tokens=again.cached_tokens,
        ready_s=ready_s,
        same_answer=again.text == cold.text,
    )


def _row(ending: Ending, lives: list[_Life]) -> PersistenceRow:
    return PersistenceRow(
        ending=ending,
        prompt_tokens=max(life.prompt_tokens for life in lives),
        cold=ttft([life.cold_ms for life in lives]),
        restarted=ttft([life.restarted_ms for life in lives]),
        cached_tokens=spread([life.cached_tokens for life in lives]),
        lost_tokens=spread([life.prompt_tokens - 1 - life.cached_tokens for life in lives]),
        ready_s=spread([life.ready_s for life in lives]),
        same_answers=all(life.same_answer for life in lives),
    )


def tables(result: PersistenceResult) -> list[Shown]:
    lines = table(
        "ending",
        "cold ms",
        "restarted ms",
        "cold/restarted",
        "lost tokens",
        "same answers",
        "ready s",
    )
    for row in result.rows:
        lines.add_row(
            row.ending,
            f"{row.cold.ttft_ms:,.0f}",
            f"{row.restarted.ttft_ms:,.0f}",
            f"{row.cold.ttft_ms / row.restarted.ttft_ms:.1f}x",
            f"{row.lost_tokens.median:,.0f}",
            "yes" if row.same_answers else "no",
            f"{row.ready_s.median:.1f}",
        )
    tokens = f"{result.rows[0].prompt_tokens:,} tokens"
    title = f"An agent of {tokens}, {result.model}, medians of {result.passes} passes"
    return [title, lines]


@benchmark(tables)
def persistence(
    shared: Shared,
    context: Annotated[int, typer.Option(min=64, help="prompt tokens")] = 2000,
    passes: Passes = 3,
) -> PersistenceResult:
    """What an agent still has after its server was stopped, killed at rest, or killed right after
    an answer.

    JSON: {"rows": [{"ending", "cold": {"ttft_ms"}, "restarted": {"ttft_ms"}, "lost_tokens",
    "same_answers", ...}]}.
    """
    with shared.run() as run:
        done = run.task("stopping and killing", passes * len(ENDINGS))
        rows = measure(run, context, passes, done)
        return PersistenceResult(rows=rows, **run.head(passes))
