"""The HTTP service over a class of Modal's, over one that is not registered anywhere, and in a container itself."""

import inspect
import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import modal
import modal.exception
from fastapi import FastAPI
from pydantic import BaseModel

from modalkit.pipelines import InferenceOutputModel, InferencePipeline
from modalkit.service.calls.jobs import CallGateway, CallJobs
from modalkit.service.calls.predictor import CallModel
from modalkit.service.gateway import Gateway
from modalkit.service.jobs.queue_rules import QueueRules
from modalkit.service.loading import LoadError, ModelSource, load_queue_backend
from modalkit.service.local_gateway import LocalGateway
from modalkit.service.on_modal.config import ModalConfig
from modalkit.service.on_modal.container import set_up_logs_and_traces
from modalkit.service.on_modal.engine import (
    Connect,
    ModalEngine,
    connection,
    open_metrics,
    open_records,
    takes_one_input_at_a_time,
)
from modalkit.service.on_modal.hosting import HostedService, default_model_name, model_source, responses_of
from modalkit.service.queue_backends import QueueBackend
from modalkit.service.web.app import configured_app
from modalkit.service.web.metrics import own_exposition

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

    Items are validated as `input_model`, here and in the containers, and documented with `output_model`; by default
    these are those of the configuration. Who may call is up to ``auth_config``.
    """
    set_up_logs_and_traces()
    config = getattr(app_cls, "modal_utils", None)
    config = config if isinstance(config, ModalConfig) else ModalConfig()
    gateway: Gateway
    if inspect.isclass(app_cls) and issubclass(app_cls, HostedService):
        gateway = _gateway_here(app_cls, input_model, output_model, models)
    else:
        gateway = _gateway_to(app_cls, config, input_model, output_model, models)
    return configured_app(gateway, config.app_settings)


def web_app_here(
    service: HostedService,
    input_model: type[BaseModel] | None,
    output_model: type[InferenceOutputModel] | None,
    connect: Connect | None,
) -> FastAPI:
    """The HTTP service of a container over its own worker. Jobs become calls, by `connect`; without, they are refused.

    The worker validates items as `input_model` from now on.
    """
    config, container = service.configuration(), service.running()
    worker, path = container.worker, import_path(input_model)
    worker.input_model = input_model or worker.input_model
    worker.output_model = output_model or worker.output_model
    models, engine = {worker.name: worker}, ModalEngine({} if connect is None else {worker.name: connect})
    jobs = CallJobs(
        engine,
        open_records(config),
        models,
        queue_rules=container.queue_rules,
        config=config.settings.for_model(worker.name).app_settings.batch_config,
        input_model_path=path,
    )
    gateway = CallGateway(models, jobs, [engine], None if modal.is_local() else open_metrics(config))
    return configured_app(gateway, config.app_settings)


def _gateway_to(
    app_cls: Any,
    config: ModalConfig,
    input_model: type[BaseModel] | None,
    output_model: type[InferenceOutputModel] | None,
    models: Sequence[str],
) -> CallGateway:
    if takes_one_input_at_a_time():
        logger.info(
            "This web container handles one request at a time; decorate the function, below @app.function(...), with "
            "@modal.concurrent(**modal_config.get_handler_concurrency_settings()) to have it gather lists of them"
        )
    given_parameters: list[dict[str, str]] = [{"model_name": name} for name in models] or [{}]
    parameters_of = {_name_of(app_cls, config, parameters): parameters for parameters in given_parameters}
    engine = ModalEngine({name: connection(app_cls, config, given) for name, given in parameters_of.items()})
    path = import_path(input_model)

    def call_model(name: str) -> CallModel:
        known_input, known_output = input_model, output_model
        if known_input is None or known_output is None:
            source = ModelSource(config.settings, name, _implementation(app_cls))
            known_input, known_output = known_input or source.input_model, known_output or source.output_model
        return CallModel(
            name,
            engine,
            config.settings.for_model(name).app_settings.batch_config,
            input_model=known_input,
            output_model=known_output,
            input_model_path=path,
        )

    call_models = {name: call_model(name) for name in parameters_of}
    jobs = CallJobs(
        engine,
        open_records(config),
        call_models,
        queue_rules=QueueRules(
            config.app_settings.queue_config.allowed_queues,
            _known_backend(app_cls, config, given_parameters[0]),
        ),
        config=config.app_settings.batch_config,
        input_model_path=path,
    )
    published = open_metrics(config)
    gateway = CallGateway(call_models, jobs, [engine, *call_models.values()], published)
    gateway.opens = [*gateway.opens, published.publishing(partial(own_exposition, gateway))]
    return gateway


def import_path(model: type[BaseModel] | None) -> str | None:
    """Where a container imports a class, ``module:Class``; None for None, and for a class that it cannot import."""
    if model is None:
        return None
    if model.__module__ == "__main__" or not model.__qualname__.isidentifier():
        logger.warning(
            "input_model: containers cannot import %s, so they validate messages as the pipeline's own class; define "
            "it at the top level of a module that is in the image",
            model.__qualname__,
        )
        return None
    return f"{model.__module__}:{model.__qualname__}"


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
    owns_backend = first.make_backend()
    return LocalGateway(
        first.configuration().settings,
        queue_backend=responses_of(first),
        owns_backend=owns_backend,
        sources=sources,
    )


def _implementation(app_cls: Any) -> type[InferencePipeline] | None:
    implementation = getattr(app_cls, "inference_implementation", None)
    is_pipeline = inspect.isclass(implementation) and issubclass(implementation, InferencePipeline)
    return implementation if is_pipeline else None


def _known_backend(app_cls: Any, config: ModalConfig, parameters: Mapping[str, str]) -> QueueBackend | None:
    """The backend by which the containers check names of queues; None where that is not known here."""
    try:
        backend: QueueBackend | None = app_cls(**parameters).queue_backend
    except (AttributeError, modal.exception.NotFoundError):
        return None  # of a class that was looked up, only methods are known
    queue_config = config.app_settings.queue_config
    if backend is not None or any(":" in name for name in (queue_config.backend, *queue_config.routes.values())):
        return backend  # a configured class of the user's may need what only the containers have
    try:
        return load_queue_backend(queue_config)
    except LoadError as error:
        logger.info("This web container leaves it to the others to check the names of queues: %s", error)
        return None


def _name_of(app_cls: Any, config: ModalConfig, parameters: Mapping[str, str]) -> str:
    """The name of the model of an instance, which its constructor may set.

    Raises `LoadError` where there can be no such instance, which Modal would say at each call.
    """
    try:
        name = app_cls(**parameters).model_name
    except (AttributeError, modal.exception.NotFoundError):
        name = None  # of a class that was looked up, only methods are known
    except TypeError as error:
        raise LoadError(
            f"an instance of the service class cannot be made with {dict(parameters)}: {error}; where it has several "
            "models, declare model_name: str = modal.parameter() in it and give create_web_endpoints their names, as "
            "in models=['sentiment']"
        ) from error
    name = parameters.get("model_name", name)
    return name if isinstance(name, str) else default_model_name(config, _implementation(app_cls))
