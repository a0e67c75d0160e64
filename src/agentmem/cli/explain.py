"""`agentmem agents explain`: why a prompt is cached as far as it is, side by side with what is
cached.
"""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from .agents import Id, Json, client_of, console, path_of, print_json, read_text


def explain(
    context: typer.Context,
    agent_id: Id,
    prompt: Annotated[
        Path | None,
        typer.Option(
            help="a chat (JSON: messages, or a request's body) or a rendered text; default: the last request"
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Why a prompt is cached as far as it is, and where it parts from what the agent has."""
    path = path_of(agent_id, "/explain")
    if prompt is None:
        found = client_of(context).call("GET", path)
    else:
        found = client_of(context).call("POST", path, json=_body(read_text(prompt)))
    if as_json:
        print_json(found)
        return
    print(
        f"{found['cached_tokens']:,} of {found['prompt_tokens']:,} tokens are cached. {found['explanation']}"
    )
    console().print(_side_by_side(found))


def _body(text: str) -> dict[str, Any]:
    """Of a request's body, all that its prompt depends on. What is no chat is a rendered text, JSON
    or not.
    """
    try:
        chat = json.loads(text)
    except ValueError:
        chat = None
    if isinstance(chat, list):
        return {"messages": chat}
    if not isinstance(chat, dict) or "messages" not in chat:
        return {"prompt": text}
    return {
        name: chat[name] for name in ("messages", "tools", "chat_template_kwargs") if name in chat
    }


def _side_by_side(found: dict[str, Any]) -> Table:
    """What both have, then what each has next: text as it is, line ends made visible, and token
    ids.
    """
    rows = Table(show_header=True, header_style="bold")
    columns = (
        f"both, up to token {found['common_tokens']:,}",
        "then the cache has",
        "then the prompt has",
    )
    for name in ("", *columns):
        rows.add_column(name, overflow="fold")
    sides = [found[side] for side in ("before", "cached", "prompt")]
    rows.add_row("text", *(Text(side["text"].replace("\n", "\u21b5\n")) for side in sides))
    rows.add_row("tokens", *(" ".join(map(str, side["tokens"])) for side in sides))
    return rows
