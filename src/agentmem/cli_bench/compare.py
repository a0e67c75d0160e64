"""`agentmem bench compare`: agentmem beside other servers."""

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..cli.agents import table
from ..errors import StartupError
from .common import Passes, Run, Shared, Shown, benchmark, numbers

if TYPE_CHECKING:
    from ..bench.compare import CompareResult, Workload
    from ..bench.contenders import Place
    from ..bench.prompts import Prompts

Servers = Annotated[
    list[str] | None,
    typer.Argument(
        help="agentmem, mlx-lm, llama.cpp, NAME=http://host:port/v1 (default: agentmem mlx-lm)"
    ),
]
PrefixCache = Annotated[
    str, typer.Option(help="lengths of a conversation's first prompt in tokens, comma-separated")
]
Batches = Annotated[str, typer.Option(help="agents that answer at once, comma-separated")]
DecodeContexts = Annotated[
    str, typer.Option(help="tokens of each of these agents' prompts, comma-separated")
]
AnswerTokens = Annotated[int, typer.Option(min=8, help="tokens of each of their answers")]
Gguf = Annotated[
    Path | None, typer.Option(help="model file for llama-server, which has to be on the PATH")
]

Cells = dict[str, float | None]  # by server


@benchmark
def compare(
    shared: Shared,
    servers: Servers = None,
    contexts: PrefixCache = "256,1000",
    batches: Batches = "1,4",
    decode_contexts: DecodeContexts = "300,1000",
    answer_tokens: AnswerTokens = 48,
    passes: Passes = 3,
    gguf: Gguf = None,
) -> "CompareResult":
    """The same conversations on several servers, in turn: time to first token, decode speed, bytes
    of cache.

    agentmem, mlx-lm (mlx_lm.server of this environment) and llama.cpp are started, and restarted in
    between; others run already. On a CPU agentmem and mlx-lm load one float32 copy of the model and
    the same BLAS. States: cold; second_turn (an answer and a question on top); after_restart (the
    same request again, to a server that was stopped and started); resumed (so again, and a third
    turn).

    JSON: {"servers", "rows": [{"server", "context", "cold": {"ttft_ms"}, "second_turn",
    "after_restart", "resumed", "agentmem_over", ...}], "decode": [{"server", "batch", "context",
    "tokens_per_s", "agentmem_over"}], "cache": [{"server", ...}]}.
    """
    names = servers or ["agentmem", "mlx-lm"]
    lengths, sizes = numbers(contexts, "--contexts"), numbers(batches, "--batches")
    decode_lengths = numbers(decode_contexts, "--decode-contexts", least=32)
    with shared.run() as run:
        from ..bench.compare import Workload
        from ..bench.contenders import Place, check_names

        check_names(names, gguf)
        work = Workload(lengths, sizes, decode_lengths, answer_tokens, passes)
        if work.most_tokens > (limit := run.max_context):
            raise StartupError(
                f"that takes {work.most_tokens} tokens; the model's context holds {limit}"
            )
        place = Place(run.session, run.settings, run.model, gguf, work.most_tokens, work.agents)
        return _measure(run, place, names, work, run.prompts())


def _measure(
    run: Run, place: "Place", names: list[str], work: "Workload", prompts: "Prompts"
) -> "CompareResult":
    from ..bench import compare as bench
    from ..bench import compare_rows as made

    task = run.progress.add_task("preparing", total=len(names) * work.steps)
    done = lambda what: run.progress.update(task, advance=1, description=what)  # noqa: E731
    contenders = place.contenders(names)
    samples = {
        n: {name: bench.Samples() for name in (c.name for c in contenders)} for n in work.contexts
    }
    cache = []
    for number in range(work.passes):
        for n in work.contexts:
            agent = bench.converse(contenders, prompts, n, samples[n], done, number)
            if not number:
                cache += [
                    made.cache_row(c, n, agent, run.model, run.settings.block_size)
                    for c in contenders
                ]
        run.session.cool_down()
    speeds = bench.decode(contenders, prompts, work, done)
    for contender in contenders:
        contender.stop()
    return bench.CompareResult(
        servers=[contender.about for contender in contenders],
        rows=made.rows(samples),
        decode=made.decode_rows(speeds),
        fp16_bytes_per_token=made.fp16_bytes(run.model),
        cache=cache,
        **run.head(work.passes),
    )


def tables(result: "CompareResult") -> list[Shown]:
    names = [about.name for about in result.servers]
    others = [name for name in names if name != "agentmem"] if "agentmem" in names else []
    lines = table("", *names, *(f"agentmem/{name}" for name in others))
    for label, cells, over in _lines(result):
        ratios = (_ratio(over.get(name)) for name in others)
        lines.add_row(label, *(_number(cells.get(name)) for name in names), *ratios)
    shown: list[Shown] = [f"{result.model}, medians of {result.passes} passes", lines]
    for about in result.servers:
        notes = (about.what, about.version, f"weights {about.weights}", about.preparation)
        shown.append(f"{about.name}: {'; '.join(note for note in notes if note)}")
    return shown


def _lines(result: "CompareResult") -> Iterator[tuple[str, Cells, Cells]]:
    """A measure's name, what it is by server, and agentmem's over it."""
    for context, group in groupby(result.rows, lambda row: row.context):
        of_context = list(group)
        for state in ("cold", "second_turn", "after_restart", "resumed"):
            cells = {
                row.server: cell.ttft_ms if (cell := getattr(row, state)) else None
                for row in of_context
            }
            pairs = {row.server: (row.agentmem_over or {}).get(state) for row in of_context}
            over = {name: of.median if of else None for name, of in pairs.items()}
            yield (
                f"{state.replace('_', ' ')}, {context:,} tokens, ms to the first token",
                cells,
                over,
            )
    for (context, batch), decoded in groupby(result.decode, lambda row: (row.context, row.batch)):
        speeds = list(decoded)
        cells = {row.server: row.tokens_per_s.median for row in speeds}
        over = {
            row.server: row.agentmem_over.median if row.agentmem_over else None for row in speeds
        }
        yield f"decode, {batch} at once over {context:,} tokens each, tokens/s", cells, over
    for context, held in groupby(result.cache, lambda row: row.context):
        rows = list(held)
        whole = {r.server: r.bytes_per_token for r in rows}
        yield f"cache, {context:,} tokens and three turns, bytes a token", whole, _over(whole)
        sealed = {r.server: r.sealed_bytes_per_token or r.bytes_per_token for r in rows}
        yield f"cache, {context:,} tokens, whole blocks alone, bytes a token", sealed, _over(sealed)
    if result.fp16_bytes_per_token:
        yield (
            "(in 16 bits)",
            dict.fromkeys((r.server for r in result.cache), float(result.fp16_bytes_per_token)),
            {},
        )


def _over(cells: Cells) -> Cells:
    ours = cells.get("agentmem")
    return {name: ours / theirs if ours and theirs else None for name, theirs in cells.items()}


def _number(value: float | None) -> str:
    return "--" if value is None else f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"


def _ratio(value: float | None) -> str:
    return "--" if value is None else f"{value:.3f}x"
