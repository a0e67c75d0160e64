"""`agentmem agents`: what can be done to the agents of a running server, over HTTP."""

import json
import math
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, cast
from urllib.parse import quote

import typer
from rich.console import Console
from rich.progress import Progress, ProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from ..client import Client
from ..errors import StartupError
from ..service.files import State, holder, service_files

_DEFAULT_URL = "http://127.0.0.1:8000"
app = typer.Typer(
    no_args_is_help=True, help="List the agents of a running server, and manage their caches."
)


def _valid(text: str | None) -> str | None:
    """Arguments that aren't valid UTF-8 reach Python as lone surrogates, which no request can
    carry.
    """
    try:
        (text or "").encode()
    except UnicodeEncodeError:
        raise StartupError(f"{text!r} is not valid UTF-8, so it can't be an agent's id") from None
    return text


Id = Annotated[str, typer.Argument(help="the agent's id", show_default=False, callback=_valid)]
Url = Annotated[
    str | None,
    typer.Option(
        envvar="AGENTMEM_URL",
        help=f"the server's address (default: the running service's, else {_DEFAULT_URL})",
        show_default=False,
    ),
]
Key = Annotated[
    str | None, typer.Option(envvar="AGENTMEM_API_KEY", help="API key, where the server needs one")
]
Json = Annotated[bool, typer.Option("--json", help="print JSON, for programs")]
_CHUNK = 1 << 20


@app.callback()
def _options(context: typer.Context, url: Url = None, api_key: Key = None) -> None:
    context.obj = connect(url, api_key)


def connect(url: str | None, api_key: str | None) -> Client:
    """To `url`, by default to this user's service if it runs, else to where `agentmem serve`
    listens by default.
    """
    if url is None:
        files = service_files()
        runs = any(holder(lock) is not None for lock in (files.supervisor, files.server))
        state = State.read(files.state) if runs else None
        url = (state and state.url) or _DEFAULT_URL
    return Client(url, api_key)


def client_of(context: typer.Context) -> Client:
    return cast(Client, context.obj)


def path_of(agent_id: str, operation: str = "") -> str:
    # dots too: clients and proxies resolve "/../"
    return f"/v1/agents/{quote(_valid(agent_id) or '', safe='').replace('.', '%2E')}{operation}"


@app.command("list")
def list_agents(context: typer.Context, as_json: Json = False) -> None:
    """All agents: their tokens, their bytes, and where these are."""
    agents = client_of(context).call("GET", "/v1/agents")["data"]
    if as_json:
        print(json.dumps(agents, indent=2))
        return
    rows = table("agent", "tier", "tokens", "branches", "RAM", "disk", "last use", left=2)
    rows.add_column("", overflow="fold")
    for a in sorted(agents, key=lambda a: -a["last_used"]):
        marks = [mark for mark in ("pinned", "ephemeral") if a[mark]] + (
            [f"ttl {a['ttl']:g} s"] if a["ttl"] else []
        )
        numbers = (
            f"{a['tokens']:,}",
            str(a["branches"]),
            size(a["ram_bytes"]),
            size(a["disk_bytes"]),
        )
        # an id may look like markup
        rows.add_row(
            Text(a["agent_id"]), a["tier"], *numbers, ago(a["last_used"]), ", ".join(marks)
        )
    console().print(rows)


@app.command()
def show(context: typer.Context, agent_id: Id) -> None:
    """All that is known of one agent, as JSON."""
    print_json(client_of(context).call("GET", path_of(agent_id)))


@app.command()
def pin(context: typer.Context, agent_id: Id) -> None:
    """Keep an agent in RAM and on disk, whoever else needs room."""
    print_json(client_of(context).call("POST", path_of(agent_id, "/pin")))


@app.command()
def unpin(context: typer.Context, agent_id: Id) -> None:
    """Undo pin."""
    print_json(client_of(context).call("POST", path_of(agent_id, "/unpin")))


@app.command()
def ttl(
    context: typer.Context,
    agent_id: Id,
    seconds: Annotated[
        float, typer.Argument(min=0, help="after its last use; 0: keep it for good")
    ],
) -> None:
    """Let an agent expire some time after its last use."""
    if not math.isfinite(seconds):
        raise StartupError(f"seconds must be a number, not {seconds}; 0 keeps the agent for good")
    print_json(
        client_of(context).call(
            "POST", path_of(agent_id, "/ttl"), json={"seconds": seconds or None}
        )
    )


@app.command()
def evict(context: typer.Context, agent_id: Id) -> None:
    """Move an agent from RAM to disk."""
    print_json(client_of(context).call("POST", path_of(agent_id, "/evict")))


@app.command()
def prefetch(context: typer.Context, agent_id: Id) -> None:
    """Read an agent from disk into RAM, before it is asked."""
    print_json(client_of(context).call("POST", path_of(agent_id, "/prefetch")))


@app.command()
def prewarm(
    context: typer.Context,
    agent_id: Id,
    messages: Annotated[
        Path, typer.Argument(help="JSON file with a list of chat messages; - for standard input")
    ],
) -> None:
    """Prefill messages into an agent's cache without an answer."""
    text = sys.stdin.read() if str(messages) == "-" else read_text(messages)
    try:
        body = {"messages": json.loads(text)}
    except ValueError as e:
        raise StartupError(f"{messages}: not JSON: {e}") from None
    print_json(client_of(context).call("POST", path_of(agent_id, "/prewarm"), json=body))


