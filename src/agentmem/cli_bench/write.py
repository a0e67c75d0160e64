"""`agentmem bench write`: what a conversation writes to disk."""

from typing import TYPE_CHECKING, Annotated

import typer

from ..cli.agents import size
from ..errors import StartupError
from .common import Shared, Shown, benchmark

if TYPE_CHECKING:
    from ..bench.write import WriteResult


@benchmark
def write(
    shared: Shared,
    turns: Annotated[int, typer.Option(min=2, help="turns of the conversation")] = 40,
    tokens: Annotated[int, typer.Option(min=64, help="about, at the end")] = 4000,
) -> "WriteResult":
    """Write amplification: bytes that a conversation writes over the bytes that it keeps.

    JSON: {"rows": [{"turn", "tokens", "bytes"}], "written_bytes", "kept_bytes", "amplification",
    ...}.
    """
    with shared.run() as run:
        from ..bench import write as bench

        if tokens + 64 > (limit := run.max_context):
            raise StartupError(
                f"--tokens {tokens} and an answer are more than the model's context of {limit} tokens"
            )
        done = run.task("conversing", turns)
        found = bench.measure(
            run.session, run.settings, run.model, run.prompts(), turns, tokens, done
        )
        return bench.WriteResult(**found, **run.head(1))


def tables(result: "WriteResult") -> list[Shown]:
    first, second = result.bytes_per_token_halves
    shown: list[Shown] = [
        f"{len(result.rows)} turns, {result.tokens:,} tokens, {result.model}: {size(result.written_bytes)} written, "
        f"{size(result.kept_bytes)} kept: {result.amplification:.2f} bytes for each",
        f"a token wrote {first:,.0f} bytes in the first half of the turns, {second:,.0f} in the second",
    ]
    if result.process_bytes is not None:
        shown.append(
            f"the server gave the disk {size(result.process_bytes)} before it stopped, its database included"
        )
    return shown
