"""Bodies and answers that are streams of lines (NDJSON), of any length, with flow control in both directions."""

import tempfile
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractContextManager
from http import HTTPStatus
from io import SEEK_END
from typing import IO, ClassVar, NamedTuple, TypeVar

import anyio
from anyio.lowlevel import checkpoint
from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

from modalkit.batching import Failure
from modalkit.batching.task_groups import plain_task_group
from modalkit.service.web.admission import Admission, Reception
from modalkit.service.web.answers import NDJSON
from modalkit.service.web.problems import ProblemError

LINES_AT_ONCE = 512
"""Lines that are parsed without a pause; after that, other requests have their turn."""
READ_AHEAD_BYTES = 2**18
"""Bytes of a body that are received before they can be used, so that a disconnection behind them is noticed."""
MAX_UNREAD_BYTES = 8 * 2**20
"""Bytes of answers for one client; with so many, its body is not read on before it has read them."""
MAX_UNREAD_BYTES_IN_ALL = 256 * 2**20
"""The same for all clients together; with so many, each of them has only `MIN_UNREAD_BYTES`."""
MIN_UNREAD_BYTES = 2**16
SPOOL_MEMORY_BYTES = 2**16
SPOOL_CHUNK_BYTES = 2**16


T = TypeVar("T")


class Line(NamedTuple):
    """A line that is not empty. `number` counts all lines from 1; `content` says why where it was dropped."""

    number: int
    content: bytes | ProblemError


Lines = AsyncIterator[list[Line]]
Answer = Callable[[Lines, Callable[[bytes], None]], Awaitable[None]]
"""Takes lines, and answers them by a function that writes bytes. It is cancelled when the client disconnects."""


async def lines_of(chunks: AsyncIterable[bytes], max_bytes: int, unfinished: Reception | None = None) -> Lines:
    """The lines of a body, in lists of up to `LINES_AT_ONCE` of those that arrived together.

    The content of a line that is too large is dropped, so that memory is bounded; so is that of an unfinished one for
    which `unfinished`, which holds it, has no room.
    """
    number = 0
    rest: bytes | ProblemError = b""
    too_large = ProblemError(
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        f"the line is larger than {max_bytes} bytes: send it as a request of its own, or raise "
        "request_config.max_line_bytes",
    )
    async for chunk in chunks:
        first, *others = chunk.split(b"\n")
        if isinstance(rest, bytes):
            rest = rest + first if len(rest) + len(first) <= max_bytes else too_large
        *ended, rest = rest, *[part if len(part) <= max_bytes else too_large for part in others]
        if unfinished is not None:
            rest = _held(rest, unfinished)
        lines = [
            Line(place, part)
            for place, part in enumerate(ended, number + 1)
            if isinstance(part, ProblemError) or part.strip()
        ]
        number += len(ended)
        for start in range(0, len(lines), LINES_AT_ONCE):
            yield lines[start : start + LINES_AT_ONCE]
            await checkpoint()
    if isinstance(rest, ProblemError) or rest.strip():
        yield [Line(number + 1, rest)]


def _held(rest: bytes | ProblemError, reception: Reception) -> bytes | ProblemError:
    """The beginning of a line, which the reception then holds, or why there is no room for it."""
    size_bytes = len(rest) if isinstance(rest, bytes) else 0
    try:
        reception.check_room(size_bytes)
    except ProblemError as error:
        reception.hold(0)
        return error.with_traceback(None)
    reception.hold(size_bytes)
    return rest


async def parsed(
    lines: Sequence[Line], parse: Callable[[Sequence[bytes]], Awaitable[Sequence[T | Failure]]]
) -> Sequence[T | Failure]:
    """What `parse` makes of the content of each line; one whose content was dropped has a `Failure`."""
    contents = [line.content for line in lines if isinstance(line.content, bytes)]
    found = await parse(contents)
    if len(contents) == len(lines):
        return found
    others = iter(found)
    return [next(others) if isinstance(line.content, bytes) else Failure(line.content) for line in lines]


