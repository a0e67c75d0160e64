"""The project's errors: one small tree.

server/app.py maps it to HTTP, and cli/main.py to exit codes.
"""

import shutil
import sys
from pathlib import Path


def program() -> str:
    """Return how the user calls `agentmem`, for hints: by its path where PATH does not know it."""
    called = Path(sys.argv[0])
    if called.parts[-2:] == ("agentmem", "__main__.py"):
        return f"{sys.executable} -m agentmem"
    if called.name != "agentmem":
        return "agentmem"  # a script or a test that calls it
    on_path = shutil.which("agentmem")
    is_on_path = on_path is not None and Path(on_path).resolve() == called.resolve()
    return "agentmem" if is_on_path else str(called)


class AgentMemError(Exception):
    """Base of every error that a user may see.

    `message` says what is wrong and what would be right.
    """

    status = 500
    type = "server_error"
    code: str | None = "internal_error"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code


class InvalidRequest(AgentMemError):
    """A request that can't be served as it stands; `param` names the field."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_value"


class ContextLengthExceeded(InvalidRequest):
    code = "context_length_exceeded"

    def __init__(
        self, prompt_tokens: int, max_context: int, why: str = "", *, param: str = "messages"
    ):
        """Name the limit; `why`: what sets it, if not the model; `param`: what is too long."""
        results = "results" if param == "prompt" else "result"
        super().__init__(
            f"This model's maximum context length is {max_context} tokens{why}, of which at least "
            f"one is for the answer, but the {param} {results} in {prompt_tokens} tokens. "
            f"Shorten the {param}.",
            param=param,
        )
        self.prompt_tokens = prompt_tokens
        self.max_context = max_context


class Unauthorized(AgentMemError):
    """No API key, or one that this server does not know. Type and code are OpenAI's."""

    status = 401
    type = "invalid_request_error"
    code = "invalid_api_key"


class NotFound(AgentMemError):
    status = 404
    type = "invalid_request_error"
    code = "not_found"


class AgentNotFound(NotFound):
    code = "agent_not_found"

    def __init__(self, agent_id: str):
        super().__init__(f"There is no agent {agent_id[:200]!r}.", param="agent_id")


class Conflict(AgentMemError):
    """What is asked for does not go with how the agent is now; nothing was changed."""

    status = 409
    type = "invalid_request_error"
    code = "conflict"


class Busy(AgentMemError):
    """The server is out of room for now; the client may try again after `retry_after` seconds."""

    status = 429
    type = "rate_limit_error"
    code = "queue_full"
    retry_after = 1


class RateLimited(Busy):
    """The key that a request came with has used up its minute."""

    code = "rate_limit_exceeded"

    def __init__(self, limit: str, retry_after: int):
        """Name the limit; `retry_after`: in how many seconds a request may come again."""
        super().__init__(f"This key may use {limit}: try again in {retry_after} s.")
        self.retry_after = retry_after


class RequestTimeout(InvalidRequest):
    """The client began to send a request, and kept the rest to itself."""

    status = 408
    code = "request_timeout"


class MemoryPressure(Busy):
    """The process is above `--memory-limit`, and evicting did not help."""

    status = 503
    type = "server_error"
    code = "memory_pressure"
    retry_after = 5


class StoreFailed(Busy):
    """The disk would not do it; /health has the reason, and it may pass."""

    status = 503
    type = "server_error"
    code = "store_failed"
    retry_after = 5


class ShuttingDown(Busy):
    status = 503
    type = "server_error"
    code = "shutting_down"
    retry_after = 5


class EngineFailed(AgentMemError):
    status = 503
    type = "server_error"
    code = "engine_failed"


class StartupError(AgentMemError):
    """The process can't start as it was asked to; the CLI prints the one line and exits with 2."""


class ModelError(StartupError):
    """A missing, broken or unsupported model."""


class StoreError(StartupError):
    """A store that can't be opened: locked by another process, of a newer format, unreadable."""


class CorruptSegment(AgentMemError):
    """A stored file that is missing, short, or fails its checksum.

    It is never served; the caller prefills again.
    """
