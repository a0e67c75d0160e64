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

# SHA-256 of a key: its namespace. How long a look-up takes says nothing of the keys
ApiKeys = dict[bytes, str]


def read_api_keys(path: Path | None) -> ApiKeys | None:
    """Return the keys in a TOML file; None where `path` is None.

    Its lines are `namespace = "key"` or `namespace = ["key", "sha256:HEX of a key"]`. Raises
    StartupError, which names the entry and shows no key.
    """
    if path is None:
        return None
    keys: ApiKeys = {}
    try:
        with path.expanduser().open("rb") as file:
            if os.fstat(file.fileno()).st_mode & 0o077:
                warning = "%s is open to other users of this machine: chmod 600 it"
                logging.getLogger(__name__).warning(warning, path)
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
    """Return the SHA-256 of namespace `name`'s key. ValueError: either can't be one."""
    if not 1 <= len(name) <= 64 or any(unicodedata.category(c) == "Cc" for c in name):
        wanted = "a namespace has 1 to 64 characters and no control characters"
        raise ValueError(f"{name[:65]!r}: {wanted}")
    if isinstance(key, str) and (digest := re.fullmatch("sha256:([0-9a-fA-F]{64})", key)):
        return bytes.fromhex(digest[1])
    if isinstance(key, str) and re.fullmatch("(?!sha256:)[!-~]{16,}", key):
        return hashlib.sha256(key.encode()).digest()
    wanted = "a string of 16 or more ASCII characters without spaces, or sha256:HEX of one"
    raise ValueError(f"{name!r}: a key is {wanted}")


def namespace_of(request: Request) -> str:
    """Return whose the request is.

    It is a KeyError, and so a 500, on one of the OPEN paths.
    """
    return str(request.scope["agentmem.namespace"])


def agent_of(request: Request, agent_id: str) -> AgentKey:
    """Return the key of the agent that the request means by `agent_id`."""
    return AgentKey(namespace_of(request), agent_id)


# what nobody needs a key for; it tells nothing of what agents hold
OPEN = frozenset({"/health", "/metrics", "/openapi.json"})


class ApiKeyCheck:
    """Gives every request its key's namespace, but for the OPEN paths.

    What has no valid key is refused before its body is read.
    """

    def __init__(self, app: ASGIApp, keys: ApiKeys | None, on_error: OnError):
        """`keys` None: no key is needed, and all are in the namespace "default"."""
        self._app = app
        self._keys = keys
        self._on_error = on_error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN:
            try:
                self._identify(scope)
            except Unauthorized as e:
                return await self._on_error(scope, e)(scope, receive, send)
        await self._app(scope, receive, send)

    def _identify(self, scope: Scope) -> None:
        """Note whose the request is, and the digest of the key that says so."""
        if self._keys is None:
            scope["agentmem.namespace"] = "default"
            return
        given = {key for name, value in scope["headers"] if (key := _key(name, value))}
        if not given:
            raise Unauthorized(
                "This server needs an API key: Authorization: Bearer KEY, or x-api-key: KEY."
            )
        if len(given) > 1:
            raise Unauthorized("Two different API keys were given; send one.")
        if (digest := hashlib.sha256(given.pop()).digest()) not in self._keys:
            raise Unauthorized("Incorrect API key provided.")
        scope["agentmem.namespace"] = self._keys[digest]
        scope["agentmem.key"] = digest


def _key(name: bytes, value: bytes) -> bytes:
    """Return the key in a header; it is empty where there is none."""
    if name == b"authorization":
        scheme, _, key = value.partition(b" ")
        return key.strip() if scheme.lower() == b"bearer" else b""
    return value.strip() if name == b"x-api-key" else b""