@app.command()
def fork(
    context: typer.Context,
    agent_id: Id,
    to: Annotated[str, typer.Argument(help="the new agent's id", callback=_valid)],
    tokens: Annotated[
        int | None, typer.Option(help="fork after so many tokens (default: all)")
    ] = None,
) -> None:
    """Make a second agent that goes on from where this one is. Nothing is copied."""
    print_json(
        client_of(context).call(
            "POST", path_of(agent_id, "/fork"), json={"to": to, "tokens": tokens}
        )
    )


@app.command()
def truncate(
    context: typer.Context,
    agent_id: Id,
    tokens: Annotated[int | None, typer.Option(help="tokens to keep")] = None,
    messages: Annotated[
        int | None, typer.Option(help="messages to keep, the system prompt counts too")
    ] = None,
) -> None:
    """Forget the end of what an agent holds: give either --tokens or --messages."""
    if (tokens is None) == (messages is None):
        raise StartupError("give either --tokens or --messages")
    body = {"tokens": tokens, "messages": messages}
    print_json(client_of(context).call("POST", path_of(agent_id, "/truncate"), json=body))


@app.command()
def transcript(
    context: typer.Context,
    agent_id: Id,
    turn: Annotated[str | None, typer.Option(help="up to this turn (default: the newest)")] = None,
) -> None:
    """What was said to an agent, and what it answered, as JSON."""
    print_json(
        client_of(context).call(
            "GET", path_of(agent_id, "/transcript"), params={"turn": turn} if turn else {}
        )
    )


@app.command()
def export(
    context: typer.Context,
    agent_id: Id,
    file: Annotated[Path, typer.Argument(help="file to write, such as alice.agentmem")],
) -> None:
    """Write an agent into one file. It is not encrypted, whether or not the store is."""
    if file.exists():
        raise StartupError(f"{file} exists already: choose another name, or delete it")
    try:
        _export(client_of(context).stream("POST", path_of(agent_id, "/export")), agent_id, file)
    except OSError as e:
        raise StartupError(f"{file}: {e.strerror}") from None
    print_json({"agent_id": agent_id, "file": str(file), "bytes": file.stat().st_size})


def _export(chunks: Iterator[bytes], agent_id: str, file: Path) -> None:
    """Under a name of its own, 0600, until all is there. Nothing is left if it does not arrive
    whole.
    """
    with tempfile.NamedTemporaryFile(
        dir=file.parent, prefix=".agentmem-", suffix=".part", delete=False
    ) as out:
        try:
            with progress_bar() as progress:
                task = progress.add_task(f"exporting {agent_id}", total=None)
                for chunk in chunks:
                    out.write(chunk)
                    progress.advance(task, len(chunk))
            out.flush()
            Path(out.name).rename(file)
        except BaseException:
            Path(out.name).unlink(missing_ok=True)
            raise


@app.command("import")
def import_agent(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="a file that export wrote")],
    agent_id: Annotated[
        str | None, typer.Option(help="a name for it (default: the one it had)", callback=_valid)
    ] = None,
) -> None:
    """Make an agent of an exported file. It must come from the same model with the same cache
    settings.
    """
    try:
        with file.open("rb") as content, progress_bar() as progress:
            task = progress.add_task(f"importing {file.name}", total=file.stat().st_size)

            def chunks() -> Iterator[bytes]:
                while chunk := content.read(_CHUNK):
                    yield chunk
                    progress.advance(task, len(chunk))

            params = {"agent_id": agent_id} if agent_id is not None else {}
            shown = client_of(context).call(
                "POST", "/v1/agents/import", params=params, content=chunks()
            )
    except OSError as e:
        raise StartupError(f"{file}: {e.strerror}") from None
    print_json(shown)


@app.command()
def rm(
    context: typer.Context, agent_ids: Annotated[list[str], typer.Argument(help="agents' ids")]
) -> None:
    """Delete agents: returns when their bytes are off the disk."""
    for agent_id in agent_ids:
        print_json(client_of(context).call("DELETE", path_of(agent_id)))


def size(nbytes: float) -> str:
    for unit in ("B", "KB", "MB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} GB"


def ago(moment: float) -> str:
    seconds = max(0, time.time() - moment)
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"


def table(*names: str, left: int = 1) -> Table:
    """The first `left` columns to the left, numbers to the right. The very first folds where a
    terminal is narrow.
    """
    made = Table(box=None, header_style="bold", padding=(0, 1, 0, 0), pad_edge=False)
    for i, name in enumerate(names):
        made.add_column(
            name, justify="left" if i < left else "right", overflow="fold", no_wrap=i > 0
        )
    return made


def progress_bar(*columns: ProgressColumn) -> Progress:
    """Shown after its description, by default with rich's columns. Silent where nobody looks:
    stderr is for errors.
    """
    text = TextColumn("{task.description}", markup=False)
    shown = console(stderr=True)
    rest = columns or (
        *Progress.get_default_columns()[1:],
        TimeElapsedColumn(),
    )  # moves within a long step, too
    return Progress(text, *rest, console=shown, transient=True, disable=not shown.is_terminal)


def console(*, stderr: bool = False) -> Console:
    """A wide one where nobody looks: a program wants whole lines."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, width=None if stream.isatty() else 200, markup=False)


def print_json(answer: dict[str, Any]) -> None:
    print(json.dumps(answer, indent=2, ensure_ascii=False))


def read_text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError as e:
        raise StartupError(f"{path}: {e.strerror}") from None
    except UnicodeDecodeError as e:
        raise StartupError(f"{path}: {e}") from None
