"""API keys: each belongs to a namespace, and whoever holds it sees nothing of the others."""

import hashlib
import logging
import os
import re
import tomllib
import unicodedata
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from ..agent_key import AgentKey
from ..errors import StartupError, Unauthorized
from .errors import OnError

ApiKeys = dict[
    bytes, str
]  # SHA-256 of a key: its namespace. How long a look-up takes says nothing of the keys


def read_api_keys(path: Path | None) -> ApiKeys | None:
    """Of a TOML file: `namespace = "key"` or `namespace = ["key", "sha256:HEX of a key"]`; None if
    there is no file.

    Raises StartupError, which names the entry and shows no key.
    """
    if path is None:
        return None
    keys: ApiKeys = {}
    try:
        with path.expanduser().open("rb") as file:
            if os.fstat(file.fileno()).st_mode & 0o077:
                logging.getLogger(__name__).warning(
                    "%s is open to other users of this machine: chmod 600 it", path
                )
            entries = tomllib.load(file)
        for name, entry in entries.items():
            for key in entry if isinstance(entry, list) else [entry]:
                if (other := keys.setdefault(_digest(name, key), name)) != name:
                    raise ValueError(f"{name!r} and {other!r} have a key in common")
    except (OSError, ValueError) as e:
        raise StartupError(f"--api-keys {path}: {e}") from None
    if not keys:
        raise StartupError(f"--api-keys {path}: holds no key, so nobody could get in")
    return keys


def _digest(name: str, key: Any) -> bytes:
    if not 1 <= len(name) <= 64 or any(unicodedata.category(c) == "Cc" for c in name):
        raise ValueError(
            f"{name[:65]!r}: a namespace has 1 to 64 characters and no control characters"
        )
    if isinstance(key, str) and (digest := re.fullmatch("sha256:([0-9a-fA-F]{64})", key)):
        return bytes.fromhex(digest[1])
    if isinstance(key, str) and re.fullmatch("(?!sha256:)[!-~]{16,}", key):
        return hashlib.sha256(key.encode()).digest()
    raise ValueError(
        f"{name!r}: a key is a string of 16 or more ASCII characters without spaces, or sha256:HEX of one"
    )


def namespace_of(request: Request) -> str:
    """Whose the request is. On a route that ApiKeyCheck does not guard, a KeyError and so a 500."""
    return str(request.scope["agentmem.namespace"])


def agent_of(request: Request, agent_id: str) -> AgentKey:
    """Return the key of the agent that the request means by `agent_id`."""
    return AgentKey(namespace_of(request), agent_id)


class ApiKeyCheck:
    """Gives every request under /v1 its key's namespace; refuses what has no valid key before its
    body is read.
    """

    def __init__(self, app: ASGIApp, keys: ApiKeys | None, on_error: OnError):
        """`keys` None: no key is needed, and all are in the namespace "default"."""
        self._app, self._keys, self._on_error = app, keys, on_error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith("/v1"):
            try:
                scope["agentmem.namespace"] = self._namespace(scope)
            except Unauthorized as e:
                return await self._on_error(scope, e)(scope, receive, send)
        await self._app(scope, receive, send)

    def _namespace(self, scope: Scope) -> str:
        if self._keys is None:
            return "default"
        given = {key for name, value in scope["headers"] if (key := _key(name, value))}
        if not given:
            raise Unauthorized(
                "This server needs an API key: Authorization: Bearer KEY, or x-api-key: KEY."
            )
        if len(given) > 1:
            raise Unauthorized("Two different API keys were given; send one.")
        if (digest := hashlib.sha256(given.pop()).digest()) not in self._keys:
            raise Unauthorized("Incorrect API key provided.")
        return self._keys[digest]


def _key(name: bytes, value: bytes) -> bytes:
    """The key in a header; empty where there is none."""
    if name == b"authorization":
        scheme, _, key = value.partition(b" ")
        return key.strip() if scheme.lower() == b"bearer" else b""
    return value.strip() if name == b"x-api-key" else b""
