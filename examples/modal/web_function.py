"""A web function without a GPU in front of the class with one: it gathers requests into lists."""

import modal
from emphasis import Emphasis, EmphasisPipeline, Text
from fastapi import FastAPI

from modalkit.modal_config import ModalConfig
from modalkit.modal_service import ModalService, create_web_endpoints
from modalkit.task_queue import QueueBackend

modal_config = ModalConfig()
app = modal.App(modal_config.app_name)


class EmphasisService(ModalService):
    inference_implementation = EmphasisPipeline

    def __init__(self, queue_backend: QueueBackend | None = None) -> None:
        super().__init__(queue_backend=queue_backend)
        self.model_name = "emphasis"


@app.cls(**modal_config.get_app_cls_settings())
@modal.concurrent(**modal_config.get_concurrency_settings())
class EmphasisApp(EmphasisService):
    modal_utils: ModalConfig = modal_config


@app.function(**modal_config.get_handler_settings())
@modal.concurrent(**modal_config.get_handler_concurrency_settings())
@modal.asgi_app(**modal_config.get_asgi_app_settings())
def web_endpoints() -> FastAPI:
    return create_web_endpoints(app_cls=EmphasisApp, input_model=Text, output_model=Emphasis)
