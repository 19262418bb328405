"""HTTP in the container that runs the model: one hop less, and the GPU's container waits for slow clients too."""

import modal
from emphasis import EmphasisPipeline
from fastapi import FastAPI

from modalkit.modal_config import ModalConfig
from modalkit.modal_service import ModalService

modal_config = ModalConfig()
app = modal.App(modal_config.app_name)


@app.cls(**modal_config.get_app_cls_settings())
@modal.concurrent(**modal_config.get_concurrency_settings())
class EmphasisApp(ModalService):
    modal_utils: ModalConfig = modal_config
    inference_implementation = EmphasisPipeline

    @modal.asgi_app(**modal_config.get_asgi_app_settings())
    def web(self) -> FastAPI:
        return self.web_app()
