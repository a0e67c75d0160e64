"""The process: bind, start the engine, serve until a signal, stop without losing anything."""

import asyncio
import contextlib
import errno
import ipaddress
import math
import signal
import socket
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from typing import Any, cast

import uvicorn

from ..config import Settings
from ..engine.engine import Engine
from ..errors import StartupError
from .app import create_app
from .auth import ApiKeys, read_api_keys
from .connection import PatientConnection

# s in which the app may say what took too long, before the connection is dropped
_NOTICE = 1.0
_ANY = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # listening everywhere: an address to reach it at


def serve(
    start_engine: Callable[[], Awaitable[Engine]],
    settings: Settings,
    ready: Callable[[str], None],
) -> int:
    """Serve until SIGTERM or SIGINT; return the exit code.

    `ready` is called with the URL once requests are accepted. Keys are read and the port is bound
    before `start_engine` is awaited, so that what is wrong there is found before a model is loaded.
    The first signal lets running answers finish within `settings.grace` seconds, a second one drops
    them; `engine.stop()` is awaited in any case. An engine that has failed ends it too, with exit
    code 1: whoever supervises starts another, which has what is on disk. Raises StartupError.
    """
    return asyncio.run(_serve(start_engine, settings, ready))


async def _serve(
    start_engine: Callable[[], Awaitable[Engine]],
    settings: Settings,
    ready: Callable[[str], None],
) -> int:
    keys = read_api_keys(settings.api_keys)
    if keys is None and not settings.insecure and not _is_loopback(settings.host):
        raise StartupError(
            f"listening on {settings.host} would let everybody in who reaches this machine: give "
            "--api-keys FILE, or --insecure if that is meant"
        )
    with _bind(settings.host, settings.port) as sock:
        engine = await start_engine()
        try:
            url = _url(settings.host, sock)
            engine.announce(url)
            server = _Server(engine, settings, keys, lambda: ready(url))
            for number in (signal.SIGTERM, signal.SIGINT):
                asyncio.get_running_loop().add_signal_handler(number, server.on_signal)
            await server.serve([sock])
        finally:
            await engine.stop()
    return 1 if engine.failed else 0


class _Server(uvicorn.Server):
    def __init__(
        self, engine: Engine, settings: Settings, keys: ApiKeys | None, ready: Callable[[], None]
    ):
        patience = settings.client_timeout + _NOTICE
        config = uvicorn.Config(
            create_app(engine, settings, keys),
            host=settings.host,
            port=settings.port,
            lifespan="off",
            ws="none",
            # it takes any callable that makes a protocol, though it names classes only
            http=cast(Any, partial(PatientConnection, patience=patience)),
            log_config=None,
            log_level=settings.log_level,
            access_log=settings.log_level == "debug",
            proxy_headers=False,
            server_header=False,
            # above the 5 s after which clients drop an idle connection: they close first
            timeout_keep_alive=30,
            # the engine cuts answers after the grace time
            timeout_graceful_shutdown=math.ceil(settings.grace) + 5,
        )
        super().__init__(config)
        self._engine = engine
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        try:
            await super().startup(sockets)
        except OSError as e:
            raise _cannot_listen(self.config.host, self.config.port, e) from e
        self._ready()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to `on_signal`.

        uvicorn would raise them again at the end, for a non-zero exit code.
        """
        yield

    async def on_tick(self, counter: int) -> bool:
        if self._engine.failed and not self.should_exit:
            self.on_signal()
        return await super().on_tick(counter)

    def on_signal(self) -> None:
        if self.should_exit:
            self.force_exit = True
            for connection in list(self.server_state.connections):
                if connection.transport is not None:
                    connection.transport.abort()
        else:
            self.should_exit = True
            self._engine.begin_drain()


def _bind(host: str, port: int) -> socket.socket:
    """Return a socket bound to `host`, to its IPv4 address where it has several.

    Raises StartupError.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, protocol, _, address = min(found, key=lambda info: info[0] != socket.AF_INET)
        # with its protocol, or asyncio leaves TCP_NODELAY off, and each answer waits 40 ms for the
        # client's ACK
        sock = socket.socket(family, socket.SOCK_STREAM, protocol)
    except OSError as e:
        raise _cannot_listen(host, port, e) from e
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind(address)
    except OSError as e:
        sock.close()
        raise _cannot_listen(host, port, e) from e
    return sock


def _is_loopback(host: str) -> bool:
    """Tell whether only this machine reaches `host`. A name that is not known is not bound."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError:
        return True
    addresses = {str(address[0]).partition("%")[0] for *_, address in found}
    return all(ipaddress.ip_address(address).is_loopback for address in addresses)


def _cannot_listen(host: str, port: int, error: OSError) -> StartupError:
    if error.errno == errno.EADDRINUSE:
        return StartupError(f"port {port} is in use: choose another with --port")
    if error.errno == errno.EACCES:
        use = "choose one above 1023 with --port"
        return StartupError(f"port {port} is not open to this user: {use}")
    return StartupError(f"can't listen on {host}: {error.strerror or error}")


def _url(host: str, sock: socket.socket) -> str:
    host = _ANY.get(host, host)
    host = f"[{host}]" if ":" in host else host
    return f"http://{host}:{sock.getsockname()[1]}"
