"""The HTTP service of a container that runs the model itself."""

from fastapi import FastAPI
from pydantic import BaseModel

from modalkit.pipelines import InferenceOutputModel
from modalkit.service.jobs.queue_rules import QueueRules
from modalkit.service.on_modal.call_jobs import CallJobs
from modalkit.service.on_modal.gateway import ModalGateway
from modalkit.service.on_modal.hosting import HostedService, model_source
from modalkit.service.on_modal.models import Connect, ModelHere
from modalkit.service.on_modal.remote import ModalCalls
from modalkit.service.on_modal.tables import open_ledger
from modalkit.service.web import create_app


def web_app_here(
    service: HostedService,
    input_model: type[BaseModel] | None,
    output_model: type[InferenceOutputModel] | None,
    connect: Connect | None,
) -> FastAPI:
    """The application over a service that runs. Jobs become calls, by way of `connect`; without, they are refused."""
    config = service.configuration()
    source, ledger = model_source(service, config), open_ledger(config)
    model = ModelHere(
        service.running().worker,
        input_model or source.input_model,
        output_model or source.output_model,
        connect,
        ledger=ledger,
        queue_rules=QueueRules(config.app_settings.queue_config.allowed_queues, service.queue_backend),
        settings=config.app_settings,
    )
    gateway = ModalGateway({source.model_name: model}, CallJobs(ModalCalls(), ledger))
    return create_app(gateway, auth=config.app_settings.auth_config)
