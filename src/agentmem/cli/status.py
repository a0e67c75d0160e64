"""`agentmem status`: what a running server is, does, holds and lacks."""

from collections import Counter
from typing import Any

import typer

from ..client import Client, RequestFailed
from ..errors import StartupError
from .options import Json, Key, Url, connect
from .show import duration, print_json, size

_TIERS = ("hot", "warm", "cold")


def status(url: Url = None, api_key: Key = None, as_json: Json = False) -> None:
    """Show the running server: model, agents, memory and store.

    The exit code is 1 where it is unhealthy, or nobody answers.
    """
    client = connect(url, api_key)
    try:
        found = _collect(client)
    except StartupError as e:
        raise RequestFailed(e.message) from None
    healthy = found["status"] in ("ok", "degraded")
    if as_json:
        print_json(found)
    else:
        print(_render(found, client.url))
    raise typer.Exit(0 if healthy else 1)


def _collect(client: Client) -> dict[str, Any]:
    """Return /health, and the agents of the key's namespace.

    These are None without a key that the server knows.
    """
    found = client.health()
    try:
        agents = client.call("GET", "/v1/agents")["data"]
    except RequestFailed:
        return found | {"agents": None}
    tiers = Counter(agent["tier"] for agent in agents)
    counts = {
        "total": len(agents),
        **{tier: tiers[tier] for tier in _TIERS},
        "pinned": sum(agent["pinned"] for agent in agents),
        "tokens": sum(agent["tokens"] for agent in agents),
    }
    return found | {"agents": counts}


def _render(found: dict[str, Any], url: str) -> str:
    store = found["store"]
    server = f"agentmem {found['version']} at {url}"
    ram = _of(found["ram_bytes"], found["kv_budget"])
    process = _of(found["process_bytes"], found["memory_limit"])
    disk = _of(store["disk_bytes"], store["room_bytes"])
    rows = {
        "server": f"{server}, up {duration(found['uptime'])}: {found['status']}",
        "model": f"{found['model']}, {found['max_context']:,} tokens, on {found['device']}",
        "cache": f"{found['cache']}; attention on {found['attention']}",
        "requests": f"{found['running']} running, {found['waiting']} waiting",
        "agents": _agents(found["agents"]),
        "memory": f"{ram} for caches (kv_budget), process {process} (memory_limit)",
        "store": f"{disk} (store_quota, and what the disk has)",
    }
    lines = [f"{name:<9} {text}" for name, text in rows.items()]
    lines += [f"{'problem':<9} {error}" for error in found["errors"]]
    return "\n".join(lines)


def _agents(agents: dict[str, int] | None) -> str:
    if agents is None:
        return "not told without an API key"
    held = ", ".join(f"{agents[name]} {name}" for name in (*_TIERS, "pinned"))
    return f"{agents['total']}: {held}; {agents['tokens']:,} tokens"


def _of(used: float, limit: float) -> str:
    return f"{size(used)} of {size(limit)}"
