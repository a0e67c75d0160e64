"""`agentmem bench`: what the cache costs and gains, measured on this machine."""

import typer

from .ablation import ablation
from .capacity import capacity
from .compare import compare
from .perplexity import perplexity
from .persistence import persistence
from .report import report
from .restore import restore
from .scenario import scenario
from .staggered import staggered
from .throughput import throughput
from .ttft import ttft
from .write import write

app = typer.Typer(
    no_args_is_help=True, help="Measure on this machine what the cache costs and gains."
)
_COMMANDS = (
    *(ttft, throughput, staggered, persistence, restore, write, ablation),
    *(compare, scenario, perplexity, capacity, report),
)
for _command in _COMMANDS:
    app.command()(_command)
