"""The options that benchmarks share, and what each does before and after it measures."""

import importlib
import inspect
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import httpx
import typer
from rich.progress import Progress
from rich.table import Table

from ...cli.options import Config, Home
from ...cli.show import console, progress_bar
from ...config import Settings, load_settings
from ...errors import ModelError, StartupError, program
from ...linux_cpu.prepare import prepare_mlx
from . import plot as plots
from .corpus import Prompts
from .machine import describe_machine
from .server import BenchError, Server
from .session import Session, bench_session, check_room

if TYPE_CHECKING:
    from ...models.loading import LoadedModel

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
JsonFile = Annotated[
    Path | None, typer.Option("--json", help="write the result there", metavar="FILE")
]
Passes = Annotated[int, typer.Option(min=1, help="passes over all rows; a figure is their median")]
Shown = str | Table


@dataclass(frozen=True)
class BenchRun:
    """A benchmark while it runs: what it measures with."""

    session: Session
    settings: Settings
    model: Path  # its directory
    progress: Progress
    corpus: Path | None

    @cached_property
    def max_context(self) -> int:
        """Tokens that the model's context holds."""
        from ...models.model_dir import read_model_dir

        return read_model_dir(self.model).max_context

    def check_context(self, tokens: int, option: str) -> None:
        """Raise StartupError, which names `option`, where the context does not hold `tokens`."""
        if tokens > self.max_context:
            raise StartupError(
                f"{option} and an answer are more than the model's context "
                f"of {self.max_context} tokens"
            )

    @cached_property
    def prompts(self) -> Prompts:
        """Prompts over the model's tokenizer, without the model."""
        from mlx_lm.utils import load_tokenizer

        return Prompts(load_tokenizer(self.model), self.corpus)

    def server(self, home: Path, settings: Settings | None = None) -> Server:
        """Start a server of this run's settings, or of others, that keeps its store in `home`."""
        return Server(self.session, settings or self.settings, self.model, home)

    def task(self, what: str, total: float) -> Callable[..., None]:
        """Show a progress bar; the function moves it on, by one or by what it is given."""
        return partial(self.progress.advance, self.progress.add_task(what, total=total))

    def load(self) -> "LoadedModel":
        """Load the model into this process."""
        from ...models.loading import load_model

        return load_model(str(self.model), self.settings.home_dir, self.session.say)

    def head(self, passes: int) -> dict[str, Any]:
        """Return what a Result begins with. Call it when all is measured: it looks at the noise."""
        machine = describe_machine()
        skip = {"home", "config", "model"}
        told = {
            name: str(getattr(self.settings, name))
            for name in self.settings.model_fields_set - skip
        }
        return {
            "model": self.settings.model,
            "settings": told,
            "date": machine.pop("date"),
            "machine": machine,
            "passes": passes,
            "noise": self.session.noise(),
        }


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
    def run(self, **flags: Any) -> Iterator[BenchRun]:
        """Check settings, files to write and the model; then measure alone, in an empty directory.

        `flags` are settings of the benchmark's own. MLX is first imported in here, after its BLAS.
        """
        chosen = {"model": self.model, "home": self.home} | flags
        settings = load_settings(chosen, self.config)
        for file in filter(None, (self.json_file, self.plot)):
            check_writable(file)
        prepare_mlx(settings.home_dir)
        from ...models.loading import find_local

        if self.plot:
            plots.check_plot(self.plot)
        model = find_local(settings.model, settings.home_dir)
        if model is None:
            raise ModelError(
                f"model {settings.model!r} is not on this machine: "
                f"{program()} pull {settings.model}"
            )
        check_room(settings)
        with progress_bar() as progress:
            say = partial(progress.console.print, markup=False)
            with bench_session(say) as session:
                try:
                    yield BenchRun(
                        session=session,
                        settings=settings,
                        model=model.resolve(),
                        progress=progress,
                        corpus=self.corpus,
                    )
                except httpx.TransportError as e:
                    raise BenchError(f"a server broke off: {e}") from None


def benchmark(
    tables: Callable[[Any], list[Shown]],
) -> Callable[[Callable[..., Any]], Callable[..., None]]:
    """Give a command the options of Shared in place of its `shared`.

    What it returns, a Result or a dict, is written, shown by `tables`, and drawn: it has --plot
    where plot.py has a `plot_NAME`.
    """

    def decorate(command: Callable[..., Any]) -> Callable[..., None]:
        name = command.__name__
        draw = plotter(name)
        parameters = inspect.signature(command).parameters.values()
        own = [p for p in parameters if p.name != "shared"]
        shared_options = inspect.signature(Shared).parameters.values()
        options = [p for p in shared_options if draw or p.name != "plot"]

        def run(**values: Any) -> None:
            shared = Shared(**{p.name: values.pop(p.name) for p in options})
            result = command(shared, **values)
            text = _json_text(result)
            if shared.json_file:
                _write(shared.json_file, text)
            show(*tables(result))
            if draw and shared.plot:
                draw(json.loads(text), shared.plot)

        run.__name__ = name
        run.__doc__ = command.__doc__
        run.__signature__ = inspect.Signature([*own, *options])  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in (*own, *options)}
        return run

    return decorate


def plotter(name: str) -> plots.Plotter | None:
    """Return what draws a result of benchmark `name`, if anything does."""
    return getattr(plots, f"plot_{name}", None)


def _json_text(result: Any) -> str:
    if isinstance(result, dict):
        return json.dumps(result, indent=2)
    text: str = result.model_dump_json(indent=2)
    return text


def _write(file: Path, text: str) -> None:
    """Write a result; print it instead where that fails, since it took minutes to measure."""
    try:
        file.write_text(text + "\n", encoding="utf-8")
    except OSError as e:
        print(text)
        raise StartupError(f"{file}: {e.strerror}; the result is on stdout") from None


def tables(name: str, result: Any) -> list[Shown]:
    """Return what benchmark `name` shows of its result."""
    module = importlib.import_module(f"agentmem.bench.{name}")
    made: list[Shown] = module.tables(result)
    return made


def show(*lines: Shown) -> None:
    """Print text and tables on stdout."""
    for line in lines:
        console().print(line, highlight=not isinstance(line, str))


def numbers(text: str, option: str, least: int = 1) -> list[int]:
    """Turn "256,1k" into [256, 1024], in rising order.

    The StartupError of a fault names `option`.
    """
    try:
        found = {_number(part) for part in text.split(",")}
    except (ValueError, OverflowError):
        raise StartupError(
            f"{option} {text}: write whole numbers, comma-separated, such as 256,1k,2048"
        ) from None
    if not found or min(found) < least:
        raise StartupError(f"{option} {text}: each must be at least {least}")
    return sorted(found)


def _number(text: str) -> int:
    return int(float(text[:-1]) * 1024) if text[-1:] in ("k", "K") else int(text)


def check_writable(file: Path) -> None:
    """Raise StartupError where a file can't be written: before minutes of work, not after."""
    if not file.parent.is_dir():
        raise StartupError(f"{file}: can't be written: {file.parent} is no directory")
    if file.is_dir():
        raise StartupError(f"{file}: can't be written: it is a directory")
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise StartupError(f"{file}: can't be written: no permission")
