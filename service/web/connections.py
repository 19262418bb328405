"""HTTP connections: uvicorn's, with the limits that it lacks: bytes sent, headers, unread answers, and time.

No limit costs a request a timer: `check` is called now and then, and compares what the connection waits for with what
it waited for the last time.
"""

import asyncio
import logging
import socket
import struct
from enum import Enum, auto
from functools import partial
from http import HTTPStatus
from typing import Any

import httptools
from uvicorn._types import (
    ASGI3Application,
    ASGIReceiveCallable,
    ASGISendCallable,
    ASGISendEvent,
    HTTPResponseStartEvent,
    Scope,
)
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from modalkit.service.settings import ServerConfig
from modalkit.service.web.answers import PROBLEM_JSON
from modalkit.service.web.options import are_lines
from modalkit.service.web.problems import ProblemError, problem_json

logger = logging.getLogger(__name__)

MIN_BODY_BYTES = 1024
"""Bytes of a body that must come within its time limit, unless it is a stream of lines: of these one byte."""
LINGER_S = 2.0
"""Seconds for which a refused connection is still read, so that the client gets to see why."""
MAX_HEAD_BYTES = 64 * 2**10
"""Most bytes of a request line and its headers; also of what else comes between two parts of a body."""
MAX_HEADERS = 100
MAX_PIPELINED = 1000
"""Most requests of a connection that wait for those before them to be answered."""
MAX_WRITE_BYTES = 2**18
"""Bytes of an answer that a connection is given at once."""


class Waiting(Enum):
    """What a connection is waiting for."""

    FOR_REQUEST = auto()
    FOR_HEADERS = auto()
    FOR_BODY = auto()
    FOR_ANSWER = auto()
    FOR_REST = auto()
    """The rest of a body that was answered already."""
    FOR_END = auto()
    """The client has been told why it is refused."""


class _RefusedError(Exception):
    """Raised in a callback of the parser, to stop it."""


class OneWriteCycle(RequestResponseCycle):
    """Sends the head of an answer of known length together with its body: one system call instead of two.

    A large body is sent in parts, each once the client has taken those before it: so `send` returns when the client has
    all but the last part, and a request ends, and what it holds counts, no earlier.
    """

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
        elif message["type"] == "http.response.body":
            body = message.get("body", b"")
            if head is not None:
                if not message.get("more_body") and self._send_all(head, body):
                    return
                await super().send(head)
            if len(body) > MAX_WRITE_BYTES:
                await self._send_parts(body, more_body=message.get("more_body", False))
                return
        await super().send(message)

    async def _send_parts(self, body: bytes, *, more_body: bool) -> None:
        for start in range(0, len(body), MAX_WRITE_BYTES):
            part, has_more = body[start : start + MAX_WRITE_BYTES], start + MAX_WRITE_BYTES < len(body)
            await super().send({"type": "http.response.body", "body": part, "more_body": has_more or more_body})

    def _send_all(self, head: HTTPResponseStartEvent, body: bytes) -> bool:
        """Send a whole answer; returns whether that was possible."""
        has_length = self._headers[b"content-length"] == b"%d" % len(body)
        if self.disconnected or self.flow.write_paused or not has_length or len(body) > MAX_WRITE_BYTES:
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


