"""What a service class and a server class have in common: which pipeline they run, and where results of jobs go."""

import asyncio
import logging
from collections.abc import Callable
from types import TracebackType
from typing import Any, ClassVar, Self, cast

import modal
import modal.experimental
from anyio import to_thread
from modal.cls import is_parameter

from modalkit.batching import BatchRecord
from modalkit.pipelines import InferencePipeline
from modalkit.pipelines.inference_pipeline import awaited, has_own
from modalkit.service.loading import NO_MODELS, LoadError, ModelSource, load_queue_backend
from modalkit.service.on_modal.config import ModalConfig
from modalkit.service.on_modal.container import Container, only_service_errors, set_up_logs_and_traces
from modalkit.service.queue_backends import BatchQueueBackend, NamedQueueBackend, QueueBackend
from modalkit.service.queue_backends.protocol import keeps_in_process
from modalkit.service.queue_backends.sending import close_backend

logger = logging.getLogger(__name__)


class _Constructor:
    """A constructor that instances find, and that a look at the class does not."""

    def __init__(self, function: Callable[..., None]) -> None:
        self._function = function

    def __get__(self, instance: object, owner: type | None = None) -> Any:
        return object.__init__ if instance is None else self._function.__get__(instance, owner)


class Constructible:
    """The root of classes that Modal takes with their constructors, where these can be called without arguments.

    `modal.App.cls` looks at ``TheClass.__init__`` and refuses everything but `object.__init__`, inherited constructors
    too, because a constructor's arguments would not reach the container. Ours have defaults, so no argument has to: the
    class shows `object.__init__`, and its instances, those that Modal makes in a container included, run the real one.
    The price: a constructor has to call that of its base by ``super().__init__``; ``Base.__init__(self)`` looks at the
    class.
    """

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        constructor = cls.__init__  # its own, or one that a class outside of this family brings along
        if constructor is not object.__init__:
            cls.__init__ = _Constructor(constructor)  # type: ignore[assignment, method-assign]  # see above

    def __new__(cls, *_args: Any, **_options: Any) -> Self:
        """Make an instance, ready for use where the class has parameters."""
        instance = super().__new__(cls)
        if any(is_parameter(value) for value in vars(cls).values()):
            # Of a class with `modal.parameter`s Modal makes instances by this method alone, and then sets those.
            instance.__init__()  # type: ignore[misc]  # on purpose
        return instance


