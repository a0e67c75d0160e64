"""Agents that arrive while others work, over HTTP.

Meanwhile: C answers throughout, A prefills a long cold prompt, B's come back from disk one after
the other. How long each B waits for its first token, beside alone; how much later A is done than
without them; and the gaps between C's tokens while A prefills, the longest of which are one prefill
chunk of A and a decode step.

Pair: the paper's staggered arrivals. Two agents of one cold prompt each, the second 2 s after the
first, beside one after the other.
"""

import itertools
import statistics
import threading
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ..config import Settings
from .prompts import Prompts
from .result import Part, Result, Spread, Ttft, spread, ttft
from .server import WARM_UP, Answer, BenchError, Server, check_state, stream
from .session import Session

B_CONTEXT = 500  # tokens
ROUNDS = 6  # of each pass, as `done` counts them
_NUM_B = 5
_DELAY = 2.0  # s between the two of a pair
_ANSWER = 4  # tokens, of A and B's
_PAIR_ANSWER = 64
_C_CONTEXT, _C_ANSWER = 64, 2048  # C's answer is cut before its end


class Gaps(Part):
    """ms between two tokens, of all passes."""

    median: float
    p99: float
    max: float
    count: int


class Meanwhile(Part):
    b: Ttft  # of those that came before A's first token
    b_alone: Ttft
    b_over_alone: float
    a_finish_ms: Spread
    a_finish_without_b_ms: Spread  # C answers here too
    a_delay: float  # of medians, as a share
    c_gap_ms: Gaps  # while A prefills and B's come
    c_gap_alone_ms: Gaps


class Pair(Part):
    wall_ms: Spread
    sequential_wall_ms: Spread
    wall_ratio: float
    first: Ttft
    second: Ttft
    sequential: Ttft  # of both
    second_over_sequential: float


class Line(Part):
    """One agent in the last pass; s after A's request."""

    agent: str
    asked_s: float
    tokens_s: list[float]


class StaggeredResult(Result):
    benchmark: Literal["staggered"] = "staggered"
    context: int  # tokens of A's prompt, and of each of the pair
    b_context: int
    meanwhile: Meanwhile
    pair: Pair
    timeline: list[Line]


@dataclass
class Samples:
    """ms."""

    b: list[float] = field(default_factory=list)
    b_alone: list[float] = field(default_factory=list)
    a: list[float] = field(default_factory=list)
    a_without_b: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    gaps_alone: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    sequential_wall: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    second: list[float] = field(default_factory=list)
    sequential: list[float] = field(default_factory=list)
    timeline: list[Line] = field(default_factory=list)


def measure(
    session: Session,
    settings: Settings,
    model: Path,
    prompts: Prompts,
    context: int,
    limit: int,
    passes: int,
    done: Callable[[], None],
) -> Samples:
    """`limit`: the model's context. `done` is told of each of passes x ROUNDS."""
    samples = Samples()
    with Server(session, settings, model, session.directory / "staggered") as server:
        server.warm_up(prompts.messages(WARM_UP))
        scene = _Scene(server, prompts, context, min(_C_ANSWER, limit - _C_CONTEXT), samples, done)
        for _ in range(passes):
            scene.alone()
            scene.meanwhile()
            scene.pair()
            session.cool_down()
    if not samples.b:
        raise BenchError("A's prompt was prefilled before any B came: ask for a longer --context")
    return samples