class LimitedProtocol(HttpToolsProtocol):
    """A connection with limits. Attributes without an underscore are uvicorn's."""

    cycle: Any  # None before the first request, though uvicorn's type does not say so

    def __init__(self, *args: Any, limits: ServerConfig, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._limits = limits
        # All mutable state. "Seen" is what the last check saw.
        self._waiting = Waiting.FOR_HEADERS
        self._since_s = self.loop.time()  # since when it waits for that
        self._seen_cycle: Any = None  # the request in which it waits
        self._received_bytes = 0
        self._seen_bytes = 0  # of those received
        self._parsed_bytes = 0  # received when the parser last had a complete head or a part of a body
        self._running_cycle: RequestResponseCycle | None = None  # what the application has; others are in `pipeline`
        self._unread_bytes = 0  # of the answer, which the client had not taken
        self._unread_since_s: float | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        """Refuse the connection if there are too many."""
        super().connection_made(transport)
        if len(self.connections) > 2 * self._limits.max_connections:
            self.transport.abort()  # not even those that are being refused may be without limit
        elif len(self.connections) > self._limits.max_connections:
            self._refuse(HTTPStatus.SERVICE_UNAVAILABLE, "there are too many connections; try again later")

    def data_received(self, data: bytes) -> None:
        """Read a part of a request; nothing more of a connection that is refused."""
        if self._waiting is not Waiting.FOR_END:
            self._received_bytes += len(data)
            self._parse(data)
        # The parser itself keeps a header, or a trailer, of any size.
        if self._received_bytes > self._parsed_bytes + MAX_HEAD_BYTES and self._waiting is not Waiting.FOR_END:
            self._refuse_headers()

    def _parse(self, data: bytes) -> None:
        """Have what came parsed. An offer to upgrade to another protocol is ignored (RFC 9110, 7.8).

        The parser skips the body of a request with such an offer, and would take it for the next request. Its head is
        therefore parsed once more without the offer, and then what follows it.
        """
        rest = memoryview(data)
        while self._waiting is not Waiting.FOR_END:
            try:
                self.parser.feed_data(rest)
            except httptools.HttpParserUpgrade as upgrade:
                rest = rest[upgrade.args[0] :]
                head = self._head_without_upgrade()
                self.parser = httptools.HttpRequestParser(self)  # the other one may have ended with the request
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does
                self._parse(head)
            except httptools.HttpParserError:
                self.send_400_response("Invalid HTTP request received.")
            else:
                return

    def _head_without_upgrade(self) -> bytes:
        first = b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())
        headers = [b"%b: %b" % (name, value) for name, value in self.headers if name != b"upgrade"]
        return b"\r\n".join((first, *headers, b"", b""))

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header, or a trailer, of which there may be as many."""
        if len(self.headers) >= MAX_HEADERS:
            self._refuse_headers()
            raise _RefusedError
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Begin the request; one that offers an upgrade begins once its head is parsed without the offer."""
        if self.parser.get_method() == b"CONNECT":  # what follows is no body to the parser either
            self._refuse(HTTPStatus.BAD_REQUEST, "CONNECT: the service is no proxy; use another method")
            raise _RefusedError
        if self.parser.should_upgrade():
            return
        if self._received_bytes > self._parsed_bytes + MAX_HEAD_BYTES:  # which may hold a part of the body
            head_bytes = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
            if head_bytes > MAX_HEAD_BYTES:
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
        if self.parser.should_upgrade():
            return
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
        super()._start_asgi_task(cycle, partial(_run, app, cycle))

    def connection_lost(self, exc: Exception | None) -> None:
        """Run no more requests; uvicorn tells only the last one that its client has gone."""
        self.pipeline.clear()
        if self._running_cycle is not None and not self._running_cycle.response_complete:
            self._running_cycle.disconnected = True
            self._running_cycle.message_event.set()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Note that the client does not take its answer."""
        self._unread_since_s = self.loop.time()
        self._unread_bytes = self.transport.get_write_buffer_size()
        super().pause_writing()

    def resume_writing(self) -> None:
        """Note that the client has taken its answer."""
        self._unread_since_s = None
        super().resume_writing()

    def check(self, now: float) -> None:
        """Close the connection if it exceeds a limit."""
        if self._unread_since_s is not None:
            unread_bytes = self.transport.get_write_buffer_size()
            if unread_bytes < self._unread_bytes:
                self._unread_since_s, self._unread_bytes = now, unread_bytes
            elif now >= self._unread_since_s + self._limits.answer_timeout_seconds:
                logger.debug("A client did not take its answer for %g s", self._limits.answer_timeout_seconds)
                self._reset()
            return
        waiting = self._what_it_waits_for()
        if waiting is not self._waiting or self.cycle is not self._seen_cycle:
            self._waiting, self._seen_cycle = waiting, self.cycle
            self._since_s, self._seen_bytes = now, self._received_bytes
        elif now >= self._since_s + self._limit_s(waiting):
            self._end_wait(waiting, now)

    def _what_it_waits_for(self) -> Waiting:
        cycle = self.cycle
        if self._waiting is Waiting.FOR_END:
            return Waiting.FOR_END
        if cycle is None:
            return Waiting.FOR_HEADERS
        if cycle.more_body:
            return Waiting.FOR_REST if cycle.response_complete else Waiting.FOR_BODY
        if not cycle.response_complete:
            return Waiting.FOR_ANSWER
        has_part_of_head = self._received_bytes > self._parsed_bytes
        return Waiting.FOR_HEADERS if has_part_of_head else Waiting.FOR_REQUEST

    def _limit_s(self, waiting: Waiting) -> float:
        limits = self._limits
        match waiting:
            case Waiting.FOR_REQUEST:
                return limits.idle_timeout_seconds
            case Waiting.FOR_HEADERS:
                return limits.header_timeout_seconds
            case Waiting.FOR_BODY | Waiting.FOR_REST:
                return limits.body_timeout_seconds
            case Waiting.FOR_END:
                return LINGER_S
            case Waiting.FOR_ANSWER:
                return float("inf")

    def _end_wait(self, waiting: Waiting, now: float) -> None:
        """Close a connection whose time is up, unless enough of a body has come meanwhile, or it was not read."""
        if waiting is Waiting.FOR_BODY:
            least_bytes = 1 if _is_stream(self.headers) else MIN_BODY_BYTES
            if self.flow.read_paused or self._received_bytes >= self._seen_bytes + least_bytes:
                self._since_s, self._seen_bytes = now, self._received_bytes
                return
            self._refuse(
                HTTPStatus.REQUEST_TIMEOUT,
                f"the body comes too slowly: of it came little or nothing for "
                f"{self._limits.body_timeout_seconds:g} s; send it faster",
            )
        elif waiting is Waiting.FOR_HEADERS and self._received_bytes:
            self._refuse(
                HTTPStatus.REQUEST_TIMEOUT,
                f"the headers were not complete within {self._limits.header_timeout_seconds:g} s",
            )
        elif self.transport.get_write_buffer_size():
            self._reset()  # to close it would wait until the client has taken all
        else:
            self.transport.close()

    def _reset(self) -> None:
        """Close the connection at once, and have the kernel drop what the client has not taken."""
        connection = self.transport.get_extra_info("socket")
        if connection is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()

    def _refuse_headers(self) -> None:
        self._refuse(
            HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
            f"the request line and the headers are larger than {MAX_HEAD_BYTES} bytes in all, or more than "
            f"{MAX_HEADERS} headers; send fewer",
        )

    def _refuse(self, status: HTTPStatus, detail: str) -> None:
        """Answer with problem details in place of the application, read nothing more, and close the connection.

        Where an answer of the application has begun, or an earlier request waits for it, only close the connection.
        """
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete:
            if cycle.response_started or not cycle.more_body:
                self.transport.abort()
                return
            cycle.disconnected = True  # the application reads and sends nothing more
            cycle.message_event.set()
        logger.debug("A connection is refused with %d: %s", status, detail)
        self._waiting, self._since_s = Waiting.FOR_END, self.loop.time()
        content = problem_json(ProblemError(status, detail))
        retry = "retry-after: 1\r\n" if status is HTTPStatus.SERVICE_UNAVAILABLE else ""
        head = (
            f"HTTP/1.1 {status:d} {status.phrase}\r\ncontent-type: {PROBLEM_JSON}\r\n"
            f"content-length: {len(content)}\r\n{retry}connection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + content)
        if self.transport.can_write_eof():
            self.flow.resume_reading()
            self.transport.write_eof()
        else:
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no request; uvicorn calls it."""
        if self._waiting is not Waiting.FOR_END:
            self._refuse(HTTPStatus.BAD_REQUEST, f"{msg.rstrip('.')}: it does not follow HTTP/1.1")


async def _run(
    app: ASGI3Application,
    cycle: RequestResponseCycle,
    scope: Scope,
    receive: ASGIReceiveCallable,
    send: ASGISendCallable,
) -> None:
    """Run the application. Cut an answer that is cancelled at the end of the grace, of which the server logs a line."""
    try:
        await app(scope, receive, send)
    except asyncio.CancelledError:
        if not cycle.response_complete:
            cycle.disconnected = True
            cycle.transport.abort()


def _is_stream(headers: list[tuple[bytes, bytes]]) -> bool:
    """Whether the body is a stream of lines, whose client may have nothing to send for a while."""
    return any(name == b"content-type" and are_lines(value.decode("latin-1")) for name, value in headers)
