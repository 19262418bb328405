"""What the load generator can do against a server that answers at once, and that server."""

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import cast

import httptools
import uvloop

from modalkit.benchmarks.load.client import HttpTarget
from modalkit.benchmarks.load.endpoint import Endpoint, Item
from modalkit.benchmarks.load.figures import Measured
from modalkit.benchmarks.load.plan import Load
from modalkit.benchmarks.load.processes import run_target
from modalkit.benchmarks.load.spawned import spawned

BODY = b'{"status":"success","error":null,"meta":{},"sentiment":"positive","confidence":0.9929034113883972}'
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(BODY), BODY)


def own_capacity(
    endpoint: Endpoint, items: Sequence[Item], *, clients: int = 64, processes: int = 1, seconds: float = 1.5
) -> Measured:
    """Send the same requests in a closed loop to a server that answers at once."""
    with instant_server() as url:
        target = HttpTarget(url=url, requests=endpoint.requests(items), list_length=endpoint.list_length)
        return run_target(target, Load(clients=clients, seconds=seconds, warm_up_s=seconds / 5, processes=processes))


@contextmanager
def instant_server() -> Iterator[str]:
    """The address of a server, in a process of its own, that answers every request at once."""
    with spawned(serve_instantly.__module__, serve_instantly.__name__) as (pipe,):
        yield f"http://127.0.0.1:{pipe.recv()}"


class _Instant(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's derives from nothing
        self._parser = httptools.HttpRequestParser(self)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_message_complete(self) -> None:
        self._transport.write(ANSWER)


def serve_instantly(pipe: Connection) -> None:
    """Serve on a free port, which is told by the pipe, for ever."""

    async def serve() -> None:
        server = await asyncio.get_running_loop().create_server(_Instant, "127.0.0.1", 0)
        pipe.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    uvloop.run(serve())
