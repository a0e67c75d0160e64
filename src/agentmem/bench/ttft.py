"""Time to first token of one prompt in the paper's three states.

The states are cold, warm (on disk) and hot (in RAM). Over HTTP, streamed: per pass a server
prefills every length (cold) and stops; another one on the same store is asked the same prompts
(warm), and again at once (hot); then each is evicted to disk, and again warm and hot. In process:
the same states of an engine, beside `model(chunk, cache)` over mlx-lm's own cache with nothing
around it (bare).
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..cli.show import table
from .harness.in_process import ask_engine, running_engine
from .harness.options import BenchRun, Passes, Shared, Shown, benchmark, numbers
from .harness.paper import ttft_of
from .harness.result import Result, ResultPart, Ttft
from .harness.result import ttft as ttft_figure
from .harness.server import WARM_UP, TimedAnswer, check_state

if TYPE_CHECKING:
    from ..models.loading import LoadedModel

STATES = ("cold", "warm", "hot")
# times warm and hot, a pass: they are 5 ms apart, and answers alike swing by 15 (standard
# deviation)
_REPEATS = 32
# s before each: what the last one left to be written is no part of it. More, and waking adds 20 ms
_REST = 0.05
_MAX_TOKENS = 2


class InProcess(ResultPart):
    bare: Ttft
    cold: Ttft
    warm: Ttft
    hot: Ttft
    cold_over_bare: float


class TtftRow(ResultPart):
    context: int  # tokens asked for
    prompt_tokens: int  # of the rendered prompt over HTTP, at most `context`
    cold: Ttft
    warm: Ttft
    hot: Ttft
    cold_over_warm: float
    cold_over_hot: float
    in_process: InProcess | None
    # ms on the paper's machine, where the model is one of its three
    paper: dict[str, int] | None


class TtftResult(Result):
    benchmark: Literal["ttft"] = "ttft"
    rows: list[TtftRow]


def _no_times(*states: str) -> dict[str, list[float]]:
    return {state: [] for state in states}


@dataclass
class TtftSamples:
    """Times of one length in ms, by state."""

    http: dict[str, list[float]] = field(default_factory=lambda: _no_times(*STATES))
    engine: dict[str, list[float]] = field(default_factory=lambda: _no_times("bare", *STATES))
    prompt_tokens: int = 0


def measure_http(
    run: BenchRun, samples: dict[int, TtftSamples], done: Callable[[int], None], number: int
) -> None:
    """Measure all lengths once over HTTP, in pass `number`. `done` is told of prefilled tokens."""
    prompts = run.prompts
    asked = {n: prompts.messages(n) for n in samples}
    home = run.session.directory / f"pass-{number}"
    with run.server(home) as server:
        server.warm_up(prompts.messages(WARM_UP))
        for n, messages in asked.items():
            answer = server.ask(f"agent-{n}", messages, _MAX_TOKENS)
            prompts.check(messages, answer.prompt_tokens)
            samples[n].prompt_tokens = answer.prompt_tokens
            _note(samples[n].http, "cold", answer)
            done(n)
    with run.server(home) as server:
        server.warm_up(prompts.messages(WARM_UP))
        for repeat in range(_REPEATS):
            for n, messages in asked.items():
                if repeat:
                    server.post(f"/agents/agent-{n}/evict")
                for state in ("warm", "hot"):
                    time.sleep(_REST)
                    answer = server.ask(f"agent-{n}", messages, _MAX_TOKENS)
                    _note(samples[n].http, state, answer)


def _note(times: dict[str, list[float]], state: str, answer: TimedAnswer) -> None:
    check_state(answer, state)
    times[state].append(answer.ttft_ms)


def measure_engine(
    run: BenchRun,
    loaded: "LoadedModel",
    samples: dict[int, TtftSamples],
    done: Callable[[int], None],
) -> None:
    """Measure all lengths once in process.

    The model stays in memory; loading it is in no figure.
    """
    home = run.session.directory / "engine"
    settings = run.settings.model_copy(update={"home": home})
    for n in samples:
        ids = run.prompts.ids(n)
        times = samples[n].engine
        agent = f"agent-{n}-{len(times['cold'])}"
        times["bare"].append(bare_ms(loaded.model, ids, settings.prefill_chunk))
        for states in (("cold",), ("warm", "hot")):
            with running_engine(settings, loaded) as (engine, do):
                do(ask_engine(engine, "warm-up", run.prompts.ids(WARM_UP)))
                for state in states:
                    stats = do(ask_engine(engine, agent, ids)).stats
                    assert stats.cache == state, f"{stats.cache}, not {state}"
                    times[state].append(stats.ttft_ms)
        done(2 * n)


def bare_ms(model: Any, prompt: Sequence[int], chunk: int) -> float:
    """Time a prompt's forward passes and the first token, over mlx-lm's own cache; in ms."""
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache

    began = time.perf_counter()
    cache = make_prompt_cache(model)
    last = len(prompt) - 1
    for start in range(0, last, chunk):
        model(mx.array([prompt[start : min(start + chunk, last)]]), cache=cache)
        mx.eval([c.state for c in cache])
    mx.eval(model(mx.array([prompt[-1:]]), cache=cache)[:, -1].argmax(-1))
    return (time.perf_counter() - began) * 1e3


def rows(samples: dict[int, TtftSamples], paper: dict[int, dict[str, int]] | None) -> list[TtftRow]:
    """Make a row of each length; `paper` has the paper's times by length and state."""
    made = []
    for n, of in samples.items():
        http = {state: ttft_figure(of.http[state]) for state in STATES}
        row = TtftRow(
            context=n,
            prompt_tokens=of.prompt_tokens,
            **http,
            cold_over_warm=round(http["cold"].ttft_ms / http["warm"].ttft_ms, 1),
            cold_over_hot=round(http["cold"].ttft_ms / http["hot"].ttft_ms, 1),
            in_process=_in_process(of.engine) if of.engine["bare"] else None,
            paper=paper.get(n) if paper else None,
        )
        made.append(row)
    return made


