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
from typing import Annotated, Literal

import typer

from ..cli.show import table
from .harness.options import BenchRun, Passes, Shared, Shown, benchmark
from .harness.result import Result, ResultPart, Spread, Ttft, spread, ttft
from .harness.server import WARM_UP, BenchError, Server, TimedAnswer, check_state, stream

B_CONTEXT = 500  # tokens
ROUNDS = 6  # of each pass, as `done` counts them
_NUM_B = 5
_DELAY = 2.0  # s between the two of a pair
_ANSWER = 4  # tokens, of A and B's
_PAIR_ANSWER = 64
_C_CONTEXT = 64
_C_ANSWER = 2048  # cut before its end


class Gaps(ResultPart):
    """ms between two tokens, of all passes."""

    median: float
    p99: float
    max: float
    count: int


class Meanwhile(ResultPart):
    b: Ttft  # of those that came before A's first token
    b_alone: Ttft
    b_over_alone: float
    a_finish_ms: Spread
    a_finish_without_b_ms: Spread  # C answers here too
    a_delay: float  # of medians, as a share
    c_gap_ms: Gaps  # while A prefills and B's come
    c_gap_alone_ms: Gaps


class Pair(ResultPart):
    wall_ms: Spread
    sequential_wall_ms: Spread
    wall_ratio: float
    first: Ttft
    second: Ttft
    sequential: Ttft  # of both
    second_over_sequential: float


class Line(ResultPart):
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
class StaggeredSamples:
    """What was measured, in ms."""

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


def measure(run: BenchRun, context: int, passes: int, done: Callable[[], None]) -> StaggeredSamples:
    """Play both scenes in each pass. `done` is told of each of passes x ROUNDS."""
    samples = StaggeredSamples()
    with run.server(run.session.directory / "staggered") as server:
        server.warm_up(run.prompts.messages(WARM_UP))
        scene = _Scene(server, run, context, samples, done=done)
        for _ in range(passes):
            scene.alone()
            scene.meanwhile()
            scene.pair()
            run.session.cool_down()
    if not samples.b:
        raise BenchError("A's prompt was prefilled before any B came: ask for a longer --context")
    return samples


class _Scene:
    """The agents of all passes.

    B's and C are the same in every pass; the others have new prompts and are forgotten after each
    round.
    """

    def __init__(
        self,
        server: Server,
        run: BenchRun,
        context: int,
        samples: StaggeredSamples,
        *,
        done: Callable[[], None],
    ):
        self._server = server
        self._prompts = run.prompts
        self._context = context
        self._c_answer = min(_C_ANSWER, run.max_context - _C_CONTEXT)
        self._samples = samples
        self._done = done
        self._bs = {f"b{i}": self._prompts.messages(B_CONTEXT) for i in range(1, _NUM_B + 1)}
        self._c = self._prompts.messages(_C_CONTEXT)
        for agent, messages in self._bs.items():
            check_state(server.ask(agent, messages, _ANSWER), "cold")
        server.ask("c", self._c, _ANSWER)

    def alone(self) -> None:
        """Ask B's and C, one after the other."""
        self._evict()
        self._samples.b_alone += [self._b(agent).ttft_ms for agent in self._bs]
        answer = self._server.ask("c", self._c, _PAIR_ANSWER)
        self._samples.gaps_alone += gaps_ms(answer, answer.began, answer.ended)
        self._done()

    def meanwhile(self) -> None:
        """Ask A and C without B's, then with them.

        The first tells how long A takes, through which B's are to come.
        """
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

    def _round(self, spacing: float | None) -> tuple[TimedAnswer, list[TimedAnswer], TimedAnswer]:
        """Return the answers of A, of the B's, so many s apart (None: there are none), and of C."""
        messages = self._prompts.messages(self._context)
        bs = []
        talks = threading.Event()
        enough = threading.Event()
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

    def _talk(self, talks: threading.Event, enough: threading.Event) -> TimedAnswer:
        """Return C's answer, cut when A has its own."""
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

    def _b(self, agent: str) -> TimedAnswer:
        answer = self._server.ask(agent, self._bs[agent], _ANSWER)
        check_state(answer, "warm")
        return answer

    def _evict(self) -> None:
        for agent in self._bs:
            self._server.post(f"/agents/{agent}/evict")

    def pair(self) -> None:
        """Ask two cold agents, first 2 s apart, then one after the other."""
        samples = self._samples
        agents = ("first", "second")
        with self._server.threads() as pool:
            asked = pool.submit(self._cold, "first")
            time.sleep(_DELAY)
            second = self._cold("second")
            first = asked.result()
        samples.first.append(first.ttft_ms)
        samples.second.append(second.ttft_ms)
        samples.wall.append((max(first.ended, second.ended) - first.began) * 1e3)
        for agent in agents:
            self._server.delete(f"/agents/{agent}")
        one_by_one = [self._cold(agent) for agent in agents]
        samples.sequential += [answer.ttft_ms for answer in one_by_one]
        samples.sequential_wall.append(sum(answer.total_ms for answer in one_by_one))
        for agent in agents:
            self._server.delete(f"/agents/{agent}")

    def _cold(self, agent: str) -> TimedAnswer:
        messages = self._prompts.messages(self._context)
        answer = self._server.ask(agent, messages, _PAIR_ANSWER)
        check_state(answer, "cold")
        self._done()
        return answer


