"""A real HTTP server in the test's event loop, on a free port."""

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import httpx
import uvicorn
from fastapi import FastAPI

from modalkit.service.serving import Server, listening
from tests.support.http_client import NO_TLS


def limit_buffers(connection: socket.socket, size_bytes: int) -> None:
    """Have the system buffer about so much for each direction; a listener's connections inherit it."""
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        connection.setsockopt(socket.SOL_SOCKET, option, size_bytes)


@asynccontextmanager
async def serving(
    app: FastAPI, headers: dict[str, str] | None = None, socket_buffer_bytes: int | None = None
) -> AsyncIterator[httpx.AsyncClient]:
    """Serve `app` and give a client for it; on leaving, the server shuts down as on a signal.

    With `socket_buffer_bytes`, the system buffers about so much for each direction of a connection, instead of
    megabytes.
    """
    with listening("127.0.0.1", 0) as listener:
        if socket_buffer_bytes is not None:
            limit_buffers(listener, socket_buffer_bytes)
        server = Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5))
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(server.serve, [listener])
            url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            try:
                async with httpx.AsyncClient(base_url=url, timeout=60, headers=headers, verify=NO_TLS) as client:
                    yield client
            finally:
                server.should_exit = True
