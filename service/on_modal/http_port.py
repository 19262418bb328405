"""HTTP on a port, for as long as a context is open."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import uvicorn
from fastapi import FastAPI

from modalkit.batching.task_groups import plain_task_group
from modalkit.service.serving import Server, listening

GRACE_S = 20.0
"""How long open requests may go on after the context is left."""


@asynccontextmanager
async def serving(app: FastAPI, host: str, port: int) -> AsyncIterator[uvicorn.Server]:
    """Serve while the context is open, from when the port answers.

    Raises `AddressError`, and what the application's start does.
    """
    config = uvicorn.Config(app, lifespan="off", log_config=None, timeout_graceful_shutdown=int(GRACE_S))
    server = Server(config)
    # Both here, because uvicorn ends the process where the address is taken, or the application cannot start.
    with listening(host, port) as listener:
        async with app.router.lifespan_context(app), plain_task_group() as task_group:
            task_group.start_soon(server.serve, [listener])
            while not server.started:  # noqa: ASYNC110  # uvicorn has nothing to wait for
                await anyio.sleep(0.01)
            yield server
            server.should_exit = True
