"""What every request passes first: a request id, the Host check, the limit on its body, HEAD."""

import asyncio
import re
import uuid
from collections.abc import Collection, Iterable

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..errors import InvalidRequest, RequestTimeout
from .errors import REQUEST_ID_HEADERS, OnError

_SANE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
# bytes of an oversized body that are read and dropped, so that the client gets to see the answer
_DRAIN = 64 << 20
_SLOWEST = 10  # times as long as for a piece of it, a body may take in all


class RequestId:
    """Gives every response an id: the request's x-request-id where it is sane, else a new one."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _SANE_ID.fullmatch(given) else f"req_{uuid.uuid4().hex}"
        scope["agentmem.request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                for name in REQUEST_ID_HEADERS:
                    MutableHeaders(scope=message)[name] = request_id
            await send(message)

        await self._app(scope, receive, send_with_id)


class HostCheck:
    """Refuses Host headers that aren't ours.

    So no web page reaches the server by rebinding its own name.
    """

    def __init__(self, app: ASGIApp, allowed: Iterable[str], on_error: OnError):
        self._app = app
        self._on_error = on_error
        self._allowed = {_bracketed(host.lower()) for host in allowed}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or "*" in self._allowed or self._host(scope) in self._allowed:
            return await self._app(scope, receive, send)
        message = (
            "This Host header is not accepted; to use this name for the server, start it with "
            "--allowed-hosts."
        )
        error = InvalidRequest(message, code="host_not_allowed")
        await self._on_error(scope, error)(scope, receive, send)

    @staticmethod
    def _host(scope: Scope) -> str:
        """Return the Host header without its port: "localhost", "127.0.0.1", "[::1]"."""
        return re.sub(r":\d*$", "", Headers(scope=scope).get("host", "").lower())


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


class BodyLimit:
    """Reads the body, of at most `limit` bytes, before the app sees the request.

    A larger one is answered with 400, and one that stays half sent with 408.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        limit: int,
        patience: float,
        on_error: OnError,
        unlimited: Collection[str] = (),
    ):
        """`patience`: seconds that it waits for more; it waits _SLOWEST times as long for all.

        `unlimited`: paths whose bodies their routes read, and limit, by themselves.
        """
        self._app = app
        self._limit = limit
        self._patience = patience
        self._on_error = on_error
        self._unlimited = unlimited

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in self._unlimited:
            return await self._app(scope, receive, send)
        headers = Headers(scope=scope)
        if int(headers.get("content-length", 0)) > self._limit and "expect" in headers:
            # the client waits for our word before it sends
            return await self._refuse(scope, receive, send)
        try:
            async with asyncio.timeout(self._patience * _SLOWEST):
                body = await self._read(receive)
        except TimeoutError:
            error = RequestTimeout("The rest of the request's body did not come.")
            response = self._on_error(scope, error, {"connection": "close"})
            return await response(scope, receive, send)
        except ClientDisconnect:
            return
        if body is None:
            return await self._refuse(scope, receive, send)
        unread = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return unread.pop() if unread else await receive()

        await self._app(scope, replay, send)

    async def _read(self, receive: Receive) -> bytes | None:
        """Return the body, or None where it is too large.

        Raises TimeoutError and ClientDisconnect.
        """
        body: list[bytes] = []
        size = 0
        more = True
        while more and size <= _DRAIN + self._limit:
            async with asyncio.timeout(self._patience):
                message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnect()
            piece = message.get("body", b"")
            size += len(piece)
            more = message.get("more_body", False)
            if size <= self._limit:
                body.append(piece)
            else:
                body.clear()
        return b"".join(body) if size <= self._limit else None

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        message = (
            f"The request body is larger than the limit of {self._limit} bytes (setting max_body)."
        )
        error = InvalidRequest(message, code="request_too_large")
        response = self._on_error(scope, error, {"connection": "close"})
        await response(scope, receive, send)


class HeadAsGet:
    """Answers HEAD as it answers GET; the HTTP server leaves the body out."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "HEAD":
            scope = {**scope, "method": "GET"}
        await self._app(scope, receive, send)
