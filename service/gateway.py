"""What a door (HTTP, the command line) needs of whatever runs the models, and the gateway to models in this process."""

import logging
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from enum import StrEnum
from types import TracebackType
from typing import Protocol, Self

import anyio
from pydantic import BaseModel

from modalkit.batching import Outcome, Priority, SchedulerStatistics
from modalkit.batching.task_groups import plain_task_group
from modalkit.batching.threads import DedicatedThread
from modalkit.pipelines import AsyncInputModel, InferenceOutputModel, InferencePipeline, PipelineError
from modalkit.service.errors import ServiceError
from modalkit.service.jobs import Job, JobCounts, JobFilter, JobPage, JobStore
from modalkit.service.loading import LoadError, ModelSource, UnknownModelError, make_job_manager
from modalkit.service.queue_backends import QueueBackend
from modalkit.service.settings import Settings
from modalkit.service.worker import InferenceWorker

logger = logging.getLogger(__name__)


class Readiness(StrEnum):
    """Whether a model takes requests, and if not, why."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    BROKEN = "broken"
    FAILED = "failed"


class NotReadyError(ServiceError):
    """Raised when a request comes for a model that is still loading, could not be loaded, or is shutting down."""

    def __init__(self, model_name: str, readiness: Readiness) -> None:
        super().__init__(f"model {model_name!r} takes no requests now: it is {readiness}; see /health/ready")
        self.model_name = model_name
        self.readiness = readiness


class ModelBrokenError(ServiceError):
    """Raised inside the gateway, and logged, for a model that was ready and can run nothing any more."""

    def __init__(self, model_name: str) -> None:
        super().__init__(f"model {model_name!r} broke down and takes no requests any more; restart this process")
        self.model_name = model_name


class Gateway(Protocol):
    """Takes requests for one or several models and gives back what became of them.

    An asynchronous context manager: leaving it finishes what was accepted. A `model_name` of None means the first
    model. Methods raise `UnknownModelError` and `NotReadyError`, and otherwise what those of `InferenceWorker` do.
    """

    async def __aenter__(self) -> Self: ...  # protocol methods have no body

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> bool | None: ...

    def input_model(self, model_name: str | None = None) -> type[BaseModel]:
        """What a model's items are validated as; known before the model is loaded."""
        ...

    def output_model(self, model_name: str | None = None) -> type[InferenceOutputModel]:
        """What a model's outputs look like; known before the model is loaded."""
        ...

    def readiness(self) -> Mapping[str, Readiness]:
        """Each model's state by its name, the first model first."""
        ...

    async def predict(
        self,
        item: BaseModel,
        *,
        model_name: str | None = None,
        priority: Priority = Priority.INTERACTIVE,
        timeout_s: float | None = None,
    ) -> InferenceOutputModel:
        """Run one item."""
        ...

    async def predict_many(
        self,
        items: Sequence[BaseModel],
        *,
        model_name: str | None = None,
        priority: Priority = Priority.INTERACTIVE,
        timeout_s: float | None = None,
    ) -> list[Outcome[InferenceOutputModel]]:
        """Run several items; outcomes in the same order."""
        ...

    async def submit(
        self, request: AsyncInputModel, *, model_name: str | None = None, priority: Priority = Priority.BULK
    ) -> str:
        """Accept a job and return its id."""
        ...

    async def submit_many(
        self,
        requests: Sequence[AsyncInputModel],
        *,
        model_name: str | None = None,
        priority: Priority = Priority.BULK,
    ) -> list[Outcome[str]]:
        """Accept many jobs; their ids, or an error each, in the same order."""
        ...

    async def job(self, job_id: str, *, wait_s: float = 0.0) -> Job | None:
        """Find a job, waiting for its end if asked to."""
        ...

    async def jobs(self, limit: int, which: JobFilter, cursor: int | None = None) -> JobPage:
        """List jobs, the newest first."""
        ...

    async def cancel(self, job_id: str) -> Job | None:
        """Cancel a job that has not ended."""
        ...

    async def replay(self, job_ids: Sequence[str] | None = None) -> int:
        """Send undelivered results, of these jobs or of all, once more."""
        ...

    async def purge(self, which: JobFilter) -> int:
        """Remove ended jobs."""
        ...

    async def job_counts(self) -> JobCounts:
        """How many jobs there are of each kind."""
        ...

    def statistics(self) -> Mapping[str, SchedulerStatistics]:
        """What each model that runs here has done so far."""
        ...