class Spool(AbstractContextManager["Spool"]):
    """A pipe of bytes whose writer may go on for a while without a reader: `memory_bytes` in memory, more in a file.

    It has one writer and one reader. The writer, if it waits for room before each write, adds about `max_bytes` before
    the reader has read all; less, where all spools of the process hold much, or all requests by its `reception`. Where
    the file cannot be written, because the disk is full, the reader gets the error.
    """

    size_of_all: ClassVar[int] = 0
    """Bytes that all spools of this process hold."""

    def __init__(
        self,
        max_bytes: int = MAX_UNREAD_BYTES,
        memory_bytes: int = SPOOL_MEMORY_BYTES,
        reception: Reception | None = None,
    ) -> None:
        self._max_bytes = max_bytes
        self._memory_bytes = memory_bytes
        self._reception = reception
        self._size = 0
        self._file: IO[bytes] | None = None
        self._read_bytes = 0  # of the file
        self._parts: list[bytes] = []  # what comes after the file
        self._parts_bytes = 0
        self._closed = False
        self._failure: OSError | None = None  # of the file
        self._change = anyio.Event()

    def __exit__(self, *_: object) -> None:
        self._resize(0)
        if self._file is not None:
            self._file.close()

    def _resize(self, size: int) -> None:
        Spool.size_of_all += size - self._size
        self._size = size
        if self._reception is not None:
            self._reception.hold(size)

    def write(self, data: bytes) -> None:
        """Add bytes at the end."""
        self._parts.append(data)
        self._parts_bytes += len(data)
        self._resize(self._size + len(data))
        if self._parts_bytes > self._memory_bytes:
            try:
                self._write_file(memoryview(self._take_parts()))
            except OSError as error:
                self._failure = error
        self._change.set()

    async def wait_for_room(self) -> None:
        """Where it is full, wait until the reader has read all."""
        is_full = Spool.size_of_all >= MAX_UNREAD_BYTES_IN_ALL or (self._reception and self._reception.is_full)
        if self._size >= (MIN_UNREAD_BYTES if is_full else self._max_bytes):
            while self._size:
                self._change = anyio.Event()
                await self._change.wait()

    def close(self) -> None:
        """Mark the end: the reader gets it once it has read everything."""
        self._closed = True
        self._change.set()

    async def read(self) -> bytes:
        """Wait for bytes and return some of them; empty at the end. Raises `OSError` where the file was not written."""
        while not self._size and not self._closed:
            self._change = anyio.Event()
            await self._change.wait()
        if self._failure is not None:
            raise self._failure
        data = self._read_file() or self._take_parts()
        if not self._parts and not self._read_bytes:
            self._resize(0)
            self._change.set()
        return data

    def _write_file(self, data: memoryview) -> None:
        if self._file is None:
            self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115  # closed by __exit__
        self._file.seek(0, SEEK_END)
        while data:  # a disk that is almost full takes a part
            data = data[self._file.write(data) :]

    def _read_file(self) -> bytes:
        if self._file is None:
            return b""
        self._file.seek(self._read_bytes)
        data = self._file.read(SPOOL_CHUNK_BYTES)
        self._read_bytes += len(data)
        if self._read_bytes == self._file.seek(0, SEEK_END):
            self._file.truncate(0)
            self._read_bytes = 0
        return data

    def _take_parts(self) -> bytes:
        data = b"".join(self._parts)
        self._parts.clear()
        self._parts_bytes = 0
        return data

    async def chunks(self) -> AsyncIterator[bytes]:
        """All that is read, until the end."""
        while data := await self.read():
            yield data


class LineStream(Response):
    """Answers lines with lines, while they come.

    Answers are sent at once. A client may send for a while without reading answers, because many clients send
    everything before they read anything. Once it has `MAX_UNREAD_BYTES` to read, its body is not read any further.
    """

    def __init__(self, answer: Answer, admission: Admission) -> None:
        super().__init__(media_type=NDJSON)
        del self.headers["content-length"]
        self._answer = answer
        self._admission = admission

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, as an ASGI application does."""
        read_ahead, unfinished = Reception(self._admission), Reception(self._admission)
        with Spool(READ_AHEAD_BYTES, READ_AHEAD_BYTES * 4, read_ahead) as body, Spool() as answers, unfinished:
            async with plain_task_group() as task_group:

                async def receive_body() -> None:
                    """Receive until the client disconnects, which cancels everything."""
                    more = True
                    while (message := await receive())["type"] != "http.disconnect":
                        body.write(message.get("body", b""))
                        if more := message.get("more_body", False):
                            await body.wait_for_room()
                        else:
                            body.close()
                    if more:
                        self._admission.count_cut_body(scope["path"])
                    task_group.cancel_scope.cancel()

                async def send_answers() -> None:
                    content = await answers.read()
                    await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
                    while content:
                        await send({"type": "http.response.body", "body": content, "more_body": True})
                        content = await answers.read()
                    await send({"type": "http.response.body", "body": b"", "more_body": False})
                    task_group.cancel_scope.cancel()

                task_group.start_soon(receive_body)
                task_group.start_soon(send_answers)
                lines = lines_of(body.chunks(), self._admission.limits.max_line_bytes, unfinished)
                await self._answer(_paced(lines, answers), answers.write)
                answers.close()


async def _paced(lines: Lines, answers: Spool) -> Lines:
    """These lines, each list once there is room for its answers."""
    async for some in lines:
        await answers.wait_for_room()
        yield some