def _in_process(times: dict[str, list[float]]) -> InProcess:
    inside = {state: ttft_figure(values) for state, values in times.items()}
    over = inside["cold"].ttft_ms / inside["bare"].ttft_ms
    return InProcess(**inside, cold_over_bare=round(over, 3))


def tables(result: TtftResult) -> list[Shown]:
    times = ("cold ms", "warm ms", "hot ms")
    lines = table("tokens", *times, "cold/warm", "cold/hot", "bare ms", "in process cold/bare")
    for row in result.rows:
        bare = over_bare = "-"
        if row.in_process:
            bare = f"{row.in_process.bare.ttft_ms:,.0f}"
            over_bare = f"{row.in_process.cold_over_bare:.2f}x"
        lines.add_row(
            f"{row.context:,}",
            f"{row.cold.ttft_ms:,.0f}",
            f"{row.warm.ttft_ms:,.0f}",
            f"{row.hot.ttft_ms:,.0f}",
            f"{row.cold_over_warm:.0f}x",
            f"{row.cold_over_hot:.0f}x",
            bare,
            over_bare,
        )
    title = f"Time to first token over HTTP, {result.model}, medians of {result.passes} passes"
    shown: list[Shown] = [title, lines]
    papers = [row for row in result.rows if row.paper]
    if papers:
        paper = table("tokens", *times)
        for row in papers:
            assert row.paper
            cells = [f"{row.paper[state]:,}" for state in STATES]
            paper.add_row(f"{row.context:,}", *cells)
        shown += ["The paper's, on an M4 Pro with 24 GB", paper]
    return shown


Contexts = Annotated[str, typer.Option(help="prompt lengths in tokens, comma-separated")]
WithInProcess = Annotated[
    bool,
    typer.Option(help="also without HTTP, beside a bare mlx-lm loop (loads the model here)"),
]


@benchmark(tables)
def ttft(
    shared: Shared,
    contexts: Contexts = "256,512,1k,2k",
    passes: Passes = 3,
    in_process: WithInProcess = True,
) -> TtftResult:
    """Time to first token of the same prompt: cold (nothing cached), warm (on disk) and hot (in
    RAM).

    Streamed over HTTP from a server of its own, which is restarted between cold and warm; then in
    process. Every pass has new prompts. For a model of the paper its figures are shown beside.

    JSON: {"rows": [{"context": 1024, "cold": {"ttft_ms": ..}, "warm": {..}, "hot": {..}}, ...]};
    the whole is in benchmarks/schemas/ttft.json.
    """
    lengths = numbers(contexts, "--contexts")
    with shared.run() as run:
        run.check_context(lengths[-1] + 8, f"--contexts {lengths[-1]}")
        samples = {n: TtftSamples() for n in lengths}
        done = run.task("prefilling", passes * sum(lengths) * (3 if in_process else 1))
        for number in range(passes):
            measure_http(run, samples, done, number)
            run.session.cool_down()
        if in_process:
            loaded = run.load()
            bare_ms(loaded.model, run.prompts.ids(256), run.settings.prefill_chunk)  # warm-up
            for _ in range(passes):
                measure_engine(run, loaded, samples, done)
                run.session.cool_down()
        paper = ttft_of(run.settings.model)
        return TtftResult(rows=rows(samples, paper), **run.head(passes))
