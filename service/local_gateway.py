"""The gateway to models that run in this process."""

import logging
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Self, Unpack

import anyio
from anyio import AsyncContextManagerMixin, to_thread
from anyio.abc import TaskGroup
from pydantic import BaseModel

from modalkit.batching import (
    Failure,
    Outcome,
    QueueOptions,
    RequestOptions,
    SchedulerStatistics,
    Success,
)
from modalkit.batching.errors import users_error
from modalkit.batching.task_groups import plain_task_group
from modalkit.pipelines import EngineChoice, InferenceOutputModel
from modalkit.service.errors import (
    NotReadyError,
    Readiness,
    ReloadError,
    ServiceError,
    describe_error,
)
from modalkit.service.gateway import find_model
from modalkit.service.jobs import JobStore, JobStoreError
from modalkit.service.jobs.manager import JobManager
from modalkit.service.loading import NO_MODELS, LoadError, ModelSource, make_job_manager
from modalkit.service.queue_backends import QueueBackend
from modalkit.service.settings import BatchConfig, Settings
from modalkit.service.supervision import GatewayState, Supervisor
from modalkit.service.worker import InferenceWorker

logger = logging.getLogger(__name__)


class LocalModel:
    """A configured model and, once it is loaded, its worker."""

    def __init__(self, source: ModelSource, state: GatewayState) -> None:
        self.name = source.model_name
        self.input_model = source.input_model
        self.output_model = source.output_model
        self.error: Exception | None = None
        """Why it could not be loaded, or broke down."""
        self.worker: InferenceWorker | None = None
        self.settled = anyio.Event()
        """Set once the model is ready or has failed."""
        self._state = state
        self._supervisor = Supervisor(source, state)

    @property
    def readiness(self) -> Readiness:
        """Whether it takes requests."""
        if self.error is not None:
            return Readiness.FAILED if self.worker is None else Readiness.BROKEN
        if self._state.closing.is_set():
            return Readiness.DRAINING
        if self.worker is None:
            return Readiness.LOADING
        if self.worker.hangs:
            return Readiness.RESTARTING
        return Readiness.BROKEN if self.worker.is_broken else Readiness.READY

    @property
    def problem(self) -> str | None:
        """Why it takes no requests, or should get none; None where that is not known."""
        if self.error is not None:
            return describe_error(self.error)
        return None if self.worker is None else self.worker.problem

    def check_room(self, **options: Unpack[RequestOptions]) -> None:
        """Raise what a request should be refused with now: `NotReadyError`, what `BatchScheduler.check_room` raises."""
        self.ready_worker().check_room(**options)

    async def predict(self, item: BaseModel, **options: Unpack[RequestOptions]) -> InferenceOutputModel:
        """Run one item. Raises `NotReadyError`, and what `InferenceWorker.predict` raises."""
        return await self.ready_worker().predict(item, **options)

    def predict_pieces(
        self, item: BaseModel, **options: Unpack[RequestOptions]
    ) -> AsyncGenerator[InferenceOutputModel | Success[InferenceOutputModel]]:
        """Run one item, as `InferenceWorker.predict_pieces` does. Raises `NotReadyError`."""
        return self.ready_worker().predict_pieces(item, **options)

    def predict_many_nowait(
        self,
        items: Sequence[BaseModel],
        on_outcome: Callable[[int, Outcome[InferenceOutputModel]], None],
        **options: Unpack[QueueOptions],
    ) -> list[Callable[[], object] | Failure]:
        """Queue items, as `InferenceWorker.predict_many_nowait` does. Raises `NotReadyError`."""
        return self.ready_worker().predict_many_nowait(items, on_outcome, **options)

    async def predict_many(
        self, items: Sequence[BaseModel], **options: Unpack[RequestOptions]
    ) -> list[Outcome[InferenceOutputModel]]:
        """Run items; outcomes in their order. Raises `NotReadyError` and what `InferenceWorker.predict_many` raises."""
        return await self.ready_worker().predict_many(items, **options)

    @property
    def engine_choice(self) -> EngineChoice | None:
        """What computes the model, where its pipeline says so; None before it is loaded."""
        return None if self.worker is None else self.worker.engine_choice

    def statistics(self) -> SchedulerStatistics | None:
        """What the worker did so far; None before the model is loaded."""
        return None if self.worker is None else self.worker.statistics()

    def ready_worker(self) -> InferenceWorker:
        """The worker. Raises `NotReadyError`."""
        worker = self.worker
        # Each request asks for it, so as little as possible is looked at. A scheduler that is broken refuses by itself.
        if worker is None or self.error is not None or worker.health.device_is_lost or self._state.closing.is_set():
            reason = None if self.error is None else describe_error(self.error.__cause__ or self.error)
            raise NotReadyError(self.name, self.readiness, reason)
        return worker

    async def serve(self, jobs: JobManager) -> None:
        """Load the model and keep its worker open until the gateway closes, or the model breaks down (see `error`)."""
        try:
            pipelines = await self._supervisor.load()
            if pipelines is None:
                return
            worker = InferenceWorker(pipelines, settings=self.source.settings, jobs=jobs, input_model=self.input_model)
            del pipelines  # else one that was replaced would stay in memory
            async with worker as self.worker:
                self.settled.set()
                await self._supervisor.watch(worker)
        except BaseException as error:
            # A failed model must not stop the others: its readiness says so, and so does each request for it.
            self.error = users_error(error)
            # Our own errors say everything, the line of the user's code included.
            explained = isinstance(error, ServiceError)
            logger.log(logging.ERROR, "Model %r failed: %s", self.name, error, exc_info=None if explained else error)
            logger.debug("The traceback of this error:", exc_info=error)
        finally:
            self.settled.set()

    async def reload(self, source: ModelSource) -> None:
        """Replace the pipeline that runs by one of `source`. Raises `NotReadyError`, and what `Supervisor` raises."""
        await self._supervisor.reload(self.ready_worker(), source)

    async def set_limits(self, limits: Mapping[str, Any]) -> None:
        """Change limits of its batches. Raises `NotReadyError`, and what `Supervisor` raises."""
        await self._supervisor.set_limits(self.ready_worker(), limits)

    def begin_again(self, source: ModelSource) -> None:
        """Let the next `serve` load it from `source`, after it could not be loaded. Raises `ReloadError`."""
        self._supervisor.check(source)
        self._supervisor.source, self.error, self.settled = source, None, anyio.Event()

    @property
    def source(self) -> ModelSource:
        """What it was loaded from, or is loaded from."""
        return self._supervisor.source


