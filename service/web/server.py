"""The HTTP server: uvicorn, with limits for its connections."""

import asyncio
from collections.abc import Iterable
from functools import partial
from http import HTTPStatus
from typing import Any, cast

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn._types import ASGI3Application, ASGISendEvent, HTTPResponseStartEvent
from uvicorn.protocols.http.h11_impl import H11Protocol

from modalkit.service.serving import Server
from modalkit.service.settings import ServerConfig
from modalkit.service.web.connections import LimitedProtocol, Waiting, within_open_files

try:
    from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
except ImportError:  # h11 is slower, and enough
    HttpToolsProtocol = None  # type: ignore[assignment,misc]  # then there is no `LimitedHttpTools`

MAX_HEAD_BYTES = 64 * 2**10
"""Most bytes of a request line and its headers; also of what else comes between two parts of a body."""
MAX_HEADERS = 100
MAX_PIPELINED = 1000
"""Most requests of a connection that wait for those before them to be answered."""
MAX_CHECKED = 1000
"""Connections that are looked at in a tenth of a second; where there are more, each is looked at less often."""

_TOO_MANY_HEADERS = (
    f"the request line and the headers are larger than {MAX_HEAD_BYTES} bytes in all, or more than "
    f"{MAX_HEADERS} headers; send fewer"
)


class LimitedServer(Server):
    """A server that closes connections which exceed their limits."""

    async def on_tick(self, counter: int) -> bool:
        """Look at connections, besides what uvicorn does ten times a second."""
        now = asyncio.get_running_loop().time()
        connections = list(self.server_state.connections)
        parts = 1 + len(connections) // MAX_CHECKED
        for connection in connections[counter % parts :: parts]:
            cast("LimitedProtocol", connection).check(now)
        return await super().on_tick(counter)


def server_of(app: ASGIApp, config: ServerConfig, *, access_log: bool) -> LimitedServer:
    """The server of an application; it logs by the handlers that there are.

    It reads the files of the certificate when it starts, and raises the limit of open files where it has to.
    """
    limited = LimitedH11 if HttpToolsProtocol is None else LimitedHttpTools
    return LimitedServer(
        uvicorn.Config(
            app,
            http=cast("Any", partial(limited, limits=within_open_files(config))),
            ws="none",
            interface="asgi3",
            log_config=None,
            access_log=access_log,
            timeout_graceful_shutdown=cast("int", config.grace_seconds),  # uvicorn passes it to asyncio as it is
            root_path=config.root_path,
            proxy_headers=bool(config.trusted_proxies),
            forwarded_allow_ips=config.trusted_proxies,
            ssl_certfile=config.tls_certificate,
            ssl_keyfile=config.tls_key,
            ssl_keyfile_password=None
            if config.tls_key_password is None
            else config.tls_key_password.get_secret_value(),
            h11_max_incomplete_event_size=MAX_HEAD_BYTES,
        )
    )


class _RefusedError(Exception):
    """Raised in a callback of the parser, to stop it."""


def _head_bytes(target: bytes, headers: Iterable[tuple[bytes, bytes]]) -> int:
    return len(target) + sum(len(name) + len(value) + 4 for name, value in headers)


