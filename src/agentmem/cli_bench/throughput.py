"""`agentmem bench throughput`: tokens/s of many agents at once."""

from typing import TYPE_CHECKING, Annotated

import typer

from ..cli.agents import table
from ..errors import StartupError
from .common import Passes, Run, Shared, Shown, benchmark, numbers

if TYPE_CHECKING:
    from ..bench.decode import DecodeRow
    from ..bench.throughput import ThroughputResult

Batches = Annotated[str, typer.Option(help="agents at once, comma-separated")]
Context = Annotated[int, typer.Option(min=64, help="prompt tokens of each agent")]
AnswerTokens = Annotated[int, typer.Option(min=8, help="of each answer")]
InProcess = Annotated[
    bool,
    typer.Option(
        help="also decode steps beside mlx-lm's BatchGenerator, without HTTP (loads the model here)"
    ),
]


@benchmark
def throughput(
    shared: Shared,
    batches: Batches = "1,2,4,8",
    context: Context = 500,
    answer_tokens: AnswerTokens = 64,
    passes: Passes = 3,
    in_process: InProcess = True,
) -> "ThroughputResult":
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
        from ..bench import throughput as bench
        from ..bench.paper import batch_2_of

        limit = run.max_context
        if context + answer_tokens > limit:
            raise StartupError(
                f"--context {context} and the answer are more than the model's context of {limit}"
            )
        done = run.task("answering", passes * len(agents) * len(bench.STATES))
        load = bench.Load(agents, context, answer_tokens)
        rows = bench.measure(
            run.session, run.settings, run.model, run.prompts(), load, passes, done
        )
        return bench.ThroughputResult(
            context=context,
            answer_tokens=answer_tokens,
            rows=rows,
            paper=batch_2_of(run.settings.model),
            in_process=_in_process(run, passes, limit) if in_process else None,
            **run.head(passes),
        )


def _in_process(run: Run, passes: int, limit: int) -> "list[DecodeRow] | None":
    """After the server's end: there may not be room for two models."""
    from ..bench import decode as bench

    runner = bench.decode_runner(run.load(), run.settings)
    if reason := bench.why_not(runner):
        run.session.say(f"no comparison with BatchGenerator: it is of {reason}")
        return None
    chosen = bench.cases(limit)
    return bench.measure_decode(runner, chosen, passes, run.task("decoding", passes * len(chosen)))


def tables(result: "ThroughputResult") -> list[Shown]:
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
    for row in result.rows:
        for state in ("cold", "warm", "hot"):
            of, one = getattr(row, state), getattr(result.rows[0], state)
            rates = ("-", "-")
            if of.tokens_per_s and one.tokens_per_s:
                over = of.tokens_per_s.median / one.tokens_per_s.median
                rates = (
                    f"{of.tokens_per_s.median:,.1f}",
                    f"{over:.2f}x" if result.rows[0].agents == 1 else "-",
                )
            times = [f"{of.ttft[i].ttft_ms:,.0f}" for i in (0, -1)]
            lines.add_row(
                str(row.agents), state, *rates, f"{of.end_to_end_tokens_per_s.median:,.1f}", *times
            )
    title = f"{result.model}, {result.context:,} tokens each, over HTTP, medians of {result.passes} passes"
    shown: list[Shown] = [title, lines]
    if result.paper:
        figures = ", ".join(f"{rate} at {n:,} tokens" for n, rate in result.paper.items())
        shown.append(f"The paper's two warm agents, on an M4 Pro with 24 GB, tokens/s: {figures}")
    if result.in_process:
        inside = table("in process", "tokens/s", "BatchGenerator", "speed-up", "cache bytes")
        for case in result.in_process:
            rates = (
                f"{case.agentmem.tokens_per_s:,.1f}",
                f"{case.batch_generator.tokens_per_s:,.1f}",
            )
            inside.add_row(case.case, *rates, f"{case.speedup:.2f}x", f"{case.bytes_ratio:.2f}x")
        shown.append(inside)
    return shown
