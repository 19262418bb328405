"""A server that Modal's proxy sends requests to directly, past the queue of inputs; its jobs run in a class."""

import modal
from emphasis import EmphasisPipeline

from modalkit.modal_config import ModalConfig
from modalkit.modal_service import ModalServer, ModalService

modal_config = ModalConfig()
app = modal.App(modal_config.app_name)


@app.cls(**modal_config.get_app_cls_settings())
@modal.concurrent(**modal_config.get_concurrency_settings())
class EmphasisJobs(ModalService):
    modal_utils: ModalConfig = modal_config
    inference_implementation = EmphasisPipeline


@app.server(port=8000, **modal_config.get_server_settings())
class EmphasisServer(ModalServer):
    modal_utils: ModalConfig = modal_config
    inference_implementation = EmphasisPipeline
    job_service = EmphasisJobs
