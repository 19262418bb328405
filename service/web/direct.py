"""A short way for requests that come by the thousand, past FastAPI's middleware."""

from collections.abc import Collection
from typing import Any

from fastapi import FastAPI, Request
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send


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

    def __init__(self, scope: Scope) -> None:
        super().__init__(scope=scope)
        self._first = dict(reversed(self.raw))

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

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        super().__init__(scope, receive, send)
        self._headers = DirectHeaders(scope)  # where Starlette keeps what it makes of them
