"""HTTP clients with very little overhead, so that mostly the server is measured."""

import asyncio
from collections.abc import Iterator, Sequence
from functools import partial
from typing import cast
from urllib.parse import urlsplit


class _Connection(asyncio.Protocol):
    """Sends requests one after the other over one connection, each when the one before is answered."""

    def __init__(self, requests: Iterator[bytes], done: "asyncio.Future[None]", statuses: dict[int, int]) -> None:
        self._requests = requests
        self._done = done
        self._statuses = statuses
        self._received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the first request."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's derives from nothing
        self._send_next()

    def data_received(self, data: bytes) -> None:
        """Count a complete answer, and send the next request."""
        self._received += data
        head, separator, body = self._received.partition(b"\r\n\r\n")
        if not separator:
            return
        length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
        if len(body) >= length:
            status = int(head[9:12])
            self._statuses[status] = self._statuses.get(status, 0) + 1
            self._received = b""
            self._send_next()

    def connection_lost(self, exc: Exception | None) -> None:
        """Fail, unless all requests are answered."""
        if not self._done.done():
            self._done.set_exception(exc or ConnectionError("the server closed the connection"))

    def _send_next(self) -> None:
        request = next(self._requests, None)
        if request is None:
            self._done.set_result(None)
            self._transport.close()
        else:
            self._transport.write(request)


async def stream_all(url: str, body: bytes, streams: int) -> int:
    """POST this body of lines in each of so many streams at once; returns how many items were answered with success."""
    parts = urlsplit(url)
    head = (
        f"POST {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/x-ndjson\r\n"
        f"Connection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    )

    async def stream() -> int:
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port, limit=2**22)
        writer.write(head.encode() + body)
        answer = await reader.read(-1)
        writer.close()
        return answer.count(b'"status":"success"')

    return sum(await asyncio.gather(*(stream() for _ in range(streams))))


async def post_all(url: str, bodies: Sequence[bytes], clients: int) -> dict[int, int]:
    """POST each body to `url` over `clients` connections; returns the number of answers by status."""
    return await _send_all(url, iter([_post(url, body) for body in bodies]), clients)


async def post_for(url: str, body: bytes, clients: int, seconds: float) -> dict[int, int]:
    """POST a body again and again over `clients` connections for so long; returns the number of answers by status."""
    request, loop = _post(url, body), asyncio.get_running_loop()
    ends_s = loop.time() + seconds
    return await _send_all(url, iter(lambda: request if loop.time() < ends_s else None, None), clients)


def _post(url: str, body: bytes) -> bytes:
    parts = urlsplit(url)
    head = f"POST {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\nContent-Length: "
    return head.encode() + b"%d\r\n\r\n" % len(body) + body


async def _send_all(url: str, requests: Iterator[bytes], clients: int) -> dict[int, int]:
    parts = urlsplit(url)
    statuses: dict[int, int] = {}
    loop = asyncio.get_running_loop()
    finished: list[asyncio.Future[None]] = [loop.create_future() for _ in range(clients)]
    for done in finished:
        await loop.create_connection(
            partial(_Connection, requests, done, statuses), parts.hostname or "", parts.port or 80
        )
    await asyncio.gather(*finished)
    return statuses
