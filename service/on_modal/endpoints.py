"""`create_web_endpoints`: the HTTP service over a class of Modal's, or over one that is not registered anywhere."""

import inspect
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import modal.exception
from fastapi import FastAPI
from pydantic import BaseModel

from modalkit.pipelines import InferenceOutputModel, InferencePipeline
from modalkit.service.gateway import Gateway
from modalkit.service.jobs.queue_rules import QueueRules
from modalkit.service.loading import LoadError, ModelSource
from modalkit.service.local_gateway import LocalGateway
from modalkit.service.on_modal.call_jobs import CallJobs
from modalkit.service.on_modal.config import ModalConfig
from modalkit.service.on_modal.gateway import ModalGateway
from modalkit.service.on_modal.hosting import HostedService, model_source, responses_of
from modalkit.service.on_modal.models import RemoteModel, connection
from modalkit.service.on_modal.remote import ModalCalls
from modalkit.service.on_modal.runtime import takes_one_input_at_a_time
from modalkit.service.on_modal.tables import open_ledger
from modalkit.service.web import create_app

logger = logging.getLogger(__name__)


def create_web_endpoints(
    app_cls: Any,
    input_model: type[BaseModel] | None = None,
    output_model: type[InferenceOutputModel] | None = None,
    *,
    models: Sequence[str] = (),
) -> FastAPI:
    """The HTTP service over `app_cls`, for a function under ``@modal.asgi_app``.

    `app_cls` is a subclass of `ModalService` that is registered with Modal, or one that was looked up: requests are
    gathered into lists, which its containers run. Of one with a parameter ``model_name``, `models` are the names that
    may be asked for, the first by default. A subclass that is not registered is served by this process, as
    ``modalkit serve`` would: for development.

    Items are validated as `input_model` and documented with `output_model`, by default those of the configuration. Who
    may call is up to ``auth_config``.
    """
    config = getattr(app_cls, "modal_utils", None)
    config = config if isinstance(config, ModalConfig) else ModalConfig()
    gateway: Gateway
    if inspect.isclass(app_cls) and issubclass(app_cls, HostedService):
        gateway = _gateway_here(app_cls, input_model, output_model, models)
    else:
        gateway = _gateway_to(app_cls, config, input_model, output_model, models)
    return create_app(gateway, auth=config.app_settings.auth_config)


def _gateway_to(
    app_cls: Any,
    config: ModalConfig,
    input_model: type[BaseModel] | None,
    output_model: type[InferenceOutputModel] | None,
    models: Sequence[str],
) -> ModalGateway:
    if takes_one_input_at_a_time():
        logger.info(
            "This web container handles one request at a time; decorate the function, below @app.function(...), with "
            "@modal.concurrent(**modal_config.get_handler_concurrency_settings()) to have it gather lists of them"
        )
    ledger, app_settings = open_ledger(config), config.app_settings
    queue_rules = QueueRules(app_settings.queue_config.allowed_queues, None)
    parameters_of = {name: {"model_name": name} for name in models} or {_name_of(app_cls, config): {}}

    def model(name: str, parameters: Mapping[str, Any]) -> RemoteModel:
        _said_name(app_cls, parameters)  # which says what is wrong with them before Modal does, at each call
        known_input, known_output = input_model, output_model
        if known_input is None or known_output is None:
            source = ModelSource(config.settings, name, _implementation(app_cls))
            known_input, known_output = known_input or source.input_model, known_output or source.output_model
        return RemoteModel(
            name,
            known_input,
            known_output,
            connection(app_cls, config, parameters),
            ledger=ledger,
            queue_rules=queue_rules,
            settings=app_settings,
        )

    return ModalGateway(
        {name: model(name, parameters) for name, parameters in parameters_of.items()}, CallJobs(ModalCalls(), ledger)
    )


def _gateway_here(
    service_cls: type[HostedService],
    input_model: type[BaseModel] | None,
    output_model: type[InferenceOutputModel] | None,
    models: Sequence[str],
) -> LocalGateway:
    services = [service_cls() for _ in models] or [service_cls()]
    for service, name in zip(services, models):  # noqa: B905  # there may be no names
        service.model_name = name
    sources = [model_source(service, service.configuration()) for service in services]
    for source in sources:
        source.input_model = input_model or source.input_model
        source.output_model = output_model or source.output_model
    first = services[0]
    return LocalGateway(first.configuration().settings, queue_backend=responses_of(first), sources=sources)


def _implementation(app_cls: Any) -> type[InferencePipeline] | None:
    implementation = getattr(app_cls, "inference_implementation", None)
    is_pipeline = inspect.isclass(implementation) and issubclass(implementation, InferencePipeline)
    return implementation if is_pipeline else None


def _name_of(app_cls: Any, config: ModalConfig) -> str:
    """What the service calls its model, which its constructor may say; of a class that was looked up, the first."""
    name, implementation = _said_name(app_cls, {}), _implementation(app_cls)
    if name is None and implementation is not None:
        name = implementation.__name__
    if name is None:
        name = next(iter(config.model_settings.model_entries), None)
    if name is None:
        raise LoadError("model_settings.model_entries: there is no model; add one, or set inference_implementation")
    return name


def _said_name(app_cls: Any, parameters: Mapping[str, str]) -> str | None:
    """What an instance says that its model is called. Raises `LoadError` where there can be no such instance."""
    try:
        name = app_cls(**parameters).model_name
    except (AttributeError, modal.exception.NotFoundError):
        return None  # of one that was looked up, only methods are known
    except TypeError as error:
        raise LoadError(
            f"an instance of the service class cannot be made with {dict(parameters)}: {error}; where it has several "
            "models, declare model_name: str = modal.parameter() in it and give create_web_endpoints their names, as "
            "in models=['sentiment']"
        ) from error
    return name if isinstance(name, str) else None
