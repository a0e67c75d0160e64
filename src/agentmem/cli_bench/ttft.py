"""`agentmem bench ttft`: time to first token, cold, warm and hot."""

from typing import TYPE_CHECKING, Annotated

import typer

from ..cli.agents import table
from ..errors import StartupError
from .common import Passes, Shared, Shown, benchmark, numbers

if TYPE_CHECKING:
    from ..bench.ttft import TtftResult

PrefixCache = Annotated[str, typer.Option(help="prompt lengths in tokens, comma-separated")]
InProcess = Annotated[
    bool, typer.Option(help="also without HTTP, beside a bare mlx-lm loop (loads the model here)")
]


@benchmark
def ttft(
    shared: Shared,
    contexts: PrefixCache = "256,512,1k,2k",
    passes: Passes = 3,
    in_process: InProcess = True,
) -> "TtftResult":
    """Time to first token of the same prompt: cold (nothing cached), warm (on disk) and hot (in
    RAM).

    Streamed over HTTP from a server of its own, which is restarted between cold and warm; then in
    process. Every pass has new prompts. For a model of the paper its figures are shown beside.

    JSON: {"rows": [{"context": 1024, "cold": {"ttft_ms": ..}, "warm": {..}, "hot": {..}}, ...]};
    the whole is in benchmarks/schemas/ttft.json.
    """
    lengths = numbers(contexts, "--contexts")
    with shared.run() as run:
        from ..bench import ttft as bench
        from ..bench.paper import ttft_of

        limit = run.max_context
        if lengths[-1] + 8 > limit:
            raise StartupError(
                f"--contexts {lengths[-1]} is more than the model's context of {limit} tokens holds"
            )
        samples = {n: bench.Samples() for n in lengths}
        prompts = run.prompts()
        done = run.task("prefilling", passes * sum(lengths) * (3 if in_process else 1))
        for number in range(passes):
            bench.measure_http(run.session, run.settings, run.model, prompts, samples, done, number)
            run.session.cool_down()
        if in_process:
            loaded = run.load()
            bench.bare_ms(loaded.model, prompts.ids(256), run.settings.prefill_chunk)  # warm-up
            for _ in range(passes):
                bench.measure_engine(run.session, run.settings, loaded, prompts, samples, done)
                run.session.cool_down()
        return bench.TtftResult(
            rows=bench.rows(samples, ttft_of(run.settings.model)), **run.head(passes)
        )


def tables(result: "TtftResult") -> list[Shown]:
    lines = table(
        "tokens",
        "cold ms",
        "warm ms",
        "hot ms",
        "cold/warm",
        "cold/hot",
        "bare ms",
        "in process cold/bare",
    )
    for row in result.rows:
        inside = (
            (f"{row.in_process.bare.ttft_ms:,.0f}", f"{row.in_process.cold_over_bare:.2f}x")
            if row.in_process
            else "--"
        )
        times = [f"{of.ttft_ms:,.0f}" for of in (row.cold, row.warm, row.hot)]
        lines.add_row(
            f"{row.context:,}",
            *times,
            f"{row.cold_over_warm:.0f}x",
            f"{row.cold_over_hot:.0f}x",
            *inside,
        )
    shown: list[Shown] = [
        f"Time to first token over HTTP, {result.model}, medians of {result.passes} passes",
        lines,
    ]
    papers = [row for row in result.rows if row.paper]
    if papers:
        paper = table("tokens", "cold ms", "warm ms", "hot ms")
        for row in papers:
            assert row.paper
            paper.add_row(
                f"{row.context:,}", *(f"{row.paper[state]:,}" for state in ("cold", "warm", "hot"))
            )
        shown += ["The paper's, on an M4 Pro with 24 GB", paper]
    return shown
