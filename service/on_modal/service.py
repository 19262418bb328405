"""`ModalService`: the worker as a Modal class."""

from collections.abc import Sequence
from typing import Any

import modal
from fastapi import FastAPI
from pydantic import BaseModel

from modalkit.pipelines import InferenceOutputModel
from modalkit.service.calls.engine import CallOptions
from modalkit.service.calls.wire_format import InputEntry
from modalkit.service.on_modal.container import only_service_errors
from modalkit.service.on_modal.endpoints import web_app_here
from modalkit.service.on_modal.hosting import HostedService


class ModalService(HostedService):
    """Runs a pipeline in the containers of a Modal class, on batches of what many callers send.

    Subclass it, name the pipeline, and register the subclass::

        class Sentiment(ModalService):
            inference_implementation = SentimentPipeline

        @app.cls(**modal_config.get_app_cls_settings())
        @modal.concurrent(**modal_config.get_concurrency_settings())
        class SentimentApp(Sentiment):
            modal_utils: ModalConfig = modal_config

    To override `process_request` takes another ``@modal.method()``, without which Modal does not see it.
    """

    @modal.method()
    async def process_request(self, /, input_list: Sequence[InputEntry], **options: Any) -> list[dict[str, Any]]:
        """Run a list of items, and return what became of each, in the same order.

        An entry is ``{"message": {…}}``, or a `SyncInputModel`, and gives the pipeline's output as an object,
        ``{"status": "success", …}``, or ``{"status": "error", "error": …}``. With more keys, or as an
        `AsyncInputModel`, it is a job: its result is sent to the queue that it names, again and again while the call
        has time, and the job is what is returned. Entries of other calls run in the same batches; one that is invalid
        or fails disturbs no other.

        The `options` are those of `CallOptions`: `priority` is ``interactive`` or ``bulk``, and `timeouts_s` limits the
        seconds of each entry, for example. Raises `ContainerFaultError` when the device breaks, for Modal to run the
        call again, and `RemoteCallError` for any other error of the call as a whole. When cancelled, what has not run
        leaves the queue.
        """
        container = self.running()
        with only_service_errors("process_request failed"):
            return await container.process(input_list, CallOptions(**options))

    def web_app(
        self, input_model: type[BaseModel] | None = None, output_model: type[InferenceOutputModel] | None = None
    ) -> FastAPI:
        """The HTTP service of this container, for a method of the class under ``@modal.asgi_app``.

        Items run right here, without a call between; jobs become calls of this class. Items are validated as
        `input_model` and documented with `output_model`, by default those of the pipeline.
        """

        async def connect() -> Any:
            return self.process_request

        return web_app_here(self, input_model, output_model, connect)
