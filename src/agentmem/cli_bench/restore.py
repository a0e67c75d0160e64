"""`agentmem bench restore`: how fast agents come back from disk."""

from typing import TYPE_CHECKING, Annotated

import typer

from ..cli_agents import size, table
from .common import Config, Corpus, Home, JsonFile, Model, Passes, Shown, benchmark, save, show

if TYPE_CHECKING:
    from ..bench.restore import RestoreResult


def restore(
    tokens: Annotated[int, typer.Option(min=64, help="tokens of an agent")] = 4000,
    agents: Annotated[int, typer.Option(min=2, help="agents that come back at once, besides one alone")] = 4,
    passes: Passes = 9,
    model: Model = None,
    corpus: Corpus = None,
    json_file: JsonFile = None,
    home: Home = None,
    config: Config = None,
) -> None:
    """Bytes a second from disk into attention, beside reading the same files and copying them once; cost of a fork.

    JSON: {"rows": [{"source", "agents", "bytes", "raw_ms", "restore_ms", "raw_bytes_per_s", "restore_bytes_per_s",
    "restore_over_raw"}], "fork_ms", "fork_written_bytes"}.
    """
    with benchmark({"model": model, "home": home}, config, json_file) as run:
        from ..bench import restore as bench

        ids, loaded = run.prompts(corpus).ids(tokens), run.load()
        task = run.progress.add_task("restoring", total=passes + 1)
        done = lambda: run.progress.advance(task)  # noqa: E731
        found = bench.measure(run.session, run.settings, loaded, ids, agents, passes, done)
        result = bench.RestoreResult(**found, **run.head(passes))
    save(result, json_file)
    show(*tables(result))


def tables(result: "RestoreResult") -> list[Shown]:
    lines = table("from", "agents", "bytes", "files", "read ms", "restore ms", "read /s", "restore /s", "restore/read")
    for row in result.rows:
        times = f"{row.raw_ms.median:,.1f}", f"{row.restore_ms.median:,.1f}"
        speeds = size(row.raw_bytes_per_s), size(row.restore_bytes_per_s), f"{row.restore_over_raw:.1f}x"
        lines.add_row(row.source, str(row.agents), size(row.bytes), str(row.files), *times, *speeds)
    written = f", {size(result.fork_written_bytes.median)} written" if result.fork_written_bytes else ""
    title = f"Agents of {result.tokens:,} tokens, {result.model}, medians of {result.passes} passes"
    return [title, lines, f"A fork: {result.fork_ms.median:.1f} ms{written}"]
