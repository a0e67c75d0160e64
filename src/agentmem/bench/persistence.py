"""What an agent has after its server was stopped, or killed: time to the first token, tokens lost,
the same answer.

Over HTTP, streamed: a server answers a new prompt and ends, by SIGTERM, by SIGKILL some seconds
after the answer, or by SIGKILL at once; the next one on the same store is asked the same prompt.
Each ending in each pass has a store and a prompt of its own. Lost are the tokens that the second
server prefills again, but for the last, which always is.
"""

import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from ..config import Settings
from .prompts import Prompts
from .result import Part, Result, Spread, Ttft, spread, ttft
from .server import WARM_UP, Server, check_state
from .session import Session

Ending = Literal["stop", "kill after rest", "kill at once"]
ENDINGS: tuple[Ending, ...] = ("stop", "kill after rest", "kill at once")
_ANSWER = 16  # tokens
_REST = 2.0  # s, besides the server's tail_delay


class PersistenceRow(Part):
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
    session: Session,
    settings: Settings,
    model: Path,
    prompts: Prompts,
    context: int,
    passes: int,
    done: Callable[[], None],
) -> list[PersistenceRow]:
    """`done` is told of each of passes x ENDINGS."""
    found: dict[Ending, list[_Life]] = {ending: [] for ending in ENDINGS}
    for number in range(passes):
        for ending in ENDINGS:
            home = session.directory / f"{ending.replace(' ', '-')}-{number}"
            found[ending].append(_live(session, settings, model, home, prompts, context, ending))
            done()
        session.cool_down()
    return [_row(ending, lives) for ending, lives in found.items()]


class _Life(Part):
    prompt_tokens: int
    cold_ms: float
    restarted_ms: float
    cached_tokens: int
    ready_s: float
    same_answer: bool


def _live(
    session: Session,
    settings: Settings,
    model: Path,
    home: Path,
    prompts: Prompts,
    context: int,
    ending: Ending,
) -> _Life:
    messages = prompts.messages(context)
    with Server(session, settings, model, home) as server:
        server.ask("warm-up", prompts.messages(WARM_UP), 2)
        cold = server.ask("agent", messages, _ANSWER)
        check_state(cold, "cold")
        prompts.check(messages, cold.prompt_tokens)
        if ending == "kill after rest":
            time.sleep(settings.tail_delay + _REST)
        server.stop(signal.SIGTERM if ending == "stop" else signal.SIGKILL)
    began = time.perf_counter()
    with Server(session, settings, model, home) as server:
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
