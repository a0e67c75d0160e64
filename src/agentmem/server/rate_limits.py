"""How many requests a key may send in a minute, and how many tokens they may cost."""

import math
import time
from contextvars import ContextVar

from starlette.types import ASGIApp, Receive, Scope, Send

from ..engine.api import RequestStats
from ..errors import RateLimited
from .errors import OnError


class Allowance:
    """An amount that is used up by requests, and comes back steadily: all of it in a minute."""

    def __init__(self, per_minute: float):
        self._per_minute = per_minute
        self._left = per_minute
        self._at = time.monotonic()

    def wait(self, amount: float) -> float:
        """Return in how many seconds `amount` is there; 0: it is there now."""
        now = time.monotonic()
        come_back = (now - self._at) / 60 * self._per_minute
        self._left = min(self._per_minute, self._left + come_back)
        self._at = now
        return max(0.0, amount - self._left) / self._per_minute * 60

    def use(self, amount: float) -> None:
        """Use up `amount`, even where less is left: who comes next waits for longer."""
        self._left -= amount


_tokens: ContextVar[Allowance | None] = ContextVar("tokens", default=None)


def spend(stats: RequestStats) -> None:
    """Take what a request has cost off the tokens of the key that it came with.

    Those are the tokens that were computed: the prompt's that were not cached, and the answer's.
    """
    allowance = _tokens.get()
    if allowance is not None:
        allowance.use(stats.prompt_tokens - stats.cached_tokens + stats.completion_tokens)


class RateLimits:
    """Refuses a key's request when its minute is used up, before the body is read.

    Reading (GET) is free.
    """

    def __init__(self, app: ASGIApp, requests: int | None, tokens: int | None, on_error: OnError):
        """`requests`, `tokens`: of a key in a minute; None: as many as it likes."""
        self._app = app
        self._requests = requests
        self._tokens = tokens
        self._on_error = on_error
        self._allowances: dict[tuple[str, bytes], Allowance] = {}  # of what, and whose

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST":
            key = scope.get("agentmem.key", b"")
            requests = self._allowance("requests", key, self._requests)
            tokens = self._allowance("tokens", key, self._tokens)
            waits = {}
            if requests is not None:
                waits["requests"] = requests.wait(1)
            if tokens is not None:
                waits["tokens"] = tokens.wait(1)
            what = max(waits, key=waits.__getitem__, default="")
            if what and waits[what] > 0:
                limit = self._requests if what == "requests" else self._tokens
                error = RateLimited(f"{limit} {what} a minute", math.ceil(waits[what]))
                return await self._on_error(scope, error)(scope, receive, send)
            if requests is not None:
                requests.use(1)
            _tokens.set(tokens)
        await self._app(scope, receive, send)

    def _allowance(self, what: str, key: bytes, per_minute: int | None) -> Allowance | None:
        if per_minute is None:
            return None
        return self._allowances.setdefault((what, key), Allowance(per_minute))
