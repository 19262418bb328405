"""A server without a GPU in front of the class with one: requests come past the queue of inputs, in longer lists."""

import modal
from emphasis import EmphasisPipeline

from modalkit.modal_config import ModalConfig
from modalkit.modal_service import ModalService, ModalWebServer

modal_config = ModalConfig()
app = modal.App(modal_config.app_name)


@app.cls(**modal_config.get_app_cls_settings())
@modal.concurrent(**modal_config.get_concurrency_settings())
class EmphasisApp(ModalService):
    modal_utils: ModalConfig = modal_config
    inference_implementation = EmphasisPipeline


@app.server(port=8000, **modal_config.get_web_server_settings())
class EmphasisWeb(ModalWebServer):
    app_cls = EmphasisApp
