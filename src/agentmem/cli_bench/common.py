"""Options that benchmarks share, and what each does before and after it measures."""

import importlib
import inspect
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from ..bench import plot as plots
from ..cli.agents import console, progress_bar
from ..config import Settings, load_settings
from ..errors import ModelError, StartupError
from ..linux_cpu.prepare import prepare_mlx

if TYPE_CHECKING:
    from rich.progress import Progress

    from ..bench.prompts import Prompts
    from ..bench.session import Session
    from ..models.loading import LoadedModel

Model = Annotated[
    str | None,
    typer.Option(help="'demo', a directory with an MLX model, or a hub name (default: demo)"),
]
Corpus = Annotated[
    Path | None, typer.Option(help="text file in UTF-8 (default: the text of pydoc_data.topics)")
]
Plot = Annotated[
    Path | None, typer.Option(help="draw it there, as PNG, SVG or PDF", metavar="FILE")
]
Home = Annotated[
    Path | None, typer.Option(help="directory that holds models (default: ~/.agentmem)")
]
Config = Annotated[
    Path | None, typer.Option("--config", help="TOML file with settings, see configs/")
]
JsonFile = Annotated[
    Path | None, typer.Option("--json", help="write the result there", metavar="FILE")
]
Passes = Annotated[int, typer.Option(min=1, help="passes over all rows; a figure is their median")]
Shown = str | Table


@dataclass(frozen=True)
class Run:
    """A benchmark while it runs."""

    session: "Session"
    settings: Settings
    model: Path  # its directory
    progress: "Progress"
    corpus: Path | None

    @property
    def max_context(self) -> int:
        """Of the model, in tokens."""
        from ..models.model_dir import read_model_dir

        return read_model_dir(self.model).max_context

    def prompts(self) -> "Prompts":
        """Over the model's tokenizer, without the model."""
        from mlx_lm.utils import load_tokenizer

        from ..bench.prompts import Prompts

        return Prompts(load_tokenizer(self.model), self.corpus)

    def task(self, what: str, total: float) -> Callable[..., None]:
        """A progress bar; the function moves it on, by one or by what it is given."""
        return partial(self.progress.advance, self.progress.add_task(what, total=total))

    def load(self) -> "LoadedModel":
        from ..models.loading import load_model

        return load_model(str(self.model), self.settings.home_dir, self.session.say)

    def head(self, passes: int) -> dict[str, Any]:
        """What a Result begins with. To be called when all is measured: it looks at the noise."""
        from ..bench.machine import describe_machine

        machine = describe_machine()
        skip = {"home", "config", "model"}
        told = {
            name: str(getattr(self.settings, name))
            for name in self.settings.model_fields_set - skip
        }
        head = {
            "model": self.settings.model,
            "settings": told,
            "machine": machine,
            "date": machine.pop("date"),
        }
        return head | {"passes": passes, "noise": self.session.noise()}


@dataclass(frozen=True)
class Shared:
    """The options that `benchmark` gives a command."""

    model: Model = None
    corpus: Corpus = None
    json_file: JsonFile = None
    plot: Plot = None
    home: Home = None
    config: Config = None

    @contextmanager
    def run(self, **flags: Any) -> Iterator[Run]:
        """Settings, files that can be written, a model that is here, an empty directory, and nobody
        else measuring.
        """
        settings = load_settings({"model": self.model, "home": self.home} | flags, self.config)
        for file in filter(None, (self.json_file, self.plot)):
            check_writable(file)
        prepare_mlx(settings.home_dir)
        import httpx

        from ..bench.server import BenchError
        from ..bench.session import bench_session, check_room
        from ..models.loading import find_local

        if self.plot:
            plots.check_plot(self.plot)
        model = find_local(settings.model, settings.home_dir)
        if model is None:
            raise ModelError(
                f"model {settings.model!r} is not on this machine: agentmem pull {settings.model}"
            )
        check_room(settings)
        with (
            progress_bar() as progress,
            bench_session(partial(progress.console.print, markup=False)) as session,
        ):
            try:
                yield Run(session, settings, model.resolve(), progress, self.corpus)
            except httpx.TransportError as e:
                raise BenchError(f"a server broke off: {e}") from None


def benchmark(command: Callable[..., Any]) -> Callable[..., None]:
    """Give a command the options of Shared in place of its `shared`, --plot if bench.plot has a
    `plot_NAME`.

    What it returns, a Result or a dict, is written, shown by `tables` of its module, and drawn.
    """
    name = command.__name__
    draw = getattr(plots, f"plot_{name}", None)
    own = [p for p in inspect.signature(command).parameters.values() if p.name != "shared"]
    options = [p for p in inspect.signature(Shared).parameters.values() if draw or p.name != "plot"]

    def run(**values: Any) -> None:
        shared = Shared(**{p.name: values.pop(p.name) for p in options})
        result = command(shared, **values)
        text = (
            json.dumps(result, indent=2)
            if isinstance(result, dict)
            else result.model_dump_json(indent=2)
        )
        if shared.json_file:
            try:
                shared.json_file.write_text(text + "\n", encoding="utf-8")
            except OSError as e:
                print(text)
                raise StartupError(
                    f"{shared.json_file}: {e.strerror}; the result is on stdout"
                ) from None
        show(*tables(name, result))
        if draw and shared.plot:
            draw(json.loads(text), shared.plot)

    run.__name__, run.__doc__ = name, command.__doc__
    run.__signature__ = inspect.Signature([*own, *options])  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in (*own, *options)}
    return run


def tables(name: str, result: Any) -> list[Shown]:
    """Of a result of benchmark `name`."""
    made: list[Shown] = importlib.import_module(f".{name}", __package__).tables(result)
    return made


def show(*lines: Shown) -> None:
    """On stdout."""
    for line in lines:
        console().print(line, highlight=not isinstance(line, str))


def numbers(text: str, option: str, least: int = 1) -> list[int]:
    """ "256,1k" to [256, 1024], in rising order. StartupError names `option`."""
    try:
        found = {
            int(float(part[:-1]) * 1024) if part[-1:] in "kK" else int(part)
            for part in text.split(",")
        }
    except (ValueError, OverflowError):
        raise StartupError(
            f"{option} {text}: write whole numbers, comma-separated, such as 256,1k,2048"
        ) from None
    if not found or min(found) < least:
        raise StartupError(f"{option} {text}: each must be at least {least}")
    return sorted(found)


def check_writable(file: Path) -> None:
    """Before minutes of work, not after."""
    if not file.parent.is_dir():
        raise StartupError(f"{file}: can't be written: {file.parent} is no directory")
    if file.is_dir() or not os.access(file if file.exists() else file.parent, os.W_OK):
        raise StartupError(
            f"{file}: can't be written: {'it is a directory' if file.is_dir() else 'no permission'}"
        )
