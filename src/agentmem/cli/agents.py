"""`agentmem agents`: what can be done to the agents of a running server, over HTTP."""

import json
import math
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from ..client import Client, agent_path, check_utf8
from ..errors import StartupError
from .options import Json, group_options, with_client
from .show import ago, console, print_json, progress_bar, size, table

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="List the agents of a running server, and manage their caches.",
)
app.callback()(group_options)

Id = Annotated[
    str, typer.Argument(help="Id of the agent.", show_default=False, callback=check_utf8)
]
_CHUNK = 1 << 20  # bytes


@app.command("list")
@with_client
def list_agents(client: Client, as_json: Json = False) -> None:
    """List all agents: tokens, and bytes in RAM and on disk."""
    agents = client.call("GET", "/v1/agents")["data"]
    if as_json:
        print_json(agents)
        return
    rows = table("agent", "tier", "tokens", "branches", "RAM", "disk", "last use", left=2)
    rows.add_column("", overflow="fold")
    for agent in sorted(agents, key=lambda agent: -agent["last_used"]):
        rows.add_row(
            Text(agent["agent_id"]),  # an id may look like markup
            agent["tier"],
            f"{agent['tokens']:,}",
            str(agent["branches"]),
            size(agent["ram_bytes"]),
            size(agent["disk_bytes"]),
            ago(agent["last_used"]),
            ", ".join(_marks(agent)),
        )
    console().print(rows)


def _marks(agent: dict[str, Any]) -> list[str]:
    marks = [mark for mark in ("pinned", "ephemeral") if agent[mark]]
    if agent["ttl"]:
        marks.append(f"ttl {agent['ttl']:g} s")
    return marks


@app.command()
@with_client
def show(client: Client, agent_id: Id) -> None:
    """Print all that is known of one agent."""
    print_json(client.call("GET", agent_path(agent_id)))


@app.command()
@with_client
def transcript(
    client: Client,
    agent_id: Id,
    turn: Annotated[
        str | None, typer.Option(help="Last turn to print (default: the newest).")
    ] = None,
) -> None:
    """Print what was said to an agent and what it answered."""
    params = {"turn": turn} if turn else {}
    print_json(client.call("GET", agent_path(agent_id, "/transcript"), params=params))


