"""`agentmem status`: what a running server is, does, holds and lacks."""

import json
from collections import Counter
from typing import Any

import typer

from ..client import Client, RequestFailed
from ..errors import StartupError
from .agents import Json, Key, Url, connect, size


def status(url: Url = None, api_key: Key = None, as_json: Json = False) -> None:
    """Show the running server: model, device, agents, memory and store. Exit code 1: unhealthy, or
    nobody answers.
    """
    client = connect(url, api_key)
    try:
        found = _collect(client)
    except StartupError as e:
        raise RequestFailed(e.message) from None
    healthy = found["status"] in ("ok", "degraded")
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        print(_render(found, client.url))
    raise typer.Exit(0 if healthy else 1)


def _collect(client: Client) -> dict[str, Any]:
    """/health, and the agents of the key's namespace: None without a key that the server knows."""
    found = client.health()
    try:
        agents = client.call("GET", "/v1/agents")["data"]
    except RequestFailed:
        return found | {"agents": None}
    tiers = Counter(agent["tier"] for agent in agents)
    return found | {
        "agents": {
            "total": len(agents),
            **{tier: tiers[tier] for tier in ("hot", "warm", "cold")},
            "pinned": sum(agent["pinned"] for agent in agents),
            "tokens": sum(agent["tokens"] for agent in agents),
        }
    }


def _render(found: dict[str, Any], url: str) -> str:
    agents, store = found["agents"], found["store"]
    held = (
        ", ".join(f"{agents[name]} {name}" for name in ("hot", "warm", "cold", "pinned"))
        if agents
        else ""
    )
    rows = {
        "server": f"agentmem {found['version']} at {url}, up {duration(found['uptime'])}: {found['status']}",
        "model": f"{found['model']}, {found['max_context']:,} tokens, on {found['device']}",
        "cache": f"{found['cache']}; attention on {found['attention']}",
        "requests": f"{found['running']} running, {found['waiting']} waiting",
        "agents": f"{agents['total']}: {held}; {agents['tokens']:,} tokens"
        if agents
        else "not told without an API key",
        "memory": f"{_of(found['ram_bytes'], found['kv_budget'])} for caches (kv_budget), "
        f"process {_of(found['process_bytes'], found['memory_limit'])} (memory_limit)",
        "store": f"{_of(store['disk_bytes'], store['room_bytes'])} (store_quota, and what the disk has)",
    }
    lines = [f"{name:<9} {text}" for name, text in rows.items()]
    return "\n".join(lines + [f"{'problem':<9} {error}" for error in found["errors"]])


def _of(used: float, limit: float) -> str:
    return f"{size(used)} of {size(limit)}"


def duration(seconds: float) -> str:
    """In its two largest units."""
    minutes, hours, days = int(seconds // 60), int(seconds // 3600), int(seconds // 86400)
    if days:
        return f"{days} d {hours % 24} h"
    if hours:
        return f"{hours} h {minutes % 60} min"
    return f"{minutes} min {seconds % 60:.0f} s" if minutes else f"{seconds:.0f} s"