def gaps_ms(answer: TimedAnswer, start: float, stop: float) -> list[float]:
    """Return the gaps between its tokens that have a part from `start` to `stop`.

    Both are of time.perf_counter().
    """
    start -= answer.began
    stop -= answer.began
    pairs = itertools.pairwise(answer.times)
    return [(b - a) * 1e3 for a, b in pairs if a < stop and b > start]


def _line(agent: str, answer: TimedAnswer, origin: float) -> Line:
    asked = answer.began - origin
    tokens = [round(asked + t, 4) for t in answer.times]
    return Line(agent=agent, asked_s=round(asked, 4), tokens_s=tokens)


def _gaps(values: list[float]) -> Gaps:
    values = sorted(values)
    return Gaps(
        median=round(statistics.median(values), 2),
        p99=round(values[int(len(values) * 0.99)], 2),
        max=round(values[-1], 2),
        count=len(values),
    )


def meanwhile_of(samples: StaggeredSamples) -> Meanwhile:
    b = ttft(samples.b)
    alone = ttft(samples.b_alone)
    a = spread(samples.a)
    without_b = spread(samples.a_without_b)
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


def pair_of(samples: StaggeredSamples) -> Pair:
    wall = spread(samples.wall)
    one_by_one = spread(samples.sequential_wall)
    second = ttft(samples.second)
    sequential = ttft(samples.sequential)
    return Pair(
        wall_ms=wall,
        sequential_wall_ms=one_by_one,
        wall_ratio=round(wall.median / one_by_one.median, 3),
        first=ttft(samples.first),
        second=second,
        sequential=sequential,
        second_over_sequential=round(second.ttft_ms / sequential.ttft_ms, 2),
    )


def tables(result: StaggeredResult) -> list[Shown]:
    return [
        f"{result.model}, over HTTP, {result.passes} passes",
        _meanwhile_table(result),
        _pair_table(result.pair),
        "The paper's pair: 4K tokens each on an M4 Pro, wall time 1x, first token of the second 2x",
    ]


def _meanwhile_table(result: StaggeredResult) -> Shown:
    of = result.meanwhile
    lines = table("ms, medians", "together", "alone", "")
    lines.add_row(
        f"B, warm, {result.b_context:,} tokens: first token",
        f"{of.b.ttft_ms:,.0f}",
        f"{of.b_alone.ttft_ms:,.0f}",
        f"{of.b_over_alone:.1f}x",
    )
    lines.add_row(
        f"A prefills {result.context:,} tokens: done",
        f"{of.a_finish_ms.median:,.0f}",
        f"{of.a_finish_without_b_ms.median:,.0f} without B",
        f"{of.a_delay:+.1%}",
    )
    for name in ("median", "p99", "max"):
        together = getattr(of.c_gap_ms, name)
        alone = getattr(of.c_gap_alone_ms, name)
        what = f"C answers: between two tokens, {name}"
        lines.add_row(what, f"{together:,.0f}", f"{alone:,.0f}", "")
    return lines


def _pair_table(pair: Pair) -> Shown:
    lines = table("two cold agents, ms", "2 s apart", "one after the other", "")
    lines.add_row(
        "wall time",
        f"{pair.wall_ms.median:,.0f}",
        f"{pair.sequential_wall_ms.median:,.0f}",
        f"{pair.wall_ratio:.2f}x",
    )
    lines.add_row(
        "first token of the second",
        f"{pair.second.ttft_ms:,.0f}",
        f"{pair.sequential.ttft_ms:,.0f}",
        f"{pair.second_over_sequential:.2f}x",
    )
    return lines


Context = Annotated[
    int, typer.Option(min=64, help="tokens of A's cold prompt, and of each of the pair")
]


@benchmark(tables)
def staggered(shared: Shared, context: Context = 2000, passes: Passes = 3) -> StaggeredResult:
    """Warm agents B that arrive while A prefills a long cold prompt and C answers: who waits how
    long for whom.

    Then the paper's staggered arrivals: two cold agents, the second 2 s after the first, beside one
    after the other.

    JSON: {"meanwhile": {"b": {"ttft_ms": ..}, "b_alone": {..}, "a_finish_ms": {"median": ..},
    "a_delay", "c_gap_ms": {"median", "p99", "max"}, ..}, "pair": {"wall_ms", "wall_ratio",
    "second", ..}, "timeline": [{"agent", "asked_s", "tokens_s"}, ..]}.
    """
    with shared.run() as run:
        run.check_context(max(context, B_CONTEXT) + 64, f"--context {context}")
        done = run.task("arriving", passes * ROUNDS)
        samples = measure(run, context, passes, done)
        return StaggeredResult(
            context=context,
            b_context=B_CONTEXT,
            meanwhile=meanwhile_of(samples),
            pair=pair_of(samples),
            timeline=samples.timeline,
            **run.head(passes),
        )
