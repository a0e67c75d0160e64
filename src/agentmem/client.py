"""The HTTP client of a running server, and the one reader of event streams."""

import json
import re
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote

import httpx
from httpx_sse import EventSource, SSEError

from .errors import AgentMemError, StartupError, Unauthorized, program

_TIMEOUT = httpx.Timeout(10.0, read=None)  # s; an answer may wait for a long prefill
_HEALTH_SECONDS = 10.0


class RequestFailed(AgentMemError):
    """The server answered with an error."""


class Client:
    """Talks to one server. Errors are RequestFailed and, where nobody answers, StartupError."""

    def __init__(self, url: str, api_key: str | None = None, *, if_absent: str = ""):
        """Take a `url` with or without /v1; `if_absent` says what to do where nobody answers."""
        self._if_absent = if_absent or f"start it ({program()} serve), or give --url"
        self.url = url.rstrip("/").removesuffix("/v1")
        # a proxy of the environment's is for other machines
        self._proxies = (
            re.match(r"https?://(localhost|127\.[\d.]+|\[::1\])(:|/|$)", self.url) is None
        )
        self._headers = {"authorization": f"Bearer {api_key}"} if api_key else {}

    def call(self, method: str, path: str, **request: Any) -> dict[str, Any]:
        """Return the answer's JSON."""
        answer = b"".join(self.stream(method, path, **request))
        try:
            found = json.loads(answer)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise self._is_another(f"{path} answered with no JSON object")
        return found

    def health(self) -> dict[str, Any]:
        """Return what /health says, of a server that isn't healthy too; wait 10 s at most."""
        try:
            response = httpx.get(
                f"{self.url}/health",
                headers=self._headers,
                timeout=_HEALTH_SECONDS,
                trust_env=self._proxies,
            )
            found = response.json() if response.status_code in (200, 503) else None
        except httpx.ConnectError:
            raise self._nobody() from None
        except (httpx.HTTPError, httpx.InvalidURL) as e:
            raise StartupError(f"{self.url}: {type(e).__name__}: {e}") from None
        except ValueError:
            found = None
        # others have a status too
        if not isinstance(found, dict) or not {"status", "errors"} <= found.keys():
            raise self._is_another(f"/health answered {response.status_code}")
        return found

    def events(
        self, method: str, path: str, **request: Any
    ) -> Generator[dict[str, Any], None, None]:
        """Yield the JSON of a stream of server-sent events, as it comes.

        An error among them is raised as RequestFailed.
        """
        with self._response(method, path, **request) as response:
            try:
                for event in read_events(response):
                    if "error" in event:
                        raise RequestFailed(event["error"]["message"], code=event["error"]["code"])
                    yield event
            except SSEError:
                raise self._is_another(f"{path} answered with no stream of events") from None

    def stream(self, method: str, path: str, **request: Any) -> Generator[bytes, None, None]:
        """Yield the answer's body, as it comes."""
        with self._response(method, path, **request) as response:
            yield from response.iter_bytes()

    @contextmanager
    def _response(self, method: str, path: str, **request: Any) -> Iterator[httpx.Response]:
        """Give an answer whose body is still to come."""
        try:
            with (
                httpx.Client(
                    base_url=self.url,
                    headers=self._headers,
                    timeout=_TIMEOUT,
                    trust_env=self._proxies,
                ) as client,
                client.stream(method, path, **request) as response,
            ):
                if response.status_code >= 400:
                    response.read()
                    raise _failed(response)
                yield response
        except httpx.ConnectError:
            raise self._nobody() from None
        except (httpx.RemoteProtocolError, httpx.ReadError):
            raise StartupError(
                f"the server at {self.url} went away before its answer was whole"
            ) from None
        except (httpx.HTTPError, httpx.InvalidURL) as e:
            raise StartupError(f"{self.url}: {type(e).__name__}: {e}") from None

    def _is_another(self, what: str) -> RequestFailed:
        return RequestFailed(f"{self.url}{what}: is this an agentmem server?")

    def _nobody(self) -> StartupError:
        return StartupError(f"no server answers at {self.url}: {self._if_absent}")


def read_events(response: httpx.Response) -> Iterator[dict[str, Any]]:
    """Yield the JSON object of each server-sent event, as soon as its bytes are there.

    Pings and the end's [DONE] are none. Raise SSEError where the answer is no stream of events.
    """
    for event in EventSource(response).iter_sse():
        if event.data.startswith("{"):
            yield json.loads(event.data)


def agent_path(agent_id: str, operation: str = "") -> str:
    """Return the path of an agent, or of an operation such as "/fork" on it."""
    # dots too: clients and proxies resolve "/../"
    name = quote(check_utf8(agent_id) or "", safe="").replace(".", "%2E")
    return f"/v1/agents/{name}{operation}"


def check_utf8(text: str | None) -> str | None:
    """Return an argument, or raise StartupError where no request can carry it.

    What is not valid UTF-8 reaches Python as lone surrogates.
    """
    try:
        (text or "").encode()
    except UnicodeEncodeError:
        raise StartupError(f"{text!r} is not valid UTF-8, so it can't be an agent's id") from None
    return text


def _failed(response: httpx.Response) -> RequestFailed:
    try:
        error = response.json()["error"]
        message = error["message"]
        code = error.get("code")
        if code == Unauthorized.code:
            message += " Give a key with --api-key or AGENTMEM_API_KEY."
        return RequestFailed(message, code=code)
    except (ValueError, KeyError, TypeError, AttributeError):
        where = f"{response.request.url} answered {response.status_code}"
        return RequestFailed(f"{where}: is this an agentmem server?")
