"""The gateway to models that run in this process."""

import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Self, TypeVar

import anyio
from anyio import AsyncContextManagerMixin
from pydantic import BaseModel

from modalkit.batching import Outcome, Priority, SchedulerStatistics
from modalkit.batching.task_groups import plain_task_group
from modalkit.batching.threads import DedicatedThread
from modalkit.pipelines import EngineChoice, InferenceOutputModel, InferencePipeline
from modalkit.service.device_process import load_on_devices
from modalkit.service.errors import NotReadyError, Readiness, ServiceError, UnknownModelError, describe_error
from modalkit.service.jobs import JobStore
from modalkit.service.jobs.manager import JobManager
from modalkit.service.loading import LoadError, ModelSource, make_job_manager
from modalkit.service.queue_backends import QueueBackend
from modalkit.service.settings import Settings
from modalkit.service.worker import InferenceWorker

logger = logging.getLogger(__name__)

T = TypeVar("T")


class ModelBrokenError(ServiceError):
    """Raised inside the gateway, and logged, for a model that was ready and can run nothing any more."""

    def __init__(self, model_name: str) -> None:
        super().__init__(f"model {model_name!r} broke down and takes no requests any more; restart this process")
        self.model_name = model_name


class LocalModel:
    """A configured model and, once it is loaded, its worker."""

    def __init__(self, source: ModelSource, closing: anyio.Event) -> None:
        self.name = source.model_name
        self.input_model = source.input_model
        self.output_model = source.output_model
        self.error: Exception | None = None
        """Why it could not be loaded, or broke down."""
        self.worker: InferenceWorker | None = None
        self.settled = anyio.Event()
        """Set once the model is ready or has failed."""
        self._source = source
        self._closing = closing

    @property
    def readiness(self) -> Readiness:
        """Whether it takes requests."""
        if self.error is not None:
            return Readiness.FAILED if self.worker is None else Readiness.BROKEN
        if self._closing.is_set():
            return Readiness.DRAINING
        if self.worker is None:
            return Readiness.LOADING
        return Readiness.BROKEN if self.worker.is_broken else Readiness.READY

    async def predict(
        self, item: BaseModel, *, priority: Priority = Priority.INTERACTIVE, timeout_s: float | None = None
    ) -> InferenceOutputModel:
        """Run one item. Raises `NotReadyError`, and what `InferenceWorker.predict` raises."""
        return await self.ready_worker().predict(item, priority=priority, timeout_s=timeout_s)

    async def predict_many(
        self,
        items: Sequence[BaseModel],
        *,
        priority: Priority = Priority.INTERACTIVE,
        timeout_s: float | None = None,
    ) -> list[Outcome[InferenceOutputModel]]:
        """Run items; outcomes in their order. Raises `NotReadyError` and what `InferenceWorker.predict_many` raises."""
        return await self.ready_worker().predict_many(items, priority=priority, timeout_s=timeout_s)

    @property
    def engine_choice(self) -> EngineChoice | None:
        """What computes the model, where its pipeline says so; None before it is loaded."""
        return None if self.worker is None else self.worker.engine_choice

    def statistics(self) -> SchedulerStatistics | None:
        """What the worker did so far; None before the model is loaded."""
        return None if self.worker is None else self.worker.statistics()

    def ready_worker(self) -> InferenceWorker:
        """The worker. Raises `NotReadyError`."""
        readiness = self.readiness
        # A model whose batches hang may still answer. Probes of /health/live decide when its process is replaced.
        may_answer = readiness is Readiness.READY or (readiness is Readiness.BROKEN and self.error is None)
        if self.worker is None or not may_answer:
            reason = None if self.error is None else describe_error(self.error.__cause__ or self.error)
            raise NotReadyError(self.name, readiness, reason)
        return self.worker

    async def serve(self, settings: Settings, jobs: JobManager) -> None:
        """Load the model and keep its worker open until the gateway closes, or the model breaks down (see `error`)."""
        try:
            pipelines = await self._load()
            if pipelines is None:
                return
            worker = InferenceWorker(pipelines, settings=settings, jobs=jobs, input_model=self.input_model)
            async with worker as self.worker:
                self.settled.set()
                await self._wait_until_closing(worker)
        except Exception as error:
            # A failed model must not stop the others: its readiness says so, and so does each request for it.
            self.error = error
            # Our own errors say everything, the line of the user's code included.
            explained = isinstance(error, ServiceError)
            logger.log(logging.ERROR, "Model %r failed: %s", self.name, error, exc_info=None if explained else error)
            logger.debug("The traceback of this error:", exc_info=error)
        finally:
            self.settled.set()

    async def _wait_until_closing(self, worker: InferenceWorker) -> None:
        """Wait until the gateway closes. Raises `ModelBrokenError` when the worker breaks down before."""
        await _unless(worker.wait_until_broken, self._closing.wait)
        if not self._closing.is_set():
            raise ModelBrokenError(self.name)

    async def _load(self) -> list[InferencePipeline] | None:
        """The pipeline, loaded on each of its devices, or None when the gateway closes before."""
        thread = DedicatedThread(f"load {self.name}")
        try:
            pipelines = await _unless(self._closing.wait, lambda: thread.run(partial(load_on_devices, self._source)))
        finally:
            thread.close()
        return None if self._closing.is_set() else pipelines


