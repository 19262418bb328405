"""`ModalServer`: the worker as a server of its own in a container, which Modal's proxy sends requests to directly."""

import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, ClassVar

import anyio
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel

from batching.task_groups import plain_task_group
from pipelines import InferenceOutputModel
from service.on_modal.hosting import HostedService
from service.on_modal.lifetime import Lifetime
from service.on_modal.models import connection
from service.on_modal.web_here import web_app_here

logger = logging.getLogger(__name__)

GRACE_S = 20.0
"""How long open requests may go on after the signal to stop."""


class ModalServer(HostedService):
    """Serves HTTP from the containers of a class under ``@app.server``, past Modal's queue of inputs.

    As in::

        @app.server(port=8000, **modal_config.get_server_settings())
        class SentimentServer(ModalServer):
            inference_implementation = SentimentPipeline
            modal_utils = modal_config
            job_service = SentimentApp

    Modal scales it by open requests and never runs one again. Its jobs become calls of `job_service`, a registered
    `ModalService`; without one they are refused.
    """

    port: ClassVar[int] = 8000
    """As given to ``@app.server``."""
    host: ClassVar[str] = "0.0.0.0"  # noqa: S104  # Modal's proxy comes from outside the container
    input_model: ClassVar[type[BaseModel] | None] = None
    """What items are validated as; None leaves it to the pipeline."""
    output_model: ClassVar[type[InferenceOutputModel] | None] = None
    """What results are documented with; None leaves it to the pipeline."""
    job_service: ClassVar[Any] = None

    _server: Lifetime[uvicorn.Server] | None = None

    async def _start(self) -> None:
        await super()._start()
        connect = None if self.job_service is None else connection(self.job_service, self.configuration(), {})
        app = web_app_here(self, self.input_model, self.output_model, connect)
        self._server = Lifetime(_serving(app, self.host, self.port))
        await self._server.start()

    async def _stop(self) -> None:
        if self._server is not None:
            await self._server.stop(GRACE_S)
        await super()._stop()


class _Server(uvicorn.Server):
    """A server that leaves signals to Modal."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@asynccontextmanager
async def _serving(app: FastAPI, host: str, port: int) -> AsyncIterator[uvicorn.Server]:
    """Serve while the context is open, from when the port answers."""
    server = _Server(uvicorn.Config(app, host, port, log_config=None, timeout_graceful_shutdown=int(GRACE_S)))
    async with plain_task_group() as task_group:
        task_group.start_soon(server.serve)
        while not server.started:  # noqa: ASYNC110  # uvicorn has nothing to wait for
            await anyio.sleep(0.01)
        yield server
        server.should_exit = True
