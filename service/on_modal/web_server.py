"""`ModalWebServer`: the web side as a server without a GPU, past Modal's queue of inputs."""

from collections.abc import Sequence
from typing import Any, ClassVar

import modal
import uvicorn
from pydantic import BaseModel

from modalkit.pipelines import InferenceOutputModel
from modalkit.service.on_modal.constructor import Constructible
from modalkit.service.on_modal.endpoints import create_web_endpoints
from modalkit.service.on_modal.http_port import GRACE_S, serving
from modalkit.service.on_modal.lifetime import Lifetime


class ModalWebServer(Constructible):
    """Serves `create_web_endpoints` from the containers of a class under ``@app.server``.

    As in::

        @app.server(port=8000, **modal_config.get_web_server_settings())
        class SentimentWeb(ModalWebServer):
            app_cls = SentimentApp

    A web function gets requests one by one from Modal's queue of inputs; this gets them from Modal's proxy, as many at
    a time as it is sent, so that its lists are longer. Modal never runs a request again; the lists it does.
    """

    app_cls: ClassVar[Any] = None
    """The registered `ModalService` that runs the lists."""
    input_model: ClassVar[type[BaseModel] | None] = None
    """What items are validated as; None leaves it to the configuration."""
    output_model: ClassVar[type[InferenceOutputModel] | None] = None
    """What results are documented with; None leaves it to the configuration."""
    models: ClassVar[Sequence[str]] = ()
    """The names that ``?model_name=`` may have, where `app_cls` has a parameter of that name."""
    port: ClassVar[int] = 8000
    """As given to ``@app.server``."""
    host: ClassVar[str] = "0.0.0.0"  # noqa: S104  # Modal's proxy comes from outside the container

    _server: Lifetime[uvicorn.Server] | None = None

    @modal.enter()
    async def _start_in_container(self) -> None:
        app = create_web_endpoints(self.app_cls, self.input_model, self.output_model, models=self.models)
        self._server = Lifetime(serving(app, self.host, self.port))
        await self._server.start()

    @modal.exit()
    async def _stop_in_container(self) -> None:
        if self._server is not None:
            await self._server.stop(GRACE_S)
