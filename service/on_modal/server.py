"""Classes under ``@app.server``: HTTP from a container's port, which Modal's proxy sends requests to directly."""

import signal
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from typing import Any, ClassVar

import anyio
import modal
from fastapi import FastAPI
from pydantic import BaseModel

from modalkit.batching.task_groups import plain_task_group
from modalkit.pipelines import InferenceOutputModel
from modalkit.service.on_modal.container import Lifetime
from modalkit.service.on_modal.endpoints import create_web_endpoints, web_app_here
from modalkit.service.on_modal.engine import connection
from modalkit.service.on_modal.hosting import Constructible, HostedService
from modalkit.service.serving import listening
from modalkit.service.settings import ServerConfig
from modalkit.service.web.server import server_of

GRACE_S = 20.0
"""Seconds that open requests may go on after the server was told to stop."""


class _OnAPort(Constructible):
    """What classes under ``@app.server`` have in common: what they serve, and where."""

    input_model: ClassVar[type[BaseModel] | None] = None
    """What items are validated as; None leaves it to the configuration and the pipeline."""
    output_model: ClassVar[type[InferenceOutputModel] | None] = None
    """What results are documented with; None leaves it to the configuration and the pipeline."""
    port: ClassVar[int] = 8000
    """As given to ``@app.server``."""
    host: ClassVar[str] = "0.0.0.0"  # noqa: S104  # Modal's proxy comes from outside the container

    _server: Lifetime | None = None

    async def _open_port(self, app: FastAPI) -> None:
        self._server = Lifetime(serving(app, self.host, self.port))
        await self._server.start()

    async def _close_port(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            await server.stop(GRACE_S)


class ModalServer(_OnAPort, HostedService):
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

    job_service: ClassVar[Any] = None

    async def _start(self) -> None:
        await super()._start()
        connect = None if self.job_service is None else connection(self.job_service, self.configuration(), {})
        app = web_app_here(self, self.input_model, self.output_model, connect)
        try:
            await self._open_port(app)
        except BaseException:
            await self._stop()
            raise

    async def _stop(self, used_s: float = 0.0) -> None:
        started_s = anyio.current_time() - used_s
        try:
            await self._close_port()
        finally:
            await super()._stop(anyio.current_time() - started_s)

    async def _leave_rotation(self) -> None:
        """End this container, which has no inputs to stop, as Modal ends it: open requests are finished."""
        if not modal.is_local():
            signal.raise_signal(signal.SIGTERM)


class ModalWebServer(_OnAPort):
    """Serves `create_web_endpoints` from the containers of a class under ``@app.server``, which need no GPU.

    As in::

        @app.server(port=8000, **modal_config.get_web_server_settings())
        class SentimentWeb(ModalWebServer):
            app_cls = SentimentApp

    A web function gets requests one by one from Modal's queue of inputs; this gets them from Modal's proxy, as many at
    a time as are sent, so that its calls are longer. Modal never runs a request again; it does so with calls.
    """

    app_cls: ClassVar[Any] = None
    """The registered `ModalService` that runs the calls."""
    models: ClassVar[Sequence[str]] = ()
    """The names that ``?model_name=`` may have, where `app_cls` has a parameter of that name."""

    @modal.enter()
    async def _start_in_container(self) -> None:
        await self._open_port(
            create_web_endpoints(self.app_cls, self.input_model, self.output_model, models=self.models)
        )

    @modal.exit()
    async def _stop_in_container(self) -> None:
        await self._close_port()


@asynccontextmanager
async def serving(app: FastAPI, host: str, port: int) -> AsyncGenerator[None]:
    """Serve while the context is open, from when the port answers.

    Raises `AddressError`, and what the application's start does.
    """
    server = server_of(app, ServerConfig(grace_seconds=GRACE_S), access_log=True)
    server.config.lifespan = "off"
    # Both here, because uvicorn ends the process where the address is taken, or the application cannot start.
    with listening(host, port) as listener:
        async with app.router.lifespan_context(app), plain_task_group() as task_group:
            task_group.start_soon(server.serve, [listener])
            while not server.started:  # noqa: ASYNC110  # uvicorn has nothing to wait for
                await anyio.sleep(0.01)
            yield
            server.should_exit = True
