"""`agentmem agents`: what can be done to the agents of a running server, over HTTP."""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, cast
from urllib.parse import quote

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from .client import Client
from .errors import StartupError

app = typer.Typer(no_args_is_help=True, help="List the agents of a running server, and manage their caches.")

Id = Annotated[str, typer.Argument(help="the agent's id", show_default=False)]
Url = Annotated[str, typer.Option(envvar="AGENTMEM_URL", help="the server's address")]
Key = Annotated[str | None, typer.Option(envvar="AGENTMEM_API_KEY", help="API key, where the server needs one")]
Json = Annotated[bool, typer.Option("--json", help="print JSON, for programs")]
_CHUNK = 1 << 20


@app.callback()
def _options(context: typer.Context, url: Url = "http://127.0.0.1:8000", api_key: Key = None) -> None:
    context.obj = Client(url, api_key)


def _client(context: typer.Context) -> Client:
    return cast(Client, context.obj)


def _path(agent_id: str, operation: str = "") -> str:
    return f"/v1/agents/{quote(agent_id, safe='')}{operation}"


@app.command("list")
def list_agents(context: typer.Context, as_json: Json = False) -> None:
    """All agents: their tokens, their bytes, and where these are."""
    agents = _client(context).call("GET", "/v1/agents")["data"]
    if as_json:
        print(json.dumps(agents, indent=2))
        return
    table = Table(box=None, header_style="bold")
    for name in ("agent", "tier", "tokens", "branches", "RAM", "disk", "requests", "last use", ""):
        table.add_column(name, justify="left" if name in ("agent", "tier", "") else "right", overflow="fold")
    for a in sorted(agents, key=lambda a: -a["last_used"]):
        marks = [mark for mark in ("pinned", "ephemeral") if a[mark]] + ([f"ttl {a['ttl']:g} s"] if a["ttl"] else [])
        numbers = (f"{a['tokens']:,}", str(a["branches"]), size(a["ram_bytes"]), size(a["disk_bytes"]))
        table.add_row(a["agent_id"], a["tier"], *numbers, str(a["requests"]), ago(a["last_used"]), ", ".join(marks))
    console().print(table)


@app.command()
def show(context: typer.Context, agent_id: Id) -> None:
    """All that is known of one agent, as JSON."""
    _print(_client(context).call("GET", _path(agent_id)))


@app.command()
def pin(context: typer.Context, agent_id: Id) -> None:
    """Keep an agent in RAM and on disk, whoever else needs room."""
    _print(_client(context).call("POST", _path(agent_id, "/pin")))


@app.command()
def unpin(context: typer.Context, agent_id: Id) -> None:
    """Undo pin."""
    _print(_client(context).call("POST", _path(agent_id, "/unpin")))


@app.command()
def ttl(
    context: typer.Context,
    agent_id: Id,
    seconds: Annotated[float, typer.Argument(min=0, help="after its last use; 0: keep it for good")],
) -> None:
    """Let an agent expire some time after its last use."""
    _print(_client(context).call("POST", _path(agent_id, "/ttl"), json={"seconds": seconds or None}))


@app.command()
def evict(context: typer.Context, agent_id: Id) -> None:
    """Move an agent from RAM to disk."""
    _print(_client(context).call("POST", _path(agent_id, "/evict")))


@app.command()
def prefetch(context: typer.Context, agent_id: Id) -> None:
    """Read an agent from disk into RAM, before it is asked."""
    _print(_client(context).call("POST", _path(agent_id, "/prefetch")))


@app.command()
def prewarm(
    context: typer.Context,
    agent_id: Id,
    messages: Annotated[Path, typer.Argument(help="JSON file with a list of chat messages; - for standard input")],
) -> None:
    """Prefill messages into an agent's cache without an answer."""
    text = sys.stdin.read() if str(messages) == "-" else _read(messages)
    try:
        body = {"messages": json.loads(text)}
    except ValueError as e:
        raise StartupError(f"{messages}: not JSON: {e}") from None
    _print(_client(context).call("POST", _path(agent_id, "/prewarm"), json=body))


@app.command()
def fork(
    context: typer.Context,
    agent_id: Id,
    to: Annotated[str, typer.Argument(help="the new agent's id")],
    tokens: Annotated[int | None, typer.Option(help="fork after so many tokens (default: all)")] = None,
) -> None:
    """Make a second agent that goes on from where this one is. Nothing is copied."""
    _print(_client(context).call("POST", _path(agent_id, "/fork"), json={"to": to, "tokens": tokens}))


@app.command()
def truncate(
    context: typer.Context,
    agent_id: Id,
    tokens: Annotated[int | None, typer.Option(help="tokens to keep")] = None,
    messages: Annotated[int | None, typer.Option(help="messages to keep, the system prompt counts too")] = None,
) -> None:
    """Forget the end of what an agent holds."""
    body = {"tokens": tokens, "messages": messages}
    _print(_client(context).call("POST", _path(agent_id, "/truncate"), json=body))


@app.command()
def export(
    context: typer.Context,
    agent_id: Id,
    file: Annotated[Path, typer.Argument(help="file to write, such as alice.agentmem")],
) -> None:
    """Write an agent into one file. It is not encrypted, whether or not the store is."""
    if file.exists():
        raise StartupError(f"{file} exists already: choose another name, or delete it")
    part = file.with_name(file.name + ".part")
    try:
        with part.open("xb") as out, Progress(console=console(stderr=True), transient=True) as progress:
            part.chmod(0o600)
            task = progress.add_task(f"exporting {agent_id}", total=None)
            for chunk in _client(context).stream("POST", _path(agent_id, "/export")):
                out.write(chunk)
                progress.advance(task, len(chunk))
        part.rename(file)
    except OSError as e:
        raise StartupError(f"{file}: {e.strerror}") from None
    finally:
        part.unlink(missing_ok=True)
    _print({"agent_id": agent_id, "file": str(file), "bytes": file.stat().st_size})


@app.command("import")
def import_agent(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="a file that export wrote")],
    agent_id: Annotated[str | None, typer.Option(help="a name for it (default: the one it had)")] = None,
) -> None:
    """Make an agent of an exported file. It must come from the same model with the same cache settings."""
    try:
        with file.open("rb") as content, Progress(console=console(stderr=True), transient=True) as progress:
            task = progress.add_task(f"importing {file.name}", total=file.stat().st_size)

            def chunks() -> Iterator[bytes]:
                while chunk := content.read(_CHUNK):
                    yield chunk
                    progress.advance(task, len(chunk))

            params = {"agent_id": agent_id} if agent_id is not None else {}
            shown = _client(context).call("POST", "/v1/agents/import", params=params, content=chunks())
    except OSError as e:
        raise StartupError(f"{file}: {e.strerror}") from None
    _print(shown)


@app.command()
def rm(context: typer.Context, agent_ids: Annotated[list[str], typer.Argument(help="agents' ids")]) -> None:
    """Delete agents: returns when their bytes are off the disk."""
    for agent_id in agent_ids:
        _print(_client(context).call("DELETE", _path(agent_id)))


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


def console(*, stderr: bool = False) -> Console:
    """A wide one where nobody looks: a program wants whole lines."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, width=None if stream.isatty() else 200)


def _print(answer: dict[str, Any]) -> None:
    print(json.dumps(answer, indent=2, ensure_ascii=False))


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as e:
        raise StartupError(f"{path}: {e}") from None
