"""A short way for requests that come by the thousand: past FastAPI's middleware, and in one write to the client."""

from collections.abc import Collection, Mapping
from functools import cached_property
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

try:
    from uvicorn.protocols.http.httptools_impl import STATUS_LINE, RequestResponseCycle
except ImportError:  # without httptools, answers are sent as everywhere
    STATUS_LINE, RequestResponseCycle = {}, None  # type: ignore[assignment,misc]  # as there is no such class


def put_outside(app: FastAPI, own: Collection[object]) -> None:
    """Put the middleware of these classes, which answers every error itself, outside of FastAPI's.

    If a user adds other middleware, which may want to see errors as answers, FastAPI's is around all of it, as usual.
    """
    build = app.build_middleware_stack

    def build_middleware_stack() -> ASGIApp:
        added = app.user_middleware
        if not all(middleware.cls in own for middleware in added):
            return build()
        app.user_middleware = []
        stack = build()
        app.user_middleware = added
        for middleware in reversed(added):
            stack = middleware.cls(stack, *middleware.args, **middleware.kwargs)
        return stack

    app.build_middleware_stack = build_middleware_stack  # type: ignore[method-assign]  # Starlette calls it once


class DirectHeaders(Headers):
    """Headers that are looked up instead of searched; the first one of a name counts."""

    @cached_property
    def _first(self) -> Mapping[bytes, bytes]:
        return dict(reversed(self.raw))

    def get(self, key: str, default: Any = None) -> Any:
        """The header, or `default`."""
        value = self._first.get(key.lower().encode("latin-1"))
        return default if value is None else value.decode("latin-1")

    def __getitem__(self, key: str) -> str:
        return self._first[key.lower().encode("latin-1")].decode("latin-1")

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and key.lower().encode("latin-1") in self._first


class DirectRequest(Request):
    """A request whose headers are looked up."""

    @cached_property
    def headers(self) -> Headers:  # type: ignore[override]  # a property there, and as unchangeable here
        """The headers."""
        return DirectHeaders(scope=self.scope)


async def send_response(response: Response, scope: Scope, receive: Receive, send: Send) -> None:
    """Send a response, in one write where it is whole and `send` is that of uvicorn."""
    cycle: Any = getattr(send, "__self__", None)
    is_whole = type(response) is Response and response.background is None
    if (
        not is_whole
        or RequestResponseCycle is None
        or type(cycle) is not RequestResponseCycle
        or cycle.access_log
        or cycle.disconnected
        or cycle.response_started
        or cycle.flow.write_paused
        or "connection" in response.headers
    ):
        await response(scope, receive, send)
        return
    cycle.response_started = cycle.response_complete = True
    cycle.waiting_for_100_continue = False
    parts = [STATUS_LINE[response.status_code]]
    for name, value in (*cycle.default_headers, *response.raw_headers):
        parts += (name, b": ", value, b"\r\n")
    parts.append(b"\r\n" if cycle.keep_alive else b"connection: close\r\n\r\n")
    parts.append(response.body)
    cycle.transport.write(b"".join(parts))
    cycle.message_event.set()
    if not cycle.keep_alive:
        cycle.transport.close()
    cycle.on_response()
