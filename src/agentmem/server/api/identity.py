"""Who is the agent? Clients that know nothing of this server say it too, each in its own place."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from starlette.datastructures import Headers
from starlette.requests import Request

from ...agent_key import check_agent_id
from ...errors import InvalidRequest

ANONYMOUS = "anonymous"


class OpenAIBody(Protocol):
    """The fields by which a body of OpenAI's APIs may say who the agent is."""

    @property
    def agent_id(self) -> str | None: ...
    @property
    def prompt_cache_key(self) -> Any: ...
    @property
    def metadata(self) -> Mapping[str, Any] | None: ...
    @property
    def user(self) -> Any: ...
    @property
    def safety_identifier(self) -> Any: ...


def agent_id_of(request: Request, body: OpenAIBody) -> str:
    """Return the agent's id as `resolve_agent_id` does, of a request to one of OpenAI's APIs."""
    return resolve_agent_id(
        request.headers,
        agent_id=body.agent_id,
        prompt_cache_key=body.prompt_cache_key,
        metadata=body.metadata,
        user=body.user,
        safety_identifier=body.safety_identifier,
    )


def resolve_agent_id(
    headers: Headers,
    *,
    agent_id: str | None = None,
    prompt_cache_key: Any = None,
    metadata: Mapping[str, Any] | None = None,
    user: Any = None,
    safety_identifier: Any = None,
) -> str:
    """Return the first id that a request has in its headers and in these fields of its body.

    Their order is that of `_said` below; "anonymous" if there is none. Where the first one can't be
    an agent id, its hash is one; but agent_id and X-Agent-Id, which are meant for this server, are
    refused then: InvalidRequest.
    """
    for name, value in _said(
        headers, agent_id, prompt_cache_key, metadata or {}, user, safety_identifier
    ):
        if value is None:
            continue
        if name in ("agent_id", "x-agent-id"):
            return check_agent_id(_decoded(name, value), "agent_id")
        if value not in ("", b""):
            return _fitting(value)
    return ANONYMOUS


def _fitting(value: Any) -> str:
    """Return what a client says as an agent id: as it is, if it can be one, or its hash."""
    try:
        text = value.decode() if isinstance(value, bytes) else value
        return check_agent_id(text if isinstance(text, str) else json.dumps(text))
    except (InvalidRequest, UnicodeDecodeError):
        data = value if isinstance(value, bytes) else json.dumps(value, sort_keys=True).encode()
        return f"sha256-{hashlib.sha256(data).hexdigest()[:32]}"


def _said(
    headers: Headers,
    agent_id: str | None,
    prompt_cache_key: Any,
    metadata: Mapping[str, Any],
    user: Any,
    safety_identifier: Any,
) -> Iterator[tuple[str, Any]]:
    """Yield (field or header, what it says or None), the most particular first."""
    # of a header that was sent twice, the first
    given = {name.decode(): value for name, value in reversed(headers.raw)}

    def header(*names: str) -> Iterator[tuple[str, bytes | None]]:
        yield from ((name, given.get(name)) for name in names)

    yield "agent_id", agent_id
    yield from header("x-agent-id", "x-claude-code-agent-id")  # the latter is a subagent's
    yield from header("thread-id", "x-session-id", "x-session-affinity")  # Codex; OpenCode, aiperf
    yield "prompt_cache_key", prompt_cache_key
    yield from header("x-claude-code-session-id")
    yield "metadata.agent_id", metadata.get("agent_id")
    yield "metadata.user_id", _user_id(metadata.get("user_id"))
    yield from header("x-openwebui-chat-id")
    yield "user", user
    yield "safety_identifier", safety_identifier


def _user_id(user_id: Any) -> Any:
    """Return the agent in a user id.

    Claude Code's is an object as JSON, of which the agent or the session counts; any other is taken
    whole.
    """
    try:
        inside = json.loads(user_id) if isinstance(user_id, str) else None
    except (ValueError, RecursionError):
        return user_id
    if not isinstance(inside, dict):
        return user_id
    agent_id = inside.get("agent_id")
    return inside.get("session_id") if agent_id is None else agent_id


def _decoded(name: str, value: Any) -> Any:
    """Return the text of a header, or what a field holds. InvalidRequest: it is no text."""
    if not isinstance(value, bytes):
        return value
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise InvalidRequest(f"The header {name} is not valid UTF-8.", param="agent_id") from None
