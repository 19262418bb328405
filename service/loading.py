"""Makes the objects that the configuration names: models, queue backends, job stores."""

import importlib
import importlib.util
import inspect
import logging
import sys
from importlib.machinery import ModuleSpec, PathFinder
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from modalkit.batching.errors import users_error
from modalkit.pipelines import InferenceOutputModel, InferencePipeline
from modalkit.pipelines.inference_pipeline import TRANSFORMERS_LOADING, has_own
from modalkit.service.construction import Constructor
from modalkit.service.errors import ServiceError, UnknownModelError, describe_error, describe_with_line, error_text
from modalkit.service.jobs import JobStore, MemoryJobStore, SqliteJobStore
from modalkit.service.jobs.manager import JobManager
from modalkit.service.queue_backends import (
    InMemoryBackend,
    QueueBackend,
    RoutingBackend,
    SQSBackend,
    TaskIQBackend,
    WebhookBackend,
)
from modalkit.service.queue_backends.protocol import check_backend
from modalkit.service.settings import QueueConfig, Settings, SettingsError
from modalkit.service.settings.problems import Problem

logger = logging.getLogger(__name__)

T = TypeVar("T")

LOADING_TURN_S = 60.0
"""Seconds after which a constructor that may use transformers runs beside another one that has not ended."""

NO_MODELS = "model_settings.model_entries: there is no model; add one"
"""What is wrong with a configuration without models."""

_FORMER_PACKAGES = ("batching", "benchmarks", "pipelines", "service")


class LoadError(ServiceError):
    """Raised when a class that the configuration names cannot be imported, is of the wrong kind, or cannot be built.

    Also raised when the warm-up of a pipeline fails. Its text names the line of the user's code that raised.
    """


def find_top_module(name: str, folder: Path | None) -> ModuleSpec | None:
    """Where Python finds a top-level module, or else where it is in the `folder`; imports nothing."""
    try:
        found = importlib.util.find_spec(name)
    except ValueError:  # a module that is loaded and has no __spec__
        found = None
    return found or (None if folder is None else PathFinder.find_spec(name, [str(folder)]))


def current_name(module_name: str, folder: Path | None = None) -> str:
    """The name by which to import a module that the configuration names; imports nothing.

    modalkit's own packages used to be at the top level, and configurations still say `pipelines.sentiment`: that means
    `modalkit.pipelines.sentiment`, unless Python, or else the `folder`, has another module of that name.
    """
    top, *inner = module_name.split(".")
    if top not in _FORMER_PACKAGES:
        return module_name
    own = _find_inner(importlib.util.find_spec("modalkit"), [top, *inner])
    found = _find_inner(find_top_module(top, folder), inner)
    if own is None or own.origin is None:
        return module_name
    # In modalkit's own folder, its links make both names lead to one file.
    if found is not None and Path(str(found.origin)).resolve() != Path(own.origin).resolve():
        return module_name
    return f"modalkit.{module_name}"


def _find_inner(package: ModuleSpec | None, names: list[str]) -> ModuleSpec | None:
    for name in names:
        if package is None or package.submodule_search_locations is None:
            return None
        package = PathFinder.find_spec(f"{package.name}.{name}", list(package.submodule_search_locations))
    return package


def import_object(path: str, key: str) -> Any:
    """Import the object at `"module:Class"`. Raises `LoadError`, whose message begins with `key`, a setting's path."""
    module_name, _, attribute = path.partition(":")
    module_name = current_name(module_name)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name + ".").startswith(error.name + "."):
            raise LoadError(f"{key}: importing {module_name!r} failed: {error}; install what it needs") from error
        raise LoadError(
            f"{key}: there is no module {error.name!r} (for {path!r}); check the spelling, or start from the folder "
            "that holds it"
        ) from error
    except BaseException as error:
        users_error(error)
        raise LoadError(f"{key}: importing {module_name!r} failed: {describe_with_line(error)}") from error
    try:
        return attrgetter(attribute)(module)
    except AttributeError:
        file = getattr(module, "__file__", None) or "a part of Python"
        raise LoadError(
            f"{key}: module {module_name!r} ({file}) has no {attribute!r}; check the spelling and case, or rename your "
            "module if this is another one"
        ) from None


