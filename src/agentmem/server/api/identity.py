"""Who is the agent? Clients that know nothing of this server say it too, each in its own place."""

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
    def prompt_cache_key(self) -> str | None: ...
    @property
    def metadata(self) -> Mapping[str, Any] | None: ...
    @property
    def user(self) -> str | None: ...
    @property
    def safety_identifier(self) -> str | None: ...


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
    prompt_cache_key: str | None = None,
    metadata: Mapping[str, Any] | None = None,
    user: str | None = None,
    safety_identifier: str | None = None,
) -> str:
    """Return the first id that a request has in its headers and in these fields of its body.

    Their order is that of `_said` below; "anonymous" if there is none. Raises InvalidRequest, which
    names the field, where the first one can't be an agent id.
    """
    for name, value in _said(
        headers, agent_id, prompt_cache_key, metadata or {}, user, safety_identifier
    ):
        if isinstance(value, bytes):
            value = _decoded(name, value)
        if value is not None:
            return check_agent_id(value, "agent_id" if name == "x-agent-id" else name)
    return ANONYMOUS


def _said(
    headers: Headers,
    agent_id: str | None,
    prompt_cache_key: str | None,
    metadata: Mapping[str, Any],
    user: str | None,
    safety_identifier: str | None,
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


def _decoded(name: str, value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        param = "agent_id" if name == "x-agent-id" else name
        raise InvalidRequest(f"The header {name} is not valid UTF-8.", param=param) from None
