"""`agentmem bench`: what the cache costs and gains, measured on this machine.

Each benchmark is one module of this package, named as its command; harness/ has what they share. A
module is imported when its command is called: `bench --help` imports none.
"""

from typing import Any, ClassVar

import typer

from ..cli.lazy import Lazy, LazyGroup, load

# name: what `bench --help` says of it, the first sentence of its own help
COMMANDS = {
    "ttft": (
        "Time to first token of the same prompt: cold (nothing cached), warm (on disk) and hot "
        "(in RAM)."
    ),
    "throughput": (
        "Tokens/s of agents that answer at once: cold (nothing cached), warm (on disk) and hot "
        "(in RAM)."
    ),
    "staggered": (
        "Warm agents B that arrive while A prefills a long cold prompt and C answers: who waits "
        "how long for whom."
    ),
    "persistence": (
        "What an agent still has after its server was stopped, killed at rest, or killed right "
        "after an answer."
    ),
    "restore": (
        "Bytes a second from disk into RAM, verified, beside reading the same files and copying "
        "them once; cost of a fork."
    ),
    "write": (
        "Write amplification: bytes that a conversation writes over the bytes that it keeps."
    ),
    "ablation": (
        "What each component is good for: the same work with it and without it, in turns, in "
        "process."
    ),
    "compare": (
        "The same conversations on several servers, in turn: time to first token, decode speed, "
        "bytes of cache."
    ),
    "scenario": "Agents that work in phases, between which the server restarts.",
    "perplexity": (
        "What fewer bits cost in quality: perplexity, KL divergence and top-1 agreement against "
        "16 bits."
    ),
    "capacity": (
        "How many agents fit into a budget, for any model; a config file is enough, no weights "
        "are read."
    ),
    "report": (
        "One self-contained HTML page of all result files in a directory, with pictures where "
        "matplotlib is installed."
    ),
}


class _Benchmarks(LazyGroup):
    lazy: ClassVar = {
        name: Lazy(f"agentmem.bench.{name}", name, first) for name, first in COMMANDS.items()
    }


def command_of(name: str) -> Any:
    """Import a benchmark, and return its command."""
    return load(name, _Benchmarks.lazy[name])


app = typer.Typer(
    cls=_Benchmarks,
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Measure on this machine what the cache costs and gains.",
)
