"""`agentmem bench`: what the cache costs and gains, measured on this machine."""

import typer

from .capacity import capacity
from .perplexity import perplexity
from .scenario import scenario
from .ttft import ttft

app = typer.Typer(no_args_is_help=True, help="Measure on this machine what the cache costs and gains.")
for _command in (ttft, perplexity, capacity, scenario):
    app.command()(_command)
