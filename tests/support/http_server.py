"""A real HTTP server in the test's event loop, on a free port."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import httpx
import uvicorn
from fastapi import FastAPI

from modalkit.service.serving import Server, listening
from tests.support.http_client import NO_TLS


@asynccontextmanager
async def serving(app: FastAPI, headers: dict[str, str] | None = None) -> AsyncIterator[httpx.AsyncClient]:
    """Serve `app` and give a client for it; on leaving, the server shuts down as on a signal."""
    with listening("127.0.0.1", 0) as listener:
        server = Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5))
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(server.serve, [listener])
            url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            try:
                async with httpx.AsyncClient(base_url=url, timeout=60, headers=headers, verify=NO_TLS) as client:
                    yield client
            finally:
                server.should_exit = True
