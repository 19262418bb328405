"""`ModalServer`: the worker as a server of its own in a container, which Modal's proxy sends requests to directly."""

import signal
from typing import Any, ClassVar

import anyio
import modal
import uvicorn
from pydantic import BaseModel

from modalkit.pipelines import InferenceOutputModel
from modalkit.service.on_modal.hosting import HostedService
from modalkit.service.on_modal.http_port import GRACE_S, serving
from modalkit.service.on_modal.lifetime import Lifetime
from modalkit.service.on_modal.models import connection
from modalkit.service.on_modal.web_here import web_app_here


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
        server = Lifetime(serving(app, self.host, self.port))
        try:
            await server.start()
        except BaseException:
            await super()._stop()
            raise
        self._server = server

    async def _stop(self, used_s: float = 0.0) -> None:
        server, self._server = self._server, None
        started_s = anyio.current_time() - used_s
        try:
            if server is not None:
                await server.stop(GRACE_S)
        finally:
            await super()._stop(anyio.current_time() - started_s)

    async def _leave_rotation(self) -> None:
        """End this container, which has no inputs to stop, as Modal ends it: open requests are finished."""
        if not modal.is_local():
            signal.raise_signal(signal.SIGTERM)
