"""What every HTTP request gets besides its answer: an id, a measured latency and, where that is enabled, a span."""

import asyncio
import os
from collections.abc import Awaitable, Sequence
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from functools import cache
from http import HTTPStatus
from itertools import count
from time import perf_counter
from typing import Any

from starlette.exceptions import HTTPException
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from structlog.contextvars import STRUCTLOG_KEY_PREFIX

from modalkit.batching import SchedulerClosedError
from modalkit.service.errors import lone_error
from modalkit.service.metrics import request_seconds
from modalkit.service.tracing import active_tracing, checked_traceparent, given_traceparent
from modalkit.service.web.problems import ProblemError, error_response, unexpected_error_response

MAX_ID_CHARACTERS = 128
CANCELLED = "the service stops, and its grace ended before this request did; retry at another instance, or later"
OTHER_ROUTE = "other"
"""The label of requests that match no route."""

_OUTCOMES = {408: "disconnected", 429: "refused", 503: "refused", 504: "timed out"}
_PREFIX = os.urandom(6).hex()
_NUMBERS = count(1)
_REQUEST_ID: ContextVar[str] = ContextVar(f"{STRUCTLOG_KEY_PREFIX}request_id")
"""For log lines, as by structlog's `bind_contextvars`, which takes several times as long."""


class RequestObserver:
    """ASGI middleware: measures each request, binds its id for log lines, and traces it where tracing is enabled.

    A request that the server cancels before its answer has begun is answered with 503; one that fails by then with 500,
    and the error is raised, so that the server logs it.
    The id is the request's ``X-Request-ID``, if that is visible ASCII of at most 128 characters, or else a new one. The
    answer has it in the same header. `routes` are those of the application, which may grow until the first request.
    """

    def __init__(self, app: ASGIApp, routes: Sequence[BaseRoute]) -> None:
        self._app = app
        self._routes = routes
        self._fixed_paths: frozenset[str] = frozenset()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, as an ASGI application does."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started_s = perf_counter()
        given_id = traceparent = None
        for name, value in scope["headers"]:
            if name == b"x-request-id":
                given_id = _checked_id(value)
            elif name == b"traceparent":
                traceparent = checked_traceparent(value.decode("latin-1"))
        request_id = given_id or f"{_PREFIX}-{next(_NUMBERS):x}"
        id_header = (b"x-request-id", request_id.encode())
        path = path_of(scope)  # now, because mounted applications change the scope
        status = 0

        def observe(message: Message) -> Awaitable[None]:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), id_header]
            return send(message)

        bound, given = _REQUEST_ID.set(request_id), given_traceparent.set(traceparent)
        unanswered = "failed"
        traced: AbstractContextManager[Any] = nullcontext()
        if (tracing := active_tracing()) is not None:
            traced = tracing.request(scope["method"], traceparent, {"modalkit.request_id": request_id})
        with traced as span:
            try:
                await self._app(scope, receive, observe)
                unanswered = "disconnected"
            except asyncio.CancelledError:
                unanswered = "disconnected"
                if not status and (task := asyncio.current_task()) is not None and task.cancelling():
                    await error_response(SchedulerClosedError(CANCELLED))(scope, receive, observe)
                raise
            except Exception as error:
                if status:
                    raise
                lone = lone_error(error)  # streams have tasks of their own
                if not isinstance(lone, HTTPException):
                    await unexpected_error_response(error)(scope, receive, observe)
                    raise
                # Of an application around this one: FastAPI's limit of bodies raises it where they are read.
                problem = ProblemError(HTTPStatus(lone.status_code), lone.detail, headers=lone.headers)
                await error_response(problem)(scope, receive, observe)
            finally:
                route = self._route(scope, path)
                if tracing is not None:
                    tracing.end_request(span, scope["method"], route, status)
                outcome = outcome_of(status) if status else unanswered
                request_seconds(route, outcome).observe(perf_counter() - started_s)
        _REQUEST_ID.reset(bound)  # not after an exception: the server logs it after this
        given_traceparent.reset(given)

    def _route(self, scope: Scope, path: str) -> str:
        """The path of the route that a request led to, with the names of its parameters in place of their values."""
        if not self._fixed_paths:
            paths = [getattr(route, "path", "{") for route in self._routes]
            self._fixed_paths = frozenset(path for path in paths if "{" not in path)
        return path if path in self._fixed_paths else getattr(scope.get("route"), "path", OTHER_ROUTE)


def path_of(scope: Scope) -> str:
    """The path of a request below the root path, which counts only where a slash follows, as in Starlette."""
    path: str = scope["path"]
    root_path = scope.get("root_path", "")
    return path.removeprefix(root_path) if root_path and path.startswith(f"{root_path}/") else path


@cache
def outcome_of(status: int) -> str:
    """What became of a request that was answered with this status."""
    if status < 400:
        return "succeeded"
    return _OUTCOMES.get(status, "invalid" if status < 500 else "failed")


def _checked_id(value: bytes) -> str | None:
    is_valid = 0 < len(value) <= MAX_ID_CHARACTERS and all(0x21 <= byte <= 0x7E for byte in value)
    return value.decode() if is_valid else None
