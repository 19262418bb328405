"""A short way for requests that come by the thousand, past FastAPI's middleware."""

import asyncio
from collections.abc import Awaitable, Collection, Sequence
from functools import cache
from http import HTTPStatus
from typing import Any, TypeVar

from anyio.lowlevel import checkpoint
from fastapi import FastAPI, Request
from fastapi.responses import Response
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from modalkit.service.web.admission import FREE_BYTES, reception_of
from modalkit.service.web.answers import JSON
from modalkit.service.web.problems import ProblemError, error_response

T = TypeVar("T")

PART_BYTES = 2**20
"""Minimum bytes of a part of a long list; others have their turn after each."""
WATCH_INTERVAL_S = 0.1
"""Seconds between two looks at the requests that wait; at the second one, a connection is watched."""

_CONTENT_TYPE = (b"content-type", JSON.encode())


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
        self._list = scope["headers"]
        self._first = dict(reversed(self._list))

    def get(self, key: str, default: Any = None) -> Any:
        """The header, or `default`."""
        value = self._first.get(_encoded(key))
        return default if value is None else value.decode("latin-1")

    def __getitem__(self, key: str) -> str:
        return self._first[_encoded(key)].decode("latin-1")

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and _encoded(key) in self._first


@cache  # the names that the code asks for
def _encoded(name: str) -> bytes:
    return name.lower().encode("latin-1")


class DirectRequest(Request):
    """A request whose headers are looked up."""

    headers = Headers()  # in place of Starlette's property

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        super().__init__(scope, receive, send)
        self.headers = DirectHeaders(scope)


class DirectResponse(Response):
    """An answer in JSON, made in a third of the time.

    One to a request that has changed something must say that it may not be refused.
    """

    def __init__(
        self,
        content: bytes,
        status: int = HTTPStatus.OK,
        headers: Collection[tuple[bytes, bytes]] = (),
        *,
        may_be_refused: bool = True,
    ) -> None:
        self.body = content
        self.status_code = status
        self.background = None
        self._may_be_refused = may_be_refused
        self.raw_headers = [_CONTENT_TYPE, (b"content-length", b"%d" % len(content)), *headers]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, as an ASGI application does. Where there is no room for a large one, 503 may take its place."""
        if len(self.body) > FREE_BYTES:
            await self._send_held(len(self.body), scope, receive, send)
        else:
            await self._send(send)

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body})

    async def _send_held(self, size_bytes: int, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with reception_of(scope).answer(size_bytes, may_be_refused=self._may_be_refused):
                await self._send(send)
        except ProblemError as error:
            await error_response(error)(scope, receive, send)


def list_response(items: Sequence[bytes]) -> DirectResponse:
    """An answer that is a list in JSON, of these items in JSON. A long one is sent in parts."""
    size_bytes = sum(map(len, items)) + max(1, len(items)) + 1
    return DirectResponse(b"[%b]" % b",".join(items)) if size_bytes < PART_BYTES else _LongList(items, size_bytes)


class _LongList(DirectResponse):
    def __init__(self, items: Sequence[bytes], size_bytes: int) -> None:
        super().__init__(b"")
        self.raw_headers = [_CONTENT_TYPE, (b"content-length", b"%d" % size_bytes)]
        self._items = items
        self._size_bytes = size_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._send_held(self._size_bytes, scope, receive, send)

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        part, size_bytes, before = list[bytes](), 0, b"["
        for item in self._items:
            part += before, item
            size_bytes, before = size_bytes + len(item), b","
            if size_bytes >= PART_BYTES:
                await send({"type": "http.response.body", "body": b"".join(part), "more_body": True})
                await checkpoint()  # servers wait only for a client that reads slowly
                part, size_bytes = [], 0
        await send({"type": "http.response.body", "body": b"".join([*part, b"]"])})


class _Call:
    """A task that awaits something for a request."""

    __slots__ = ("has_gone", "is_old", "receive", "task", "watch")

    def __init__(self, receive: Receive, task: asyncio.Task[Any] | None) -> None:
        self.receive = receive
        self.task = task
        self.is_old = self.has_gone = False
        self.watch: asyncio.Task[None] | None = None

    async def cancel_when_disconnected(self) -> None:
        # The body has been read, so the only message that can come is the disconnection.
        while (await self.receive())["type"] != "http.disconnect":
            pass
        if self.task is not None:
            self.has_gone = True
            self.task.cancel()


class _Calls(dict[_Call, None]):
    """The calls of one event loop. One timer for all of them finds those that take long, whose connections are watched.

    A timer, or a task, for each call would cost a twentieth, or a fifth, of the time of a request.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.is_looking = False

    def look(self) -> None:
        """Watch the connections of the calls that waited at the last look, too; and look again while any waits."""
        for call in self:
            if call.is_old and call.watch is None:
                call.watch = self.loop.create_task(call.cancel_when_disconnected())
            call.is_old = True
        self.is_looking = bool(self)
        if self.is_looking:
            self.loop.call_later(WATCH_INTERVAL_S, self.look)


_calls: _Calls | None = None


async def while_connected(request: Request, awaitable: Awaitable[T]) -> T:
    """Await something; cancel it when the client disconnects, so that its item leaves the queue."""
    global _calls  # noqa: PLW0603  # those of the event loop that was last used
    calls, loop = _calls, asyncio.get_running_loop()
    if calls is None or calls.loop is not loop:
        calls = _calls = _Calls(loop)
    call = _Call(request.receive, task := asyncio.current_task(loop))
    calls[call] = None
    if not calls.is_looking:
        calls.look()
    try:
        return await awaitable
    except asyncio.CancelledError:
        # A cancel scope would do the same, at several times the cost for each request that nothing disturbs.
        if not call.has_gone or task is None or task.uncancel():
            raise
    finally:
        del calls[call]
        if call.watch is not None:
            call.watch.cancel()
    raise ProblemError(HTTPStatus.REQUEST_TIMEOUT, "the client has gone")
