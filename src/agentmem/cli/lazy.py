"""A group of commands that imports a command's module when the command is called."""

import importlib
from typing import Any, ClassVar, NamedTuple

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command, get_group


class Lazy(NamedTuple):
    """A command that is not imported yet."""

    module: str  # such as "agentmem.cli.agents"
    name: str  # there: a typer.Typer, or a function that is one command
    help: str  # what the group's help says of it: the first sentence of its own


class LazyGroup(TyperGroup):
    """Lists commands by what `lazy` says of them, and imports the one that is called."""

    lazy: ClassVar[dict[str, Lazy]]  # by the command's name, in the order of the help

    def __init__(self, **attributes: Any):
        super().__init__(**attributes)
        listed = {
            name: TyperCommand(name=name, short_help=one.help) for name, one in self.lazy.items()
        }
        self._listed = listed | dict(self.commands)
        self.commands = dict(self._listed)  # whose names are suggested for a wrong one

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name in self.lazy:
            return load(cmd_name, self.lazy[cmd_name])
        return super().get_command(ctx, cmd_name)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Show a plain group of the same commands: none is imported for its help."""
        shown = TyperGroup(
            name=self.name,
            help=self.help,
            params=self.params,
            commands=self._listed,
            rich_markup_mode=None,
        )
        shown.format_help(ctx, formatter)


def load(name: str, lazy: Lazy) -> Any:
    """Import a command or a group of commands."""
    found = getattr(importlib.import_module(lazy.module), lazy.name)
    if isinstance(found, typer.Typer):
        group = get_group(found)
        group.name = name
        return group
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command(name)(found)
    return get_command(app)
