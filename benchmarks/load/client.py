"""An HTTP/1.1 client with little overhead, so that mostly the server is measured."""

import asyncio
import errno
import ssl
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cache, partial
from time import perf_counter
from typing import Any, cast
from urllib.parse import urlsplit

import httptools
import httpx

CHECKS_PER_TIMEOUT = 10
"""How often, in the time that a request may take, requests are looked for that took longer."""

NO_CONNECTION = "no connection"
"""The begin of the reason where the server was not reached."""

NO_SOCKET = "the load generator may open no more connections"
"""The begin of the reason where it is not the server that is the limit."""
_NO_SOCKET_ERRORS = (errno.EMFILE, errno.ENFILE, errno.EADDRNOTAVAIL)

ANSWERED = "HTTP"
"""The begin of the reason where the answer was no success."""

Outcome = int | str
"""The number of items with an answer, or why there was none."""


class _Connection(asyncio.Protocol):
    """One request at a time over one connection."""

    def __init__(self) -> None:
        self.since_s = 0.0
        """When the request that is under way was sent."""
        self.is_open = False
        self._parser = httptools.HttpResponseParser(self)
        self._body: list[bytes] = []

    def send(self, request: bytes) -> "asyncio.Future[tuple[int, bytes]]":
        """Send a request. The future has the status and the body, or raises what became of the connection."""
        self._answer: asyncio.Future[tuple[int, bytes]] = asyncio.get_running_loop().create_future()
        self._body = []
        self.since_s = perf_counter()
        self._transport.write(request)
        return self._answer

    def fail(self, error: Exception) -> None:
        """End the request with an error, and the connection with it."""
        self.is_open = False
        self._transport.abort()
        if not self._answer.done():
            self._answer.set_exception(error)

    def close(self) -> None:
        self._transport.abort()

    # Called by asyncio.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's derives from nothing
        self.is_open = True
        self._answer = asyncio.get_running_loop().create_future()
        self._answer.set_result((0, b""))  # nothing is under way

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self.fail(ConnectionError(f"the answer is not HTTP: {error}"))

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_open = False
        if not self._answer.done():
            self._answer.set_exception(exc or ConnectionResetError("closed by the server"))

    # Called by the parser.

    def on_body(self, body: bytes) -> None:
        self._body.append(body)

    def on_message_complete(self) -> None:
        status = self._parser.get_status_code()
        if status < 200:  # an interim answer, such as 100 Continue
            return
        if not self._parser.should_keep_alive():
            self.is_open = False
            self._transport.close()
        if not self._answer.done():
            self._answer.set_result((status, b"".join(self._body)))


def direct_client(**options: Any) -> httpx.Client:
    """A client that reaches a server as the load does: without proxies, and with the certificates of the system."""
    return httpx.Client(trust_env=False, verify=_certificates(), **options)


@cache
def _certificates() -> ssl.SSLContext:
    return ssl.create_default_context()


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpTarget:
    """Requests for a server, as they are sent."""

    url: str
    requests: Sequence[bytes]
    list_length: int = 1
    error_mark: bytes = b""
    timeout_s: float = 30.0
    max_connections: int = 2000
    keeps_bodies: bool = False

    @asynccontextmanager
    async def opened(self) -> AsyncIterator["HttpCaller"]:
        """What sends the requests; its connections are closed at the end."""
        caller = HttpCaller(self)
        expiring = asyncio.create_task(caller.expire())
        try:
            yield caller
        finally:
            expiring.cancel()
            caller.close()


class Places:
    """So many blocks run at once, and others wait. Unlike `asyncio.Semaphore`, to cancel one searches none of them."""

    def __init__(self, free: int) -> None:
        self._free = free
        self._turns: deque[asyncio.Future[None]] = deque()

    async def __aenter__(self) -> None:
        if self._free:
            self._free -= 1
            return
        turn = asyncio.get_running_loop().create_future()
        self._turns.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # it had its turn
                self._pass_on()
            raise

    async def __aexit__(self, *_: object) -> None:
        self._pass_on()

    def _pass_on(self) -> None:
        while self._turns:
            if not (turn := self._turns.popleft()).done():  # else it was cancelled
                turn.set_result(None)
                return
        self._free += 1


class HttpCaller:
    """Sends requests by their index over connections that are kept, as many as are under way at once."""

    def __init__(self, target: HttpTarget) -> None:
        parts = urlsplit(target.url)
        context = _certificates() if parts.scheme == "https" else None
        port = parts.port or (443 if context else 80)
        self._target = target
        self._connect = partial(
            asyncio.get_running_loop().create_connection, _Connection, parts.hostname or "", port, ssl=context
        )
        self._idle: list[_Connection] = []
        self._busy: set[_Connection] = set()
        self._places = Places(target.max_connections)
        self.kept: list[tuple[int, float, bytes]] = []
        """The index, the time and the body of each successful answer, where they are kept."""

    async def __call__(self, index: int) -> Outcome:
        """Send a request; the indices begin again where the requests end."""
        index %= len(self._target.requests)
        async with self._places:
            try:
                connection = await self._connected()
            except TimeoutError:
                return f"{NO_CONNECTION} within {self._target.timeout_s:g} s"
            except OSError as error:
                if error.errno in _NO_SOCKET_ERRORS:
                    return f"{NO_SOCKET}: {error.strerror}"
                return f"{NO_CONNECTION}: {type(error).__name__}: {error.strerror or error}"
            self._busy.add(connection)
            try:
                status, body = await connection.send(self._target.requests[index])
            except TimeoutError as error:
                return str(error)
            except OSError as error:
                return f"{type(error).__name__}: {error.strerror or error}"
            finally:
                self._busy.discard(connection)
            if connection.is_open:
                self._idle.append(connection)
        if not 200 <= status < 300:  # HTTP's classes
            return f"{ANSWERED} {status}"
        if self._target.keeps_bodies:
            self.kept.append((index, perf_counter(), body))
        mark = self._target.error_mark
        return self._target.list_length - (body.count(mark) if mark else 0)

    async def _connected(self) -> _Connection:
        while self._idle:
            if (connection := self._idle.pop()).is_open:
                return connection
        async with asyncio.timeout(self._target.timeout_s):
            _, made = await self._connect()
        return cast("_Connection", made)

    async def expire(self) -> None:
        """Fail requests that take too long, for ever."""
        timeout_s = self._target.timeout_s
        while True:
            await asyncio.sleep(timeout_s / CHECKS_PER_TIMEOUT)
            before_s = perf_counter() - timeout_s
            for connection in [found for found in self._busy if found.since_s < before_s]:
                connection.fail(TimeoutError(f"no answer within {timeout_s:g} s"))

    def close(self) -> None:
        """Close all connections."""
        for connection in (*self._idle, *self._busy):
            connection.close()
