"""Errors as responses, each in the shape of the API that its path belongs to."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, cast

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.types import Scope

from ..errors import AgentMemError, Busy, InvalidRequest, Unauthorized

REQUEST_ID_HEADERS = ("x-request-id", "request-id")  # OpenAI's, and Anthropic's


class OnError(Protocol):
    """What middleware answers with, see `ErrorResponses.response`."""

    def __call__(
        self, scope: Scope, error: AgentMemError, headers: dict[str, str] | None = None
    ) -> Response: ...


_ECHO = 200  # characters of the client's own text (field names, paths) that an error repeats
_HTTP_CODES = {400: "invalid_body", 404: "not_found", 405: "method_not_allowed"}
_VALIDATION_CODES = {
    "extra_forbidden": "unknown_parameter",
    "missing": "missing_required_parameter",
    "unsupported_parameter": "unsupported_parameter",
    "json_invalid": "invalid_json",
}


def openai_error(error: AgentMemError, request_id: str = "") -> dict[str, Any]:
    """Return the body of an error as OpenAI's APIs have it; its request id goes in a header.

    Text of the client's that isn't valid Unicode is escaped: the body must be valid UTF-8.
    """

    def clean(text: str | None) -> str | None:
        return text and text.encode(errors="backslashreplace").decode()

    return {
        "error": {
            "message": clean(error.message),
            "type": error.type,
            "param": clean(error.param),
            "code": error.code,
        }
    }


def own_status(error: AgentMemError) -> int:
    """Return the HTTP status that the error itself says."""
    return error.status


@dataclass(frozen=True)
class ErrorShape:
    """How an API answers with an error."""

    body: Callable[[AgentMemError, str], dict[str, Any]]  # of an error, and of the request's id
    status: Callable[[AgentMemError], int] = own_status  # HTTP's


_OPENAI = ErrorShape(openai_error)


class ErrorResponses:
    """Every error of the server becomes a response here, in OpenAI's shape where no other is set.

    An API sets its own for the paths that it serves, in its `add_routes`.
    """

    def __init__(self) -> None:
        self._shapes: dict[str, ErrorShape] = {}
        self._by_header: list[tuple[str, bytes, ErrorShape]] = []

    def set_shape(self, prefix: str, shape: ErrorShape) -> None:
        """Give errors this shape on the path `prefix` and on all paths below it."""
        self._shapes[prefix] = shape

    def set_shape_for(self, prefix: str, header: str, shape: ErrorShape) -> None:
        """Give errors this shape there for requests with `header`, whatever its value."""
        self._by_header.append((prefix, header.encode(), shape))

    def response(
        self, scope: Scope, error: AgentMemError, headers: dict[str, str] | None = None
    ) -> Response:
        """Return the response to the request of `scope`, which RequestId has seen."""
        headers = dict(headers or {})
        if isinstance(error, Busy):
            headers["retry-after"] = str(error.retry_after)
        if isinstance(error, Unauthorized):
            headers["www-authenticate"] = "Bearer"
        shape = self._shape_for(scope) or self._shape(scope["path"])
        body = shape.body(error, scope["agentmem.request_id"])
        return JSONResponse(body, shape.status(error), headers)

    def add_handlers(self, app: FastAPI) -> None:
        """Have the app answer with what is here, whatever is raised."""
        app.add_exception_handler(AgentMemError, self._on_agentmem_error)
        app.add_exception_handler(RequestValidationError, self._on_validation_error)
        app.add_exception_handler(HTTPException, self._on_http_error)
        app.add_exception_handler(ClientDisconnect, self._on_disconnect)
        app.add_exception_handler(Exception, self._on_bug)

    def _shape_for(self, scope: Scope) -> ErrorShape | None:
        """Return the shape that the request's headers ask for, on a path that several APIs have."""
        names = {name for name, _ in scope["headers"]}
        for prefix, header, shape in self._by_header:
            if header in names and f"{scope['path']}/".startswith(f"{prefix}/"):
                return shape
        return None

    def _shape(self, path: str) -> ErrorShape:
        while path:
            if path in self._shapes:
                return self._shapes[path]
            path = path.rpartition("/")[0]
        return _OPENAI

    async def _on_agentmem_error(self, request: Request, exc: Exception) -> Response:
        return self.response(request.scope, cast(AgentMemError, exc))

    async def _on_validation_error(self, request: Request, exc: Exception) -> Response:
        problem = cast(RequestValidationError, exc).errors()[0]
        return self.response(request.scope, _invalid_body(problem))

    async def _on_http_error(self, request: Request, exc: Exception) -> Response:
        """Answer Starlette's own errors.

        They are unknown routes (404) and methods (405), and bodies that FastAPI can't decode (400).
        """
        http = cast(HTTPException, exc)
        error: AgentMemError = InvalidRequest(
            f"{http.detail} ({request.method} {request.url.path[:_ECHO]})"
        )
        error.status = http.status_code
        error.code = _HTTP_CODES.get(http.status_code)
        return self.response(request.scope, error, dict(http.headers or {}))

    async def _on_disconnect(self, request: Request, exc: Exception) -> Response:
        return Response(status_code=499)  # nobody is there to read it

    async def _on_bug(self, request: Request, exc: Exception) -> Response:
        """Answer what nobody expected, outside of the middleware that adds the request's id.

        Starlette raises `exc` again after this, and uvicorn logs its traceback.
        """
        error = AgentMemError("The server had an internal error; its log says more.")
        request_id = request.scope["agentmem.request_id"]
        headers: dict[str, str] = dict.fromkeys(REQUEST_ID_HEADERS, str(request_id))
        return self.response(request.scope, error, headers)


def _invalid_body(problem: Any) -> InvalidRequest:
    """Return the error for one of pydantic's problems, whose `loc` starts with "body"."""
    path = [str(key)[:_ECHO] for key in problem["loc"][1:]]
    kind = problem["type"]
    message = problem["msg"].removeprefix("Value error, ")
    code = _VALIDATION_CODES.get(
        kind, "invalid_type" if kind.endswith("_type") else "invalid_value"
    )
    if kind == "json_invalid":
        why = f"{problem['ctx']['error']} at character {path[0]}"
        return InvalidRequest(f"The body is not valid JSON: {why}", code=code)
    if not path:
        if kind != "value_error":  # that is one of ours, about several fields
            what = "a JSON object, with the header content-type: application/json"
            message = f"The body must be {what}"
        return InvalidRequest(message, code=code)
    param = ".".join(path)
    if kind == "extra_forbidden":
        message = "unknown parameter; this server refuses what it does not honour"
    if kind == "missing":
        message = "missing, but required"
    return InvalidRequest(f"{param}: {message}", param=param, code=code)