if HttpToolsProtocol is not None:

    class OneWriteCycle(RequestResponseCycle):
        """Sends the head of an answer of known length together with its body: one system call instead of two."""

        _head: HTTPResponseStartEvent | None = None
        _headers: dict[bytes, bytes]

        async def send(self, message: ASGISendEvent) -> None:
            """Send a part of the answer, as uvicorn does."""
            head, self._head = self._head, None
            if message["type"] == "http.response.start":
                headers = self._headers = dict(message.get("headers", ()))
                has_length = b"content-length" in headers and b"connection" not in headers
                if has_length and not (self.response_started or self.access_log or self.scope["method"] == "HEAD"):
                    self._head = message
                    return
            elif message["type"] == "http.response.body" and head is not None:
                if not message.get("more_body") and self._send_all(head, message.get("body", b"")):
                    return
                await super().send(head)
            await super().send(message)

        def _send_all(self, head: HTTPResponseStartEvent, body: bytes) -> bool:
            """Send a whole answer; returns whether that was possible."""
            has_length = self._headers[b"content-length"] == b"%d" % len(body)
            if self.disconnected or self.flow.write_paused or not has_length:
                return False
            lines = [b"%b: %b\r\n" % header for header in (*self.default_headers, *head["headers"])]
            content = b"".join(lines)
            if content.count(b"\n") != len(lines) or content.count(b"\r") != len(lines) or b"\0" in content:
                return False  # uvicorn raises its error
            self.response_started = self.response_complete = True
            self.waiting_for_100_continue = False
            end = b"\r\n" if self.keep_alive else b"connection: close\r\n\r\n"
            self.transport.write(b"".join((STATUS_LINE[head["status"]], content, end, body)))
            self.message_event.set()
            if not self.keep_alive:
                self.transport.close()
            self.on_response()
            return True

    class LimitedHttpTools(LimitedProtocol, HttpToolsProtocol):
        """HTTP/1.1 by httptools."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._parsed_bytes = 0
            """How many bytes had come when the parser last had a complete head or a part of a body."""
            self._running_cycle: RequestResponseCycle | None = None
            """The request that the application has now; those behind it wait in `pipeline`."""

        def data_received(self, data: bytes) -> None:
            """Read a part of a request. The parser itself keeps a header, or a trailer, of any size."""
            super().data_received(data)
            if self._received_bytes > self._parsed_bytes + MAX_HEAD_BYTES and self._waiting is not Waiting.FOR_END:
                self._refuse_headers()

        def has_part_of_head(self) -> bool:
            """Whether a part of a request line or of headers has come."""
            return self._received_bytes > self._parsed_bytes

        def on_header(self, name: bytes, value: bytes) -> None:
            """Take a header, or a trailer, of which there may be as many."""
            if len(self.headers) >= MAX_HEADERS:
                self._refuse_headers()
                raise _RefusedError
            super().on_header(name, value)

        def on_headers_complete(self) -> None:
            """Begin the request."""
            # What has come since the last request may hold a part of the body.
            is_large = self._received_bytes > self._parsed_bytes + MAX_HEAD_BYTES
            if is_large and _head_bytes(self.url, self.headers) > MAX_HEAD_BYTES:
                self._refuse_headers()
                raise _RefusedError
            self._parsed_bytes = self._received_bytes
            super().on_headers_complete()
            self.cycle.__class__ = OneWriteCycle  # uvicorn makes it, and asks for no class
            if len(self.pipeline) > MAX_PIPELINED:
                self._waiting = Waiting.FOR_END  # or uvicorn would have it refused, behind the answer that is sent now
                self.transport.abort()
                raise _RefusedError

        def on_body(self, body: bytes) -> None:
            """Take a part of the body."""
            self._parsed_bytes = self._received_bytes
            super().on_body(body)

        def on_message_complete(self) -> None:
            """End the request."""
            self._parsed_bytes = self._received_bytes
            self.cycle.more_body = False  # also where it has been answered: then uvicorn leaves it
            super().on_message_complete()

        def on_response_complete(self) -> None:
            """Run the next request; once there is none, read on. No timer is needed for an idle connection."""
            self.server_state.total_requests += 1
            if self.transport.is_closing():
                return
            if self.pipeline:
                self._start_asgi_task(*self.pipeline.pop())
            else:
                self.flow.resume_reading()

        def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
            self._running_cycle = cycle
            super()._start_asgi_task(cycle, app)

        def connection_lost(self, exc: Exception | None) -> None:
            """Run no more requests; uvicorn tells only the last one that its client has gone."""
            self.pipeline.clear()
            if self._running_cycle is not None and not self._running_cycle.response_complete:
                self._running_cycle.disconnected = True
                self._running_cycle.message_event.set()
            super().connection_lost(exc)

        def _refuse_headers(self) -> None:
            self.refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, _TOO_MANY_HEADERS)


class _LimitedConnection(h11.Connection):
    """Raises `RemoteProtocolError` also for too many headers, and keeps the status of an error."""

    error_status = HTTPStatus.BAD_REQUEST

    def next_event(self) -> Any:
        """The next event, as h11 has it."""
        try:
            event = super().next_event()
        except h11.RemoteProtocolError as error:
            self.error_status = HTTPStatus(error.error_status_hint)
            raise
        if isinstance(event, h11.Request) and (
            len(event.headers) > MAX_HEADERS or _head_bytes(event.target, event.headers) > MAX_HEAD_BYTES
        ):
            self.error_status = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
            raise h11.RemoteProtocolError(_TOO_MANY_HEADERS)
        return event


class LimitedH11(LimitedProtocol, H11Protocol):
    """HTTP/1.1 by h11, where there is no httptools. h11 itself limits the size of headers."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.conn: _LimitedConnection = _LimitedConnection(h11.SERVER, MAX_HEAD_BYTES)

    def has_part_of_head(self) -> bool:
        """Whether a part of a request line or of headers has come."""
        return bool(self.conn.trailing_data[0])

    def handle_events(self) -> None:
        """Take what has come."""
        super().handle_events()
        if self.cycle is not None and self.conn.their_state in (h11.IDLE, h11.DONE):
            self.cycle.more_body = False  # also where it has been answered: then uvicorn leaves it

    def on_response_complete(self) -> None:
        """Take the next request; no timer is needed for an idle connection."""
        super().on_response_complete()
        self._unset_keepalive_if_required()

    def send_400_response(self, msg: str) -> None:
        """Refuse what h11 has refused."""
        if self.conn.error_status is HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE:
            self.refuse(self.conn.error_status, _TOO_MANY_HEADERS)
        else:
            super().send_400_response(msg)