def import_class(path: str, key: str, base: type[T]) -> type[T]:
    """Import the subclass of `base` that ``module:Class`` names; see `import_object`. Raises `LoadError`."""
    found = import_object(path, key)
    if not (inspect.isclass(found) and issubclass(found, base)):
        raise LoadError(f"{key}: {path!r} must be a subclass of {base.__name__}, it is {found!r}")
    return found


class ModelSource:
    """One entry of ``model_settings.model_entries``. The constructor imports its classes, `load` reads its weights.

    An `implementation` is used in place of the class that the entry names, and needs no entry. Raises
    `UnknownModelError` for a name with neither, `LoadError` for a class that cannot be imported, and `SettingsError`
    for keys that the constructor of the pipeline does not take, or that it needs and that are missing.
    """

    def __init__(
        self, settings: Settings, model_name: str, implementation: type[InferencePipeline] | None = None
    ) -> None:
        entry = settings.model_settings.model_entries.get(model_name)
        path = ("model_settings", "model_entries", model_name)
        self.key = ".".join(path)
        self._folder = str(settings.model_settings.local_model_repository_folder)
        self._common = settings.model_settings.common
        costs = settings.app_settings.batch_config.calibration.path
        self._engine_folder = None if costs is None else costs.parent / "engines"  # beside the learnt costs
        self._arguments = {} if entry is None else entry.arguments()
        self.model_name = model_name
        self.settings = settings.for_model(model_name)
        """The settings, in which the limits of batches are those of this model."""
        self._devices = [self._common["device"]] if entry is None or entry.devices is None else entry.devices
        self._takes_all_gpus = entry is not None and entry.devices == ["auto"]
        self._implementation = implementation
        if implementation is None:
            if entry is None:
                raise UnknownModelError(model_name, sorted(settings.model_settings.model_entries))
            implementation = import_class(entry.pipeline, f"{self.key}.pipeline", InferencePipeline)
        self.pipeline_class = implementation
        self._constructor = Constructor(implementation)
        problems = [
            Problem((*path, key), message, settings.origin(*path, key))
            for key, message in self._constructor.problems(self._arguments)
        ]
        if problems:
            raise SettingsError(problems)
        for key, meant in self._constructor.misspelt(self._arguments):
            logger.warning(
                "%s.%s: is given to the constructor of %s; did you mean %s? (%s)",
                self.key,
                key,
                implementation.__name__,
                meant,
                settings.origin(*path, key),
            )
        if self.settings.app_settings.batch_config.max_batch_tokens is not None and not has_own(
            implementation, "item_size"
        ):
            logger.warning(
                "%s: batch_config.max_batch_tokens has no effect, because each item has the size 1; implement "
                "item_size in %s, or set max_batch_size",
                self.key,
                implementation.__name__,
            )
        self.input_model: type[BaseModel] = implementation.input_model
        self.output_model: type[InferenceOutputModel] = implementation.output_model
        if entry is not None and entry.input_model is not None:
            self.input_model = import_class(entry.input_model, f"{self.key}.input_model", BaseModel)
        if entry is not None and entry.output_model is not None:
            self.output_model = import_class(entry.output_model, f"{self.key}.output_model", InferenceOutputModel)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.settings, self.model_name, self._implementation)

    def devices(self) -> list[str]:
        """The devices that run this model. Imports torch where the entry's ``devices`` is ``auto``: all GPUs then."""
        if self._takes_all_gpus:
            import torch

            if torch.cuda.device_count() > 1:
                return [f"cuda:{number}" for number in range(torch.cuda.device_count())]
        return self._devices

    def again(self, settings: Settings) -> "ModelSource":
        """The same model by other settings. Raises what the constructor raises."""
        return type(self)(settings, self.model_name, self._implementation)

    def load(self, device: str | None = None) -> InferencePipeline:
        """Construct the pipeline, which takes seconds; may run in any thread. Raises `LoadError`.

        A `device` is used in place of the configured one, or of the first of several.
        """
        common = {**self._common, "device": self._devices[0] if device is None else device}
        engines = common.get("engines")
        if isinstance(engines, dict) and engines.get("cache_folder") is None and self._engine_folder is not None:
            common["engines"] = {**engines, "cache_folder": self._engine_folder}
        arguments = {
            "model_name": self.model_name,
            "all_model_data_folder": self._folder,
            "common_settings": common,
        }
        has_turn = self._may_use_transformers and TRANSFORMERS_LOADING.acquire(timeout=LOADING_TURN_S)
        try:
            pipeline = self._constructor.make(arguments, self._arguments)
        except BaseException as error:
            users_error(error)
            name = self.pipeline_class.__name__
            raise LoadError(f"{self.key}: {name} cannot be loaded: {describe_with_line(error)}") from error
        finally:
            if has_turn:
                TRANSFORMERS_LOADING.release()
        pipeline.output_model = self.output_model  # type: ignore[misc]  # of the class, unless the entry names one
        return pipeline

    @property
    def _may_use_transformers(self) -> bool:
        """Whether its constructor may load a model of transformers; modalkit's own pipelines take their turn there."""
        return "transformers" in sys.modules and not self.pipeline_class.__module__.startswith("modalkit.")


