"""Tokens/s over HTTP of agents that answer at once, in the paper's three states.

The states: cold, warm (on disk), hot (in RAM). Each agent has a prompt of its own. All ask at the
same moment: first nothing is cached, then each is evicted and asked the same again, then at once
again. Two figures of each: tokens/s while all of them stream, from the last agent's first token to
the first agent's last one; and those from the first request to the last token, prefill and restore
included.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ..cli.show import table
from .harness.options import BenchRun, Passes, Shared, Shown, benchmark, numbers
from .harness.paper import batch_2_of
from .harness.result import Result, ResultPart, Spread, Ttft, spread, ttft
from .harness.server import WARM_UP, Server, TimedAnswer, check_state, tokens_per_s

if TYPE_CHECKING:
    from .decode_steps import StepTimes

STATES = ("cold", "warm", "hot")
Rounds = list[list[TimedAnswer]]  # of each pass, the answers of all agents


@dataclass(frozen=True)
class ThroughputLoad:
    batches: list[int]  # agents at once
    context: int  # prompt tokens
    answer: int  # tokens


class StateThroughput(ResultPart):
    # over all agents while all stream; null where the first ended before the last began
    tokens_per_s: Spread | None
    end_to_end_tokens_per_s: Spread
    ttft: list[Ttft]  # of the agent that answers first, second, ...


class ThroughputRow(ResultPart):
    agents: int
    cold: StateThroughput
    warm: StateThroughput
    hot: StateThroughput


class DecodeFigure(ResultPart):
    step_ms: Spread
    tokens_per_s: float
    cache_bytes: int  # working copies and blocks; of mlx-lm its merged caches


class InProcessDecodeRow(ResultPart):
    case: str
    agentmem: DecodeFigure
    batch_generator: DecodeFigure
    speedup: float
    bytes_ratio: float


class ThroughputResult(Result):
    benchmark: Literal["throughput"] = "throughput"
    context: int
    answer_tokens: int
    rows: list[ThroughputRow]
    # by context: two warm agents of the same model on the paper's machine
    paper: dict[int, float] | None
    in_process: list[InProcessDecodeRow] | None


def measure_http(
    run: BenchRun, load: ThroughputLoad, passes: int, done: Callable[[], None]
) -> list[ThroughputRow]:
    """Measure each batch over HTTP. `done` is told of each of passes x batches x STATES."""
    rounds: dict[int, dict[str, Rounds]] = {}
    for n in load.batches:
        rounds[n] = {state: [] for state in STATES}
    with run.server(run.session.directory / "throughput") as server:
        server.warm_up(run.prompts.messages(WARM_UP))
        for _ in range(passes):
            for agents in load.batches:
                found = _one_pass(server, run, agents, load, done=done)
                for state, answers in found.items():
                    rounds[agents][state].append(answers)
            run.session.cool_down()
    rows = []
    for n, states in rounds.items():
        by_state = {state: _state(of) for state, of in states.items()}
        rows.append(ThroughputRow(agents=n, **by_state))
    return rows


def _one_pass(
    server: Server,
    run: BenchRun,
    agents: int,
    load: ThroughputLoad,
    *,
    done: Callable[[], None],
) -> dict[str, list[TimedAnswer]]:
    """Return the answers of new agents, by state."""
    chats = {f"agent-{i}": run.prompts.messages(load.context) for i in range(agents)}
    found = {}
    for state in STATES:
        if state == "warm":
            for agent in chats:
                server.post(f"/agents/{agent}/evict")
        with server.threads() as pool:
            asked = pool.map(lambda agent: server.ask(agent, chats[agent], load.answer), chats)
            answers = list(asked)
        for answer, messages in zip(answers, chats.values(), strict=True):
            check_state(answer, state)
            run.prompts.check(messages, answer.prompt_tokens)
        found[state] = answers
        done()
    for agent in chats:
        server.delete(f"/agents/{agent}")
    return found


def _state(rounds: Rounds) -> StateThroughput:
    rates = [tokens_per_s(answers) for answers in rounds]
    together = [rate for rate in rates if rate is not None]
    by_pass = []
    for answers in rounds:
        by_pass.append(sorted(answer.ttft_ms for answer in answers))
    return StateThroughput(
        tokens_per_s=spread(together) if together else None,
        end_to_end_tokens_per_s=spread([end_to_end_tokens_per_s(of) for of in rounds]),
        ttft=[ttft(times) for times in zip(*by_pass, strict=True)],
    )


def end_to_end_tokens_per_s(answers: Sequence[TimedAnswer]) -> float:
    """Return the rate of all together, from the first request to the last token."""
    first = min(answer.began for answer in answers)
    last = max(answer.began + answer.times[-1] for answer in answers)
    tokens = sum(answer.usage["completion_tokens"] for answer in answers)
    return float(tokens / (last - first))


def measure_in_process(run: BenchRun, passes: int) -> list[InProcessDecodeRow] | None:
    """Measure decode steps in process, None where mlx-lm's BatchGenerator has nothing to compare.

    Only after the server's end: there may not be room for two models.
    """
    from . import decode_steps

    runner = decode_steps.decode_runner(run.load(), run.settings)
    if reason := decode_steps.why_not(runner):
        run.session.say(f"no comparison with BatchGenerator: it is of {reason}")
        return None
    cases = decode_steps.cases(run.max_context)
    done = run.task("decoding", passes * len(cases))
    rows = []
    for case, lengths in cases.items():
        ours, theirs = decode_steps.measure(runner, lengths, passes, done)
        rows.append(_decode_row(case, len(lengths), ours, theirs))
    return rows


def _decode_row(
    case: str, agents: int, ours: "StepTimes", theirs: "StepTimes"
) -> InProcessDecodeRow:
    agentmem = _decode_figure(agents, ours)
    batch_generator = _decode_figure(agents, theirs)
    speedup = batch_generator.step_ms.median / agentmem.step_ms.median
    return InProcessDecodeRow(
        case=case,
        agentmem=agentmem,
        batch_generator=batch_generator,
        speedup=round(speedup, 3),
        bytes_ratio=round(agentmem.cache_bytes / batch_generator.cache_bytes, 3),
    )


def _decode_figure(agents: int, of: "StepTimes") -> DecodeFigure:
    step = spread(of.ms)
    rate = round(agents / step.median * 1e3, 2)
    return DecodeFigure(step_ms=step, tokens_per_s=rate, cache_bytes=of.cache_bytes)


def tables(result: ThroughputResult) -> list[Shown]:
    shown: list[Shown] = [
        f"{result.model}, {result.context:,} tokens each, over HTTP, "
        f"medians of {result.passes} passes"
    ]
    lines = table(
        "agents",
        "",
        "tokens/s",
        "of one",
        "end to end tokens/s",
        "first token ms",
        "of the last one",
        left=2,
    )
    first = result.rows[0]
    for row in result.rows:
        for state in STATES:
            of: StateThroughput = getattr(row, state)
            one: StateThroughput = getattr(first, state)
            rate = over = "-"
            if of.tokens_per_s and one.tokens_per_s:
                rate = f"{of.tokens_per_s.median:,.1f}"
                if first.agents == 1:
                    over = f"{of.tokens_per_s.median / one.tokens_per_s.median:.2f}x"
            lines.add_row(
                str(row.agents),
                state,
                rate,
                over,
                f"{of.end_to_end_tokens_per_s.median:,.1f}",
                f"{of.ttft[0].ttft_ms:,.0f}",
                f"{of.ttft[-1].ttft_ms:,.0f}",
            )
    shown.append(lines)
    if result.paper:
        figures = ", ".join(f"{rate} at {n:,} tokens" for n, rate in result.paper.items())
        shown.append(f"The paper's two warm agents, on an M4 Pro with 24 GB, tokens/s: {figures}")
    if result.in_process:
        inside = table("in process", "tokens/s", "BatchGenerator", "speed-up", "cache bytes")
        for case in result.in_process:
            inside.add_row(
                case.case,
                f"{case.agentmem.tokens_per_s:,.1f}",
                f"{case.batch_generator.tokens_per_s:,.1f}",
                f"{case.speedup:.2f}x",
                f"{case.bytes_ratio:.2f}x",
            )
        shown.append(inside)
    return shown


Batches = Annotated[str, typer.Option(help="agents at once, comma-separated")]
Context = Annotated[int, typer.Option(min=64, help="prompt tokens of each agent")]
AnswerTokens = Annotated[int, typer.Option(min=8, help="of each answer")]
WithInProcess = Annotated[
    bool,
    typer.Option(
        help="also decode steps beside mlx-lm's BatchGenerator, without HTTP (loads the model here)"
    ),
]


@benchmark(tables)
def throughput(
    shared: Shared,
    batches: Batches = "1,2,4,8",
    context: Context = 500,
    answer_tokens: AnswerTokens = 64,
    passes: Passes = 3,
    in_process: WithInProcess = True,
) -> ThroughputResult:
    """Tokens/s of agents that answer at once: cold (nothing cached), warm (on disk) and hot (in
    RAM).

    Over HTTP: while all of them stream, and from the first request to the last token. Then decode
    steps in process, beside mlx-lm's BatchGenerator over caches of the same lengths. For a model of
    the paper its figures are beside.

    JSON: {"rows": [{"agents": 2, "cold": {"tokens_per_s": {"median": ..},
    "end_to_end_tokens_per_s": {..}, "ttft": [{"ttft_ms": ..}, ..]}, "warm": {..}, "hot": {..}},
    ...], "in_process": [{"case", "speedup", ..}, ...]}.
    """
    agents = numbers(batches, "--batches")
    with shared.run(max_running=agents[-1]) as run:
        run.check_context(context + answer_tokens, f"--context {context}")
        done = run.task("answering", passes * len(agents) * len(STATES))
        load = ThroughputLoad(agents, context, answer_tokens)
        rows = measure_http(run, load, passes, done)
        return ThroughputResult(
            context=context,
            answer_tokens=answer_tokens,
            rows=rows,
            paper=batch_2_of(run.settings.model),
            in_process=measure_in_process(run, passes) if in_process else None,
            **run.head(passes),
        )