class LocalGateway(AsyncContextManagerMixin):
    """Serves models from this process: one `InferenceWorker` each, jobs and deliveries shared.

    The models are those of the configuration, unless `sources` says which. A `queue_backend` in place of the configured
    one is closed at the end if the gateway `owns_backend`.

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
        owns_backend: bool = False,
        job_store: JobStore | None = None,
        sources: Sequence[ModelSource] | None = None,
    ) -> None:
        self._settings = settings
        self._state = GatewayState()
        self._broken = anyio.Event()
        self._task_group: TaskGroup
        if sources is None:
            sources = [ModelSource(settings, name) for name in settings.model_settings.model_entries]
        self.models = {source.model_name: LocalModel(source, self._state) for source in sources}
        if not self.models:
            raise LoadError(NO_MODELS)
        self.jobs = make_job_manager(settings, queue_backend, job_store, owns_backend=owns_backend)
        self.jobs.check_ready = self._check_ready

    @asynccontextmanager
    async def __asynccontextmanager__(self) -> AsyncGenerator[Self]:
        async with self.jobs, plain_task_group() as self._task_group:
            for model in self.models.values():
                self._task_group.start_soon(self._serve, model)
            self._task_group.start_soon(self._tell_of_jobs_without_model)
            try:
                yield self
            finally:
                self._state.draining.set()
                self._state.closing.set()

    async def _tell_of_jobs_without_model(self) -> None:
        try:
            queued = await self.jobs.store.queued_by_model()
        except JobStoreError:
            logger.exception("It could not be found whether jobs wait for models that are not configured")
            return
        for name in sorted(queued.keys() - self.models.keys()):
            logger.error(
                "%d jobs wait for the model %.80r, which is not configured, and do not run: configure it again, or "
                "cancel them (DELETE /jobs/{job_id})",
                queued[name],
                name,
            )

    def drain(self) -> None:
        """Before the gateway is left: end reloads, answer callers that wait for jobs, start no more. Idempotent."""
        self._state.draining.set()
        self.jobs.drain()

    @property
    def is_draining(self) -> bool:
        """Whether `drain` was called, or the gateway is being left."""
        return self._state.draining.is_set()

    @property
    def administration(self) -> Self:
        """What can be done with the models while they run: `reload`, `set_limits` and `limits`."""
        return self

    async def set_limits(self, model_name: str, limits: Mapping[str, Any]) -> None:
        """Change limits of a model's batches; see `LocalModel.set_limits`. Raises `UnknownModelError` too."""
        await find_model(self.models, model_name).set_limits(limits)

    def limits(self, model_name: str) -> BatchConfig | None:
        """The limits of a model's batches; None before it is loaded. Raises `UnknownModelError`."""
        worker = find_model(self.models, model_name).worker
        return None if worker is None else worker.limits

    async def reload(self, model_name: str) -> None:
        """Load a model anew by the configuration as it is now, beside the one that runs, and replace that.

        No request fails for it. Where it raises, the old one goes on: `UnknownModelError`, `NotReadyError` for a model
        that does not run, `ReloadError`, `LoadError`, and `SettingsError` for a configuration with an error. A model
        that could not be loaded is tried again. Modules of Python are not imported again, and of the configuration only
        what concerns the model is taken up.
        """
        model = find_model(self.models, model_name)
        # In a thread, because it reads files and may import modules.
        source = await to_thread.run_sync(self._read_source_again, model)
        if model.readiness is not Readiness.FAILED:
            await model.reload(source)
            return
        model.begin_again(source)
        self._task_group.start_soon(self._serve, model)
        await model.settled.wait()
        if model.error is not None:
            raise ReloadError(model.name, describe_error(model.error)) from model.error

    def _read_source_again(self, model: LocalModel) -> ModelSource:
        settings = self._settings.read_again()
        before, after = self._settings.app_settings, settings.app_settings
        later = [
            f"app_settings.{name}" for name in type(after).model_fields if getattr(before, name) != getattr(after, name)
        ]
        entries = [each.model_settings.model_entries for each in (self._settings, settings)]
        later += [f"the model {name!r}" for name in sorted(entries[0].keys() ^ entries[1].keys())]
        if later := [each for each in later if each != "app_settings.batch_config"]:
            logger.warning("What changed of %s takes effect at the next start only", ", ".join(later))
        return model.source.again(settings)

    async def metrics_of_processes(self, own: str) -> dict[str, str]:
        """The metrics of this process alone."""
        return {"": own}

    def _check_ready(self, model_name: str) -> None:
        find_model(self.models, model_name).ready_worker()

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
        """Wait until a model that could take requests can do so no more, and cannot be restarted."""
        await self._broken.wait()

    async def _serve(self, model: LocalModel) -> None:
        await model.serve(self.jobs)
        if model.readiness is Readiness.BROKEN:
            self._broken.set()