class LocalGateway(AsyncContextManagerMixin):
    """Serves models from this process: one `InferenceWorker` each, jobs and deliveries shared.

    The models are those of the configuration, unless `sources` says which.

    Constructing it imports the classes that the configuration names and raises `LoadError` where that fails, and
    `SettingsError` for keys that their constructors do not take; entering it opens the job store and starts to load the
    models in the background. A model that cannot be loaded is `failed`, one whose worker breaks down is `broken`, and
    neither affects the others. Leaving it does not wait for a model that is still being constructed, whose stored jobs
    stay for the next start; a warm-up that has begun is finished.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        queue_backend: QueueBackend | None = None,
        job_store: JobStore | None = None,
        sources: Sequence[ModelSource] | None = None,
    ) -> None:
        self._settings = settings
        self._closing = anyio.Event()
        self._broken = anyio.Event()
        if sources is None:
            sources = [ModelSource(settings, name) for name in settings.model_settings.model_entries]
        self.models = {source.model_name: LocalModel(source, self._closing) for source in sources}
        if not self.models:
            raise LoadError("model_settings.model_entries: there is no model; add one")
        self.jobs = make_job_manager(settings, queue_backend, job_store)
        self.jobs.check_ready = self._check_ready

    @asynccontextmanager
    async def __asynccontextmanager__(self) -> AsyncGenerator[Self]:
        async with self.jobs, plain_task_group() as task_group:
            for model in self.models.values():
                task_group.start_soon(self._serve, model)
            try:
                yield self
            finally:
                self._closing.set()

    async def metrics_of_processes(self, own: str) -> dict[str, str]:
        """The metrics of this process alone."""
        return {"": own}

    def _check_ready(self, model_name: str) -> None:
        if model_name not in self.models:
            raise UnknownModelError(model_name, list(self.models))
        self.models[model_name].ready_worker()

    async def wait_until_settled(self) -> None:
        """Wait until every model is ready or has failed: `readiness` tells which."""
        for model in self.models.values():
            await model.settled.wait()

    async def wait_until_ready(self) -> None:
        """Wait until every model is ready.

        Raises the first error of a model that cannot be loaded, and `NotReadyError` when the gateway is left meanwhile.
        """
        for model in self.models.values():
            await model.settled.wait()
            if model.error is not None:
                raise model.error
            if model.worker is None:
                raise NotReadyError(model.name, model.readiness)

    async def wait_until_broken(self) -> None:
        """Wait until no model can take requests any more, and at least one could before."""
        await self._broken.wait()

    async def _serve(self, model: LocalModel) -> None:
        await model.serve(self._settings, self.jobs)
        models = self.models.values()
        if all(other.error for other in models) and any(other.worker for other in models):
            self._broken.set()


async def _unless(stopped: Callable[[], Awaitable[None]], call: Callable[[], Awaitable[T]]) -> T | None:
    """Await `call` and return its result; cancel it and return None when `stopped` returns before."""
    async with plain_task_group() as task_group:

        async def watch() -> None:
            await stopped()
            task_group.cancel_scope.cancel()

        task_group.start_soon(watch)
        result = await call()
        task_group.cancel_scope.cancel()
        return result
    return None