class HostedService(Constructible):
    """Runs a pipeline in the containers of a class, or inside ``async with`` in any program.

    A class may have a constructor that can be called without arguments; in a container it is. The configuration is
    `modal_utils`, by default that of the environment. Without an `inference_implementation` the pipeline is the one
    that the configuration has for `model_name`, by default the first. Results of jobs go to `queue_backend`, else to
    the configured one; `send_async_response` and `_send_to_queue` may be overridden.
    """

    inference_implementation: ClassVar[type[InferencePipeline] | None] = None
    """The class of the pipeline, in place of one that the configuration names."""
    modal_utils: ModalConfig | None = None
    """The configuration."""
    queue_backend: QueueBackend | None = None
    """Where results of jobs are sent."""
    # Not annotated: Modal would put it before all parameters of a class, where one with a default must not stand.
    model_name = cast("str | None", None)
    """The entry of ``model_settings.model_entries`` whose keys the pipeline gets; there need not be one."""

    # Class-level defaults, for a constructor that does not call this one.
    _container: Container | None = None
    _starting: asyncio.Lock | None = None
    _pipeline_of_snapshot: InferencePipeline | None = None
    _owns_backend = False

    def __init__(self, queue_backend: QueueBackend | None = None) -> None:
        if queue_backend is not None:
            self.queue_backend = queue_backend

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        # Modal refuses this hook in a class without memory snapshots, so it is there only where they are configured.
        if cls.modal_utils is not None and cls.modal_utils.app_settings.deployment_config.memory_snapshot:
            cls._load_for_snapshot = modal.enter(snap=True)(_load_for_snapshot)  # type: ignore[attr-defined]  # as said

    @modal.enter()
    async def _start_in_container(self) -> None:
        with only_service_errors("the container could not start"):
            await self._start()

    @modal.exit()
    async def _stop_in_container(self) -> None:
        await self._stop()

    async def __aenter__(self) -> Self:
        """Load the pipeline and start the worker. Raises `LoadError` and `SettingsError`."""
        await self._start()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Finish what was accepted."""
        await self._stop()

    async def send_async_response(self, queue_name: str, message: str) -> bool | None:
        """Send the result of a job, JSON text, to the queue that it named.

        Returns False, or raises, where it was not taken; it is sent again then, while there is time.
        """
        return await self._send_to_queue(queue_name, message)

    async def _send_to_queue(self, queue_name: str, message: str) -> bool:
        """Hand a message to the queue backend; returns whether it was taken."""
        return self.queue_backend is not None and await self.queue_backend.send_message(queue_name, message)

    def on_batch(self, record: BatchRecord) -> None:
        """Called in the event loop with the record of each batch. Does nothing; for subclasses that measure."""

    async def _start(self) -> None:
        if self._starting is None:
            self._starting = asyncio.Lock()
        async with self._starting:  # Modal enters an object by each of the first calls of `.local()`
            if self._container is None:
                self._container = await self._started_container()

    async def _started_container(self) -> Container:
        set_up_logs_and_traces()
        config = self.configuration()
        source = model_source(self, config)
        pipeline = self._pipeline_of_snapshot
        if pipeline is None:
            pipeline = await to_thread.run_sync(source.load)
        elif not config.app_settings.deployment_config.gpu_snapshot:
            await to_thread.run_sync(pipeline.move_to, source.devices()[0])
        self.make_backend()
        container = Container(
            config,
            source,
            pipeline,
            responses=responses_of(self),
            backend=self.queue_backend,
            leave_rotation=self._leave_rotation,
            on_batch=self.on_batch,
        )
        try:
            await container.start()
        except BaseException:
            await self.close_own_backend()
            raise
        return container

    async def _stop(self, used_s: float = 0.0) -> None:
        container, self._container = self._container, None
        try:
            if container is not None:
                await container.stop(used_s)
        finally:
            await self.close_own_backend()

    def make_backend(self) -> bool:
        """Make the configured queue backend if there is no other one; returns whether it did. Raises `LoadError`."""
        if self.queue_backend is None:
            self.queue_backend = load_queue_backend(self.configuration().app_settings.queue_config)
            self._owns_backend = True
        return self._owns_backend

    async def close_own_backend(self) -> None:
        """Close the queue backend that `make_backend` made."""
        if self._owns_backend:
            backend, self.queue_backend, self._owns_backend = self.queue_backend, None, False
            await close_backend(backend)

    async def _leave_rotation(self) -> None:
        """Have Modal send this container nothing more, and end it after what it has."""
        if not modal.is_local():
            await modal.experimental.stop_fetching_inputs.aio()

    def running(self) -> Container:
        """What runs in this container. Raises `RuntimeError` outside ``async with``."""
        if self._container is None:
            raise RuntimeError("the service is not running: use it inside 'async with', or in a Modal container")
        return self._container

    def configuration(self) -> ModalConfig:
        """`modal_utils`, or what stands in for it. Raises `SettingsError`."""
        if self.modal_utils is None:
            self.modal_utils = ModalConfig()
        return self.modal_utils


def model_source(service: HostedService, config: ModalConfig) -> ModelSource:
    """The pipeline class and the entry of a service. Raises `LoadError`, `SettingsError` and `UnknownModelError`."""
    implementation = service.inference_implementation
    name = default_model_name(config, implementation) if service.model_name is None else service.model_name
    source = ModelSource(config.settings, name, implementation)
    if len(source.devices()) > 1:
        raise LoadError(
            f"{source.key}.devices: a container of Modal runs a model on one device; name one, and let Modal run more "
            "containers (deployment_config.max_containers)"
        )
    return source


def default_model_name(config: ModalConfig, implementation: type[InferencePipeline] | None) -> str:
    """The name of the model of a service that does not say it. Raises `LoadError` where there is none."""
    if implementation is not None:
        return implementation.__name__
    for name in config.model_settings.model_entries:
        return name
    raise LoadError(f"{NO_MODELS}, or set inference_implementation")


def responses_of(service: HostedService) -> QueueBackend | None:
    """What results of a service's jobs are sent by: its methods where they are overridden, else its backend."""
    is_overridden = any(_overrides(service, name) for name in ("send_async_response", "_send_to_queue"))
    if isinstance(service.queue_backend, BatchQueueBackend) and not is_overridden:
        return service.queue_backend
    return _ByMethods(service) if is_overridden or service.queue_backend is not None else None


def _overrides(service: HostedService, name: str) -> bool:
    return getattr(type(service), name) is not getattr(HostedService, name)


class _ByMethods:
    """A backend that sends by the overridable methods of a service; for the rest it is the service's own backend."""

    def __init__(self, service: HostedService) -> None:
        self._service = service

    async def send_message(self, queue_name: str, message: str) -> bool:
        """Send a message; returns whether it was taken. A method that returns nothing has sent it."""
        return await self._service.send_async_response(queue_name, message) is not False

    def check_queue_name(self, queue_name: str) -> None:
        """Raise `QueueNameError` for a name that the service's backend refuses, where that gets it as it is."""
        backend = None if _overrides(self._service, "_send_to_queue") else self._service.queue_backend
        if isinstance(backend, NamedQueueBackend):
            backend.check_queue_name(queue_name)

    def keeps_in_process(self, queue_name: str) -> bool:
        """Whether the service's backend gets the messages, and keeps them in memory."""
        backend = None if _overrides(self._service, "_send_to_queue") else self._service.queue_backend
        return backend is not None and keeps_in_process(backend, queue_name)

    async def aclose(self) -> None:
        """Close the service's backend, if the configuration made it."""
        await self._service.close_own_backend()


async def _load_for_snapshot(self: HostedService) -> None:
    """Load the weights before Modal takes a snapshot: on the CPU, as there is no GPU yet, unless that is included."""
    with only_service_errors("the container could not start"):
        config = self.configuration()
        source = model_source(self, config)
        deployment = config.app_settings.deployment_config
        if deployment.gpu_snapshot:
            self._pipeline_of_snapshot = await to_thread.run_sync(source.load)
            await awaited(await to_thread.run_sync(self._pipeline_of_snapshot.warm_up))
        elif deployment.gpu is None or has_own(source.pipeline_class, "move_to"):
            self._pipeline_of_snapshot = await to_thread.run_sync(source.load, "cpu")
        else:
            logger.warning(
                "%s has no move_to, so the snapshot holds what it imports, but not its weights: implement move_to",
                source.pipeline_class.__name__,
            )
