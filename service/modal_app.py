"""The configuration's models as a Modal app: ``modal deploy -m modalkit.service.modal_app``, or ``modalkit deploy``.

A class with the GPU, whose containers each run one model, and a web function without one, which gathers requests into
lists for them.
"""

import modal
from fastapi import FastAPI

from modalkit.service.loading import LoadError
from modalkit.service.on_modal.config import ModalConfig
from modalkit.service.on_modal.endpoints import create_web_endpoints
from modalkit.service.on_modal.service import ModalService

modal_config = ModalConfig()
models = list(modal_config.model_settings.model_entries)
if not models:
    raise LoadError("model_settings.model_entries: there is no model; add one")

app = modal.App(modal_config.app_name)


@app.cls(**modal_config.get_app_cls_settings())
@modal.concurrent(**modal_config.get_concurrency_settings())
class Model(ModalService):
    """One of the configured models."""

    modal_utils: ModalConfig = modal_config
    model_name: str = modal.parameter(default=models[0])


@app.function(**modal_config.get_handler_settings())
@modal.concurrent(**modal_config.get_handler_concurrency_settings())
@modal.asgi_app(**modal_config.get_asgi_app_settings())
def web() -> FastAPI:
    """The HTTP service over all models."""
    return create_web_endpoints(Model, models=models)