class _Model:
    """A configured model and, once it is loaded, its worker."""

    def __init__(self, source: ModelSource, closing: anyio.Event) -> None:
        self.source = source
        self.closing = closing
        self.worker: InferenceWorker | None = None
        self.error: Exception | None = None
        self.settled = anyio.Event()
        """Set once the model is ready or has failed."""

    @property
    def readiness(self) -> Readiness:
        if self.error is not None:
            return Readiness.FAILED if self.worker is None else Readiness.BROKEN
        if self.closing.is_set():
            return Readiness.DRAINING
        if self.worker is None:
            return Readiness.LOADING
        return Readiness.BROKEN if self.worker.is_broken else Readiness.READY


class LocalGateway:
    """Serves models from this process: one `InferenceWorker` each, jobs and delivery shared.

    They are those of the configuration, unless `sources` says which.

    Constructing it imports the classes that the configuration names and raises `LoadError` where that fails; entering
    it opens the job store and starts to load the models in the background. A model that cannot be loaded is `failed`,
    one whose worker breaks down is `broken`, and either leaves the others alone. Leaving it does not wait for a model
    that is still being constructed, whose stored jobs stay for the next start; a warm-up that has begun is finished.
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
        self._models = {source.model_name: _Model(source, self._closing) for source in sources}
        if not self._models:
            raise LoadError("model_settings.model_entries: there is no model; add one")
        self._jobs = make_job_manager(settings, queue_backend, job_store)
        self._exit_stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self._jobs)
            task_group = await stack.enter_async_context(plain_task_group())
            stack.callback(self._closing.set)
            for model in self._models.values():
                task_group.start_soon(self._serve, model)
            self._exit_stack = stack.pop_all()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        return await self._exit_stack.__aexit__(exc_type, exc, traceback)

    async def wait_until_settled(self) -> None:
        """Wait until every model is ready or has failed: `readiness` tells which."""
        for model in self._models.values():
            await model.settled.wait()

    async def wait_until_ready(self) -> None:
        """Wait until every model is ready.

        Raises the first error of a model that cannot be loaded, and `NotReadyError` when the gateway is left meanwhile.
        """
        for model in self._models.values():
            await model.settled.wait()
            if model.error is not None:
                raise model.error
            if model.worker is None:
                raise NotReadyError(model.source.model_name, model.readiness)

    async def wait_until_broken(self) -> None:
        """Wait until no model can take requests any more, and one at least did, if that ever happens."""
        await self._broken.wait()

    def stop_waiting(self) -> None:
        """Answer every call of `job` that waits, and each one to come, with the job as it is: a shutdown has begun."""
        self._jobs.stop_waiting()

    def input_model(self, model_name: str | None = None) -> type[BaseModel]:
        """What a model's items are validated as. Raises `UnknownModelError`."""
        return self._model(model_name).source.input_model

    def output_model(self, model_name: str | None = None) -> type[InferenceOutputModel]:
        """What a model's outputs look like. Raises `UnknownModelError`."""
        return self._model(model_name).source.output_model

    def readiness(self) -> Mapping[str, Readiness]:
        """Each model's state by its name, in the order of the configuration."""
        return {name: model.readiness for name, model in self._models.items()}

    def statistics(self) -> Mapping[str, SchedulerStatistics]:
        """What each model that has been loaded has done so far."""
        return {name: model.worker.statistics() for name, model in self._models.items() if model.worker is not None}

    async def predict(
        self,
        item: BaseModel,
        *,
        model_name: str | None = None,
        priority: Priority = Priority.INTERACTIVE,
        timeout_s: float | None = None,
    ) -> InferenceOutputModel:
        """See `InferenceWorker.predict`."""
        return await self._worker(model_name).predict(item, priority=priority, timeout_s=timeout_s)

    async def predict_many(
        self,
        items: Sequence[BaseModel],
        *,
        model_name: str | None = None,
        priority: Priority = Priority.INTERACTIVE,
        timeout_s: float | None = None,
    ) -> list[Outcome[InferenceOutputModel]]:
        """See `InferenceWorker.predict_many`."""
        return await self._worker(model_name).predict_many(items, priority=priority, timeout_s=timeout_s)

    async def submit(
        self, request: AsyncInputModel, *, model_name: str | None = None, priority: Priority = Priority.BULK
    ) -> str:
        """See `InferenceWorker.submit`."""
        return await self._worker(model_name).submit(request, priority=priority)

    async def submit_many(
        self,
        requests: Sequence[AsyncInputModel],
        *,
        model_name: str | None = None,
        priority: Priority = Priority.BULK,
    ) -> list[Outcome[str]]:
        """See `InferenceWorker.submit_many`."""
        return await self._worker(model_name).submit_many(requests, priority=priority)

    # What follows works while models load.

    async def job(self, job_id: str, *, wait_s: float = 0.0) -> Job | None:
        """See `InferenceWorker.job`."""
        return await self._jobs.get(job_id, wait_s)

    async def jobs(self, limit: int, which: JobFilter, cursor: int | None = None) -> JobPage:
        """See `JobStore.page`."""
        return await self._jobs.page(limit, which, cursor)

    async def cancel(self, job_id: str) -> Job | None:
        """See `InferenceWorker.cancel`."""
        return await self._jobs.cancel(job_id)

    async def replay(self, job_ids: Sequence[str] | None = None) -> int:
        """See `JobManager.replay`."""
        return await self._jobs.replay(job_ids)

    async def purge(self, which: JobFilter) -> int:
        """See `JobStore.purge`."""
        return await self._jobs.purge(which)

    async def job_counts(self) -> JobCounts:
        """How many jobs there are of each kind."""
        return await self._jobs.counts()

    async def _serve(self, model: _Model) -> None:
        """Load one model and own its worker until the gateway is left."""
        try:
            pipeline = await self._load(model.source)
            if pipeline is None:
                return
            worker = InferenceWorker(
                pipeline, settings=self._settings, jobs=self._jobs, input_model=model.source.input_model
            )
            async with worker:
                model.worker = worker
                model.settled.set()
                await self._wait_until_closing(worker)
        except Exception as error:
            # A failed model must not take the others with it: its state says so, and so does each request for it.
            model.error = error
            models = self._models.values()
            if any(other.worker for other in models) and all(other.error for other in models):
                self._broken.set()
            # A user's own class may fail by a mistake in it, and then needs its traceback; our messages do not.
            explained = isinstance(error, LoadError) and isinstance(error.__cause__, PipelineError)
            logger.log(
                logging.ERROR,
                "Model %r failed: %s",
                model.source.model_name,
                error,
                exc_info=None if explained else error,
            )
        finally:
            model.settled.set()

    async def _wait_until_closing(self, worker: InferenceWorker) -> None:
        """Wait until the gateway is left; raises `ModelBrokenError` when the worker breaks before."""
        async with plain_task_group() as task_group:

            async def watch() -> None:
                await worker.wait_until_broken()
                task_group.cancel_scope.cancel()

            task_group.start_soon(watch)
            await self._closing.wait()
            task_group.cancel_scope.cancel()
        if not self._closing.is_set():
            raise ModelBrokenError(worker.model_name)

    async def _load(self, source: ModelSource) -> InferencePipeline | None:
        """The loaded pipeline, or None when the gateway is left before."""
        thread = DedicatedThread(f"load {source.model_name}")
        pipeline = None
        try:
            async with plain_task_group() as task_group:

                async def stop() -> None:
                    await self._closing.wait()
                    task_group.cancel_scope.cancel()

                task_group.start_soon(stop)
                pipeline = await thread.run(source.load)
                task_group.cancel_scope.cancel()
        finally:
            thread.close()
        return None if self._closing.is_set() else pipeline

    def _model(self, model_name: str | None) -> _Model:
        if model_name is None:
            return next(iter(self._models.values()))
        try:
            return self._models[model_name]
        except KeyError:
            raise UnknownModelError(model_name, list(self._models)) from None

    def _worker(self, model_name: str | None) -> InferenceWorker:
        model = self._model(model_name)
        readiness = model.readiness
        # One whose batches hang may still answer; the probes of /health decide when it has had its chance.
        may_answer = readiness is Readiness.READY or (readiness is Readiness.BROKEN and model.error is None)
        if model.worker is None or not may_answer:
            raise NotReadyError(model.source.model_name, readiness)
        return model.worker
