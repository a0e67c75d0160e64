"""AgentKey: who an agent is, in every room of the house."""

import unicodedata
from typing import NamedTuple

from .errors import InvalidRequest

MAX_AGENT_ID = 256  # characters


class AgentKey(NamedTuple):
    """Names one agent: its namespace, which is what an API key may see, and its id there."""

    namespace: str
    agent_id: str


def check_agent_id(agent_id: object, param: str = "agent_id") -> str:
    """Return `agent_id`, if it can be one; raise InvalidRequest, which names `param`, if not.

    Any text of 1 to 256 characters will do, "../x" too: an id never becomes a path name.
    """
    if not isinstance(agent_id, str) or not 1 <= len(agent_id) <= MAX_AGENT_ID:
        long = f", not {len(agent_id)}" if isinstance(agent_id, str) else ""
        raise InvalidRequest(
            f"{param} must have 1 to {MAX_AGENT_ID} characters{long}.", param=param
        )
    for character in agent_id:
        if unicodedata.category(character) in ("Cc", "Cs"):
            message = (
                f"{param} must not hold control characters or lone surrogates, such as "
                f"{character!r}."
            )
            raise InvalidRequest(message, param=param)
    return agent_id