class _DiscardingBackend:
    """The backend of a route to ``none``: it sends nothing, because the results are kept with their jobs."""

    async def send_message(self, queue_name: str, message: str) -> bool:  # noqa: ARG002  # as the protocol has it
        return True


def load_queue_backend(config: QueueConfig) -> QueueBackend | None:
    """The queue backend that the configuration names, or None for ``none``. Raises `LoadError`."""
    if config.backend == "none":
        return None
    if config.backend != "routing":
        return _make_queue_backend(config, config.backend, "app_settings.queue_config.backend")
    backends: dict[str, QueueBackend] = {}  # several routes may share one backend
    for pattern, name in config.routes.items():
        if name not in backends:
            backends[name] = _make_queue_backend(config, name, f"app_settings.queue_config.routes.{pattern}")
    return RoutingBackend({pattern: backends[name] for pattern, name in config.routes.items()})


def _make_queue_backend(config: QueueConfig, name: str, key: str) -> QueueBackend:
    make = import_object(name, key) if ":" in name else lambda: _make_built_in_backend(config, name)
    try:
        backend = make()
    except ValueError as error:
        raise LoadError(f"{key}: {name} cannot be built: {error_text(error)}") from error
    except BaseException as error:
        raise LoadError(f"{key}: {name} cannot be built: {describe_error(users_error(error))}") from error
    try:
        check_backend(name, backend)
    except TypeError as error:
        raise LoadError(f"{key}: {error}") from None
    return backend


def _make_built_in_backend(config: QueueConfig, name: str) -> QueueBackend:
    match name:
        case "none":
            return _DiscardingBackend()
        case "memory":
            # These queues cannot be read from outside the process, and the job store keeps the results.
            return InMemoryBackend(max_messages_per_queue=1000, max_queues=100, is_read=False)
        case "sqs":
            return SQSBackend(**config.sqs.model_dump())
        case "webhook":
            webhook = config.webhook
            return WebhookBackend(
                allowed_hosts=webhook.allowed_hosts,
                secret=None if webhook.secret is None else webhook.secret.get_secret_value(),
                allow_private_addresses=webhook.allow_private_addresses,
            )
        case "taskiq":
            return TaskIQBackend(config.broker_url)
        case _:
            raise AssertionError(f"the settings let {name!r} through as a backend: this is a bug in modalkit")


def make_job_manager(
    settings: Settings | None,
    queue_backend: QueueBackend | None,
    job_store: JobStore | None,
    *,
    owns_backend: bool = False,
) -> JobManager:
    """A `JobManager` that is not open yet; `queue_backend` and `job_store` are used in place of the configured ones.

    It closes the configured backend at its end, and the given one if it `owns_backend`. Without settings, jobs are kept
    in memory and there is no queue. Raises `LoadError` for a backend that cannot be built.
    """
    if settings is None:
        return JobManager(MemoryJobStore() if job_store is None else job_store, queue_backend)
    queue_config, async_config = settings.app_settings.queue_config, settings.app_settings.async_config
    if job_store is None and async_config.store == "memory":
        job_store = MemoryJobStore(max_jobs=async_config.max_stored_jobs)
    elif job_store is None:
        job_store = SqliteJobStore(async_config.store_path, max_jobs=async_config.max_stored_jobs)
    return JobManager(
        job_store,
        load_queue_backend(queue_config) if queue_backend is None else queue_backend,
        owns_backend=owns_backend or queue_backend is None,
        allowed_queues=queue_config.allowed_queues,
        result_ttl_s=async_config.result_ttl,
        max_delivery_attempts=async_config.max_delivery_attempts,
    )
