"""The limits that uvicorn lacks for connections: bytes sent, unread answers, and time.

No limit costs a request a timer: `check` is called now and then, and compares what the connection waits for with what
it waited for the last time.
"""

import asyncio
import logging
import resource
import socket
import struct
from enum import Enum, auto
from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.flow_control import FlowControl

from modalkit.service.settings import ServerConfig
from modalkit.service.web.answers import PROBLEM_JSON
from modalkit.service.web.options import are_lines
from modalkit.service.web.problems import ProblemError, problem_json

logger = logging.getLogger(__name__)

MIN_BODY_BYTES = 1024
"""Bytes of a body that must come within its time limit, unless it is a stream of lines: of these one byte."""
LINGER_S = 2.0
"""Seconds for which a refused connection is still read, so that the client gets to see why."""
RESERVED_FILES = 256
"""Files that a process needs besides its connections."""


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


def within_open_files(config: ServerConfig) -> ServerConfig:
    """The configuration, with as many connections as the process may have open files.

    Raises the limit of open files where that is needed and allowed.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = config.max_connections + RESERVED_FILES
    if soft != resource.RLIM_INFINITY and soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else max(soft, min(needed, hard))
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return config
    connections = max(1, soft - RESERVED_FILES)
    logger.warning("Only %d connections, as the limit of open files (ulimit -n) allows no more", connections)
    return config.model_copy(update={"max_connections": connections})


class LimitedProtocol(asyncio.Protocol):
    """What both of uvicorn's protocols lack. Attributes without an underscore are uvicorn's."""

    transport: asyncio.Transport
    flow: FlowControl
    loop: asyncio.AbstractEventLoop
    connections: set[Any]
    cycle: Any
    headers: list[tuple[bytes, bytes]]

    def __init__(self, *args: Any, limits: ServerConfig, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._limits = limits
        # All mutable state. "Seen" is what the last check saw.
        self._waiting = Waiting.FOR_HEADERS
        self._since_s = self.loop.time()  # since when it waits for that
        self._seen_cycle: Any = None  # the request in which it waits
        self._received_bytes = 0
        self._seen_bytes = 0  # of those received
        self._unread_bytes = 0  # of the answer, which the client had not taken
        self._unread_since_s: float | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Refuse the connection if there are too many."""
        super().connection_made(transport)
        if len(self.connections) > 2 * self._limits.max_connections:
            self.transport.abort()  # not even those that are being refused may be without limit
        elif len(self.connections) > self._limits.max_connections:
            self.refuse(HTTPStatus.SERVICE_UNAVAILABLE, "there are too many connections; try again later")

    def data_received(self, data: bytes) -> None:
        """Read a part of a request; nothing more of a connection that is refused."""
        if self._waiting is not Waiting.FOR_END:
            self._received_bytes += len(data)
            super().data_received(data)

    def pause_writing(self) -> None:
        """Note that the client does not take its answer."""
        self._unread_since_s = self.loop.time()
        self._unread_bytes = self.transport.get_write_buffer_size()
        super().pause_writing()

    def resume_writing(self) -> None:
        """Note that the client has taken its answer."""
        self._unread_since_s = None
        super().resume_writing()

    def has_part_of_head(self) -> bool:
        """Whether a part of a request line or of headers has come."""
        raise NotImplementedError

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
        return Waiting.FOR_HEADERS if self.has_part_of_head() else Waiting.FOR_REQUEST

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
            self.refuse(
                HTTPStatus.REQUEST_TIMEOUT,
                f"the body comes too slowly: of it came little or nothing for "
                f"{self._limits.body_timeout_seconds:g} s; send it faster",
            )
        elif waiting is Waiting.FOR_HEADERS and self._received_bytes:
            self.refuse(
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

    def refuse(self, status: HTTPStatus, detail: str) -> None:
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
            self.refuse(HTTPStatus.BAD_REQUEST, f"{msg.rstrip('.')}: it does not follow HTTP/1.1")


def _is_stream(headers: list[tuple[bytes, bytes]]) -> bool:
    """Whether the body is a stream of lines, whose client may have nothing to send for a while."""
    return any(name == b"content-type" and are_lines(value.decode("latin-1")) for name, value in headers)