class _Scene:
    """B's and C are the same agents in every pass; the others have new prompts and are forgotten
    after each round.
    """

    def __init__(
        self,
        server: Server,
        prompts: Prompts,
        context: int,
        c_answer: int,
        samples: Samples,
        done: Callable[[], None],
    ):
        self._server, self._prompts, self._context, self._c_answer = (
            server,
            prompts,
            context,
            c_answer,
        )
        self._samples, self._done = samples, done
        self._bs = {f"b{i}": prompts.messages(B_CONTEXT) for i in range(1, _NUM_B + 1)}
        self._c = prompts.messages(_C_CONTEXT)
        for agent, messages in self._bs.items():
            check_state(server.ask(agent, messages, _ANSWER), "cold")
        server.ask("c", self._c, _ANSWER)

    def alone(self) -> None:
        self._evict()
        self._samples.b_alone += [self._b(agent).ttft_ms for agent in self._bs]
        answer = self._server.ask("c", self._c, _PAIR_ANSWER)
        self._samples.gaps_alone += gaps_ms(answer, answer.began, _ended(answer))
        self._done()

    def meanwhile(self) -> None:
        """Without B's first: that tells how long A takes, through which they are to come."""
        samples = self._samples
        a, _, _ = self._round(spacing=None)
        samples.a_without_b.append(a.total_ms)
        self._evict()
        a, bs, c = self._round(a.ttft_ms / 1e3 / (_NUM_B + 1))
        samples.a.append(a.total_ms)
        first_token = a.began + a.times[0]
        samples.b += [b.ttft_ms for b in bs if b.began < first_token]
        samples.gaps += gaps_ms(c, a.began, first_token)
        lines = {"C": c, "A": a} | {f"B{i}": b for i, b in enumerate(bs, 1)}
        samples.timeline = [_line(name, of, a.began) for name, of in lines.items()]

    def _round(self, spacing: float | None) -> tuple[Answer, list[Answer], Answer]:
        """The answers of A, of the B's, so many s apart (None: there are none), and of C."""
        messages, bs = self._prompts.messages(self._context), []
        talks, enough = threading.Event(), threading.Event()
        with self._server.threads() as pool:
            c = pool.submit(self._talk, talks, enough)
            while not talks.wait(0.1):
                if c.done():
                    c.result()
            began = time.perf_counter()
            asked = pool.submit(self._server.ask, "a", messages, _ANSWER)
            if spacing is not None:
                for i, agent in enumerate(self._bs, 1):
                    time.sleep(max(0.0, began + i * spacing - time.perf_counter()))
                    bs.append(self._b(agent))
            a = asked.result()
            enough.set()
            c_answer = c.result()
        check_state(a, "cold")
        self._prompts.check(messages, a.prompt_tokens)
        self._server.delete("/agents/a")
        self._done()
        return a, bs, c_answer

    def _talk(self, talks: threading.Event, enough: threading.Event) -> Answer:
        """C's answer, cut when A has its own."""
        answers = stream(
            self._server.client, self._c, self._c_answer, agent_id="c", ignore_eos=True
        )
        with closing(answers):
            for answer in answers:
                if answer.times:
                    talks.set()
                if enough.is_set():
                    return answer
        raise BenchError(
            f"C's answer of {self._c_answer} tokens ended before A's: ask for a shorter --context"
        )

    def _b(self, agent: str) -> Answer:
        answer = self._server.ask(agent, self._bs[agent], _ANSWER)
        check_state(answer, "warm")
        return answer

    def _evict(self) -> None:
        for agent in self._bs:
            self._server.post(f"/agents/{agent}/evict")

    def pair(self) -> None:
        samples, agents = self._samples, ("first", "second")
        with self._server.threads() as pool:
            asked = pool.submit(self._cold, "first")
            time.sleep(_DELAY)
            second = self._cold("second")
            first = asked.result()
        samples.first.append(first.ttft_ms)
        samples.second.append(second.ttft_ms)
        samples.wall.append((max(_ended(first), _ended(second)) - first.began) * 1e3)
        for agent in agents:
            self._server.delete(f"/agents/{agent}")
        one_by_one = [self._cold(agent) for agent in agents]
        samples.sequential += [answer.ttft_ms for answer in one_by_one]
        samples.sequential_wall.append(sum(answer.total_ms for answer in one_by_one))
        for agent in agents:
            self._server.delete(f"/agents/{agent}")

    def _cold(self, agent: str) -> Answer:
        answer = self._server.ask(agent, self._prompts.messages(self._context), _PAIR_ANSWER)
        check_state(answer, "cold")
        self._done()
        return answer


def gaps_ms(answer: Answer, start: float, stop: float) -> list[float]:
    """Between its tokens, those that have a part from `start` to `stop`, time.perf_counter()."""
    start, stop = start - answer.began, stop - answer.began
    return [(b - a) * 1e3 for a, b in itertools.pairwise(answer.times) if a < stop and b > start]


def _ended(answer: Answer) -> float:
    return answer.began + answer.total_ms / 1e3


def _line(agent: str, answer: Answer, origin: float) -> Line:
    asked = answer.began - origin
    return Line(
        agent=agent, asked_s=round(asked, 4), tokens_s=[round(asked + t, 4) for t in answer.times]
    )


def _gaps(values: list[float]) -> Gaps:
    values = sorted(values)
    shown = {
        "median": statistics.median(values),
        "p99": values[int(len(values) * 0.99)],
        "max": values[-1],
    }
    return Gaps(**{name: round(ms, 2) for name, ms in shown.items()}, count=len(values))


def meanwhile_of(samples: Samples) -> Meanwhile:
    b, alone = ttft(samples.b), ttft(samples.b_alone)
    a, without_b = spread(samples.a), spread(samples.a_without_b)
    return Meanwhile(
        b=b,
        b_alone=alone,
        b_over_alone=round(b.ttft_ms / alone.ttft_ms, 2),
        a_finish_ms=a,
        a_finish_without_b_ms=without_b,
        a_delay=round(a.median / without_b.median - 1, 4),
        c_gap_ms=_gaps(samples.gaps),
        c_gap_alone_ms=_gaps(samples.gaps_alone),
    )


def pair_of(samples: Samples) -> Pair:
    wall, one_by_one = spread(samples.wall), spread(samples.sequential_wall)
    second, sequential = ttft(samples.second), ttft(samples.sequential)
    return Pair(
        wall_ms=wall,
        sequential_wall_ms=one_by_one,
        wall_ratio=round(wall.median / one_by_one.median, 3),
        first=ttft(samples.first),
        second=second,
        sequential=sequential,
        second_over_sequential=round(second.ttft_ms / sequential.ttft_ms, 2),
    )
