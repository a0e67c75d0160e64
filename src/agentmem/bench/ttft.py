"""Time to first token of one prompt in the paper's three states: cold, warm (on disk) and hot (in
RAM).

Over HTTP, streamed: per pass a server prefills every length (cold) and stops; another one on the
same store is asked the same prompts (warm), and again at once (hot); then each is evicted to disk,
and again warm and hot. In process: the same states of an engine, beside `model(chunk, cache)` over
mlx-lm's own cache with nothing around it (bare).
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from ..config import Settings
from ..models.loading import LoadedModel
from .in_process import ask_engine, running_engine
from .prompts import Prompts
from .result import Part, Result, Ttft, ttft
from .server import WARM_UP, Answer, Server, check_state
from .session import Session

STATES = ("cold", "warm", "hot")
# times warm and hot, a pass: they are 5 ms apart, and answers alike swing by 15 (standard
# deviation)
_REPEATS = 32
# s before each: what the last one left to be written is no part of it. More, and waking adds 20 ms
_REST = 0.05
_MAX_TOKENS = 2


class InProcess(Part):
    bare: Ttft
    cold: Ttft
    warm: Ttft
    hot: Ttft
    cold_over_bare: float


class TtftRow(Part):
    context: int  # tokens asked for
    prompt_tokens: int  # of the rendered prompt over HTTP, at most `context`
    cold: Ttft
    warm: Ttft
    hot: Ttft
    cold_over_warm: float
    cold_over_hot: float
    in_process: InProcess | None
    paper: dict[str, int] | None  # ms on the paper's machine, where the model is one of its three


class TtftResult(Result):
    benchmark: Literal["ttft"] = "ttft"
    rows: list[TtftRow]


@dataclass
class Samples:
    """ms, by state, of one length."""

    http: dict[str, list[float]] = field(default_factory=lambda: {state: [] for state in STATES})
    engine: dict[str, list[float]] = field(
        default_factory=lambda: {state: [] for state in ("bare", *STATES)}
    )
    prompt_tokens: int = 0


def measure_http(
    session: Session,
    settings: Settings,
    model: Path,
    prompts: Prompts,
    samples: dict[int, Samples],
    done: Callable[[int], None],
    number: int,
) -> None:
    """One pass over all lengths. `done` is told of prefilled tokens."""
    asked = {n: prompts.messages(n) for n in samples}
    home = session.directory / f"pass-{number}"
    with Server(session, settings, model, home) as server:
        server.warm_up(prompts.messages(WARM_UP))
        for n, messages in asked.items():
            answer = server.ask(f"agent-{n}", messages, _MAX_TOKENS)
            prompts.check(messages, answer.prompt_tokens)
            samples[n].prompt_tokens = answer.prompt_tokens
            _note(samples[n].http, "cold", answer)
            done(n)
    with Server(session, settings, model, home) as server:
        server.warm_up(prompts.messages(WARM_UP))
        for repeat in range(_REPEATS):
            for n, messages in asked.items():
                if repeat:
                    server.post(f"/agents/agent-{n}/evict")
                for state in ("warm", "hot"):
                    time.sleep(_REST)
                    _note(samples[n].http, state, server.ask(f"agent-{n}", messages, _MAX_TOKENS))


def _note(times: dict[str, list[float]], state: str, answer: Answer) -> None:
    check_state(answer, state)
    times[state].append(answer.ttft_ms)


def measure_engine(
    session: Session,
    settings: Settings,
    loaded: LoadedModel,
    prompts: Prompts,
    samples: dict[int, Samples],
    done: Callable[[int], None],
) -> None:
    """One pass over all lengths. The model stays in memory; loading it is in no figure."""
    settings = settings.model_copy(update={"home": session.directory / "engine"})
    for n in samples:
        ids, times = prompts.ids(n), samples[n].engine
        agent = f"agent-{n}-{len(times['cold'])}"
        times["bare"].append(bare_ms(loaded.model, ids, settings.prefill_chunk))
        for states in (("cold",), ("warm", "hot")):
            with running_engine(settings, loaded) as (engine, run):
                run(ask_engine(engine, "warm-up", prompts.ids(WARM_UP)))
                for state in states:
                    stats = run(ask_engine(engine, agent, ids)).stats
                    assert stats.cache == state, f"{stats.cache}, not {state}"
                    times[state].append(stats.ttft_ms)
        done(2 * n)


def bare_ms(model: Any, prompt: Sequence[int], chunk: int) -> float:
    """A prompt's forward passes and the first token, over mlx-lm's own cache."""
    began = time.perf_counter()
    cache = make_prompt_cache(model)
    for start in range(0, len(prompt) - 1, chunk):
        model(mx.array([prompt[start : min(start + chunk, len(prompt) - 1)]]), cache=cache)
        mx.eval([c.state for c in cache])
    mx.eval(model(mx.array([prompt[-1:]]), cache=cache)[:, -1].argmax(-1))
    return (time.perf_counter() - began) * 1e3


def rows(samples: dict[int, Samples], paper: dict[int, dict[str, int]] | None) -> list[TtftRow]:
    made = []
    for n, of in samples.items():
        http = {state: ttft(of.http[state]) for state in STATES}
        engine = None
        if of.engine["bare"]:
            inside = {state: ttft(values) for state, values in of.engine.items()}
            over = inside["cold"].ttft_ms / inside["bare"].ttft_ms
            engine = InProcess(**inside, cold_over_bare=round(over, 3))
        row = TtftRow(
            context=n,
            prompt_tokens=of.prompt_tokens,
            **http,
            cold_over_warm=round(http["cold"].ttft_ms / http["warm"].ttft_ms, 1),
            cold_over_hot=round(http["cold"].ttft_ms / http["hot"].ttft_ms, 1),
            in_process=engine,
            paper=paper.get(n) if paper else None,
        )
        made.append(row)
    return made