@app.command()
@with_client
def explain(
    client: Client,
    agent_id: Id,
    prompt: Annotated[
        Path | None,
        typer.Option(
            help="A chat (JSON: messages, or the body of a request) or a rendered text "
            "(default: the last request)."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Say why a prompt is cached as far as it is.

    Show where it parts from what the agent has.
    """
    path = agent_path(agent_id, "/explain")
    if prompt is None:
        found = client.call("GET", path)
    else:
        found = client.call("POST", path, json=_prompt_body(_read_text(prompt)))
    if as_json:
        print_json(found)
        return
    cached = f"{found['cached_tokens']:,} of {found['prompt_tokens']:,} tokens are cached."
    print(f"{cached} {found['explanation']}")
    console().print(_side_by_side(found))


def _prompt_body(text: str) -> dict[str, Any]:
    """Make a request to explain of a file: of a chat, all that its prompt depends on.

    What is no chat is a rendered text, JSON or not.
    """
    try:
        chat = json.loads(text)
    except ValueError:
        chat = None
    if isinstance(chat, list):
        return {"messages": chat}
    if not isinstance(chat, dict) or "messages" not in chat:
        return {"prompt": text}
    known = ("messages", "tools", "chat_template_kwargs")
    return {name: chat[name] for name in known if name in chat}


def _side_by_side(found: dict[str, Any]) -> Table:
    """Show what both have, then what each has next: text, with visible line ends, and token ids."""
    rows = Table(show_header=True, header_style="bold")
    both = f"both, up to token {found['common_tokens']:,}"
    for name in ("", both, "then the cache has", "then the prompt has"):
        rows.add_column(name, overflow="fold")
    sides = [found[side] for side in ("before", "cached", "prompt")]
    rows.add_row("text", *(Text(side["text"].replace("\n", "\u21b5\n")) for side in sides))
    rows.add_row("tokens", *(" ".join(map(str, side["tokens"])) for side in sides))
    return rows


@app.command()
@with_client
def fork(
    client: Client,
    agent_id: Id,
    to: Annotated[str, typer.Argument(help="Id of the new agent.", callback=check_utf8)],
    tokens: Annotated[
        int | None, typer.Option(help="Fork after so many tokens (default: all).")
    ] = None,
) -> None:
    """Make a second agent that goes on from where this one is. Nothing is copied."""
    body = {"to": to, "tokens": tokens}
    print_json(client.call("POST", agent_path(agent_id, "/fork"), json=body))


@app.command()
@with_client
def truncate(
    client: Client,
    agent_id: Id,
    tokens: Annotated[int | None, typer.Option(help="Tokens to keep.")] = None,
    messages: Annotated[
        int | None, typer.Option(help="Messages to keep; the system prompt counts too.")
    ] = None,
) -> None:
    """Forget the end of what an agent holds. Give either --tokens or --messages."""
    if (tokens is None) == (messages is None):
        raise StartupError("give either --tokens or --messages")
    body = {"tokens": tokens, "messages": messages}
    print_json(client.call("POST", agent_path(agent_id, "/truncate"), json=body))


@app.command()
@with_client
def prewarm(
    client: Client,
    agent_id: Id,
    messages: Annotated[
        Path, typer.Argument(help="JSON file with a list of chat messages; - for standard input.")
    ],
) -> None:
    """Prefill messages into an agent's cache without an answer."""
    text = sys.stdin.read() if str(messages) == "-" else _read_text(messages)
    try:
        body = {"messages": json.loads(text)}
    except ValueError as e:
        raise StartupError(f"{messages}: not JSON: {e}") from None
    print_json(client.call("POST", agent_path(agent_id, "/prewarm"), json=body))


@app.command()
@with_client
def prefetch(client: Client, agent_id: Id) -> None:
    """Read an agent from disk into RAM, before it is asked."""
    print_json(client.call("POST", agent_path(agent_id, "/prefetch")))


@app.command()
@with_client
def evict(client: Client, agent_id: Id) -> None:
    """Move an agent from RAM to disk."""
    print_json(client.call("POST", agent_path(agent_id, "/evict")))


@app.command()
@with_client
def pin(client: Client, agent_id: Id) -> None:
    """Keep an agent in RAM and on disk, whoever else needs room."""
    print_json(client.call("POST", agent_path(agent_id, "/pin")))


@app.command()
@with_client
def unpin(client: Client, agent_id: Id) -> None:
    """Undo pin."""
    print_json(client.call("POST", agent_path(agent_id, "/unpin")))


@app.command()
@with_client
def ttl(
    client: Client,
    agent_id: Id,
    seconds: Annotated[
        float, typer.Argument(min=0, help="Seconds after its last use; 0: keep it for good.")
    ],
) -> None:
    """Let an agent expire some time after its last use."""
    if not math.isfinite(seconds):
        raise StartupError(f"seconds must be a number, not {seconds}; 0 keeps the agent for good")
    body = {"seconds": seconds or None}
    print_json(client.call("POST", agent_path(agent_id, "/ttl"), json=body))


@app.command()
@with_client
def export(
    client: Client,
    agent_id: Id,
    file: Annotated[Path, typer.Argument(help="File to write, such as alice.agentmem.")],
) -> None:
    """Write an agent into one file. It is not encrypted, whether or not the store is."""
    if file.exists():
        raise StartupError(f"{file} exists already: choose another name, or delete it")
    try:
        _export(client.stream("POST", agent_path(agent_id, "/export")), agent_id, file)
    except OSError as e:
        raise StartupError(f"{file}: {e.strerror}") from None
    print_json({"agent_id": agent_id, "file": str(file), "bytes": file.stat().st_size})


def _export(chunks: Iterator[bytes], agent_id: str, file: Path) -> None:
    """Write a private file, under a name of its own until all is there.

    Nothing is left if it does not arrive whole.
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
@with_client
def import_agent(
    client: Client,
    file: Annotated[Path, typer.Argument(help="A file that export wrote.")],
    agent_id: Annotated[
        str | None,
        typer.Option(help="Id for the agent (default: the one it had).", callback=check_utf8),
    ] = None,
) -> None:
    """Make an agent of an exported file.

    It must come from the same model with the same cache settings.
    """
    params = {"agent_id": agent_id} if agent_id is not None else {}
    try:
        with file.open("rb") as content, progress_bar() as progress:
            task = progress.add_task(f"importing {file.name}", total=file.stat().st_size)

            def chunks() -> Iterator[bytes]:
                while chunk := content.read(_CHUNK):
                    yield chunk
                    progress.advance(task, len(chunk))

            shown = client.call("POST", "/v1/agents/import", params=params, content=chunks())
    except OSError as e:
        raise StartupError(f"{file}: {e.strerror}") from None
    print_json(shown)


@app.command()
@with_client
def rm(
    client: Client, agent_ids: Annotated[list[str], typer.Argument(help="Ids of the agents.")]
) -> None:
    """Delete agents, and return when their bytes are off the disk."""
    for agent_id in agent_ids:
        print_json(client.call("DELETE", agent_path(agent_id)))


def _read_text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError as e:
        raise StartupError(f"{path}: {e.strerror}") from None
    except UnicodeDecodeError as e:
        raise StartupError(f"{path}: {e}") from None
