"""`agentmem bench`: what the cache costs and gains, measured on this machine."""

import typer

from .ablation import ablation
from .capacity import capacity
from .compare import compare
from .perplexity import perplexity
from .persistence import persistence
from .report import report
from .restore import restore
from .ttft import ttft
from .write import write

app = typer.Typer(no_args_is_help=True, help="Measure on this machine what the cache costs and gains.")
for _command in (ttft, persistence, restore, write, ablation, compare, perplexity, capacity, report):
    app.command()(_command)
