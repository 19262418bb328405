"""The gateway to models that run in this process."""

import gc
import logging
import math
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Self, TypeVar

import anyio
from anyio import AsyncContextManagerMixin, to_thread
from pydantic import BaseModel

from modalkit.batching import Outcome, Priority, SchedulerStatistics
from modalkit.batching.task_groups import plain_task_group
from modalkit.batching.threads import DedicatedThread
from modalkit.pipelines import EngineChoice, InferenceOutputModel, InferencePipeline
from modalkit.service.errors import (
    InvalidItemError,
    NotReadyError,
    Readiness,
    ReloadError,
    ServiceError,
    UnknownModelError,
    describe_error,
)
from modalkit.service.jobs import JobStore
from modalkit.service.jobs.manager import JobManager
from modalkit.service.loading import LoadError, ModelSource, make_job_manager
from modalkit.service.memory import free_bytes, private_bytes
from modalkit.service.queue_backends import QueueBackend
from modalkit.service.serving import freeze_gc
from modalkit.service.settings import BatchConfig, Settings
from modalkit.service.validation import summary, validated
from modalkit.service.worker import InferenceWorker

logger = logging.getLogger(__name__)

T = TypeVar("T")

RESTART_INTERVAL_S = 600.0
"""A model that hangs again within so many seconds after it was restarted is not restarted once more."""
RESTART_TIMEOUT_S = 300.0
"""Seconds within which a model that hangs has to be loaded anew."""
CHECK_INTERVAL_S = 0.5
"""Seconds between two looks whether a worker hangs."""


class ModelBrokenError(ServiceError):
    """Raised inside the gateway, and logged, for a model that was ready and can run nothing any more."""

    def __init__(self, model_name: str, problem: str) -> None:
        super().__init__(f"model {model_name!r} broke down: {problem}; it takes no requests, restart this process")
        self.model_name = model_name


@dataclass
class _Phase:
    """What the models of a gateway share: its end, and how many of them load."""

    closing: anyio.Event = field(default_factory=anyio.Event)
    draining: anyio.Event = field(default_factory=anyio.Event)
    """Set before the gateway closes: no model is reloaded any more."""
    loading: int = 0
    loads: int = 0
    """How often one began to load."""


class LocalModel:
    """A configured model and, once it is loaded, its worker."""

    def __init__(self, source: ModelSource, phase: _Phase) -> None:
        self.name = source.model_name
        self.input_model = source.input_model
        self.output_model = source.output_model
        self.error: Exception | None = None
        """Why it could not be loaded, or broke down."""
        self.worker: InferenceWorker | None = None
        self.settled = anyio.Event()
        """Set once the model is ready or has failed."""
        self.source = source
        self._phase = phase
        self._changing = anyio.Lock()
        self._loaded_bytes = 0  # memory that it took when it was loaded; 0 where that is not known

    @property
    def readiness(self) -> Readiness:
        """Whether it takes requests."""
        if self.error is not None:
            return Readiness.FAILED if self.worker is None else Readiness.BROKEN
        if self._phase.closing.is_set():
            return Readiness.DRAINING
        if self.worker is None:
            return Readiness.LOADING
        return Readiness.BROKEN if self.worker.is_broken else Readiness.READY

    @property
    def problem(self) -> str | None:
        """Why it takes no requests, or should get none; None where that is not known."""
        if self.error is not None:
            return describe_error(self.error)
        return None if self.worker is None else self.worker.problem

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
            pipeline = await _unless(self._phase.closing.wait, lambda: self._load(self.source))
            if pipeline is None:
                return
            worker = InferenceWorker(pipeline, settings=settings, jobs=jobs, input_model=self.input_model)
            del pipeline  # else one that was replaced would stay in memory
            async with worker as self.worker:
                self.settled.set()
                await self._supervise(worker)
        except Exception as error:
            # A failed model must not stop the others: its readiness says so, and so does each request for it.
            self.error = error
            # Our own errors say everything, the line of the user's code included.
            explained = isinstance(error, ServiceError)
            logger.log(logging.ERROR, "Model %r failed: %s", self.name, error, exc_info=None if explained else error)
            logger.debug("The traceback of this error:", exc_info=error)
        finally:
            self.settled.set()

    async def reload(self, source: ModelSource) -> None:
        """Load the model anew beside the one that runs, and let it run the next batches. No request fails for it.

        Raises `NotReadyError` where none runs, `ReloadError` and `LoadError`: then the old one goes on.
        """
        async with self._one_change():
            worker = self.ready_worker()
            if (source.input_model, source.output_model) != (self.input_model, self.output_model):
                raise ReloadError(self.name, "its input_model or output_model is another one; restart the service")
            free = free_bytes()
            if free is not None and free < self._loaded_bytes:
                raise ReloadError(
                    self.name,
                    f"it needs {self._loaded_bytes >> 20} MiB beside the old one and {free >> 20} MiB of memory are "
                    "free; restart the service instead",
                )
            await self._replace(worker, source, self._phase.draining)
            if gc.get_freeze_count():
                freeze_gc()  # the objects of the new one, too
            logger.info("Model %r was reloaded", self.name)

    async def set_limits(self, limits: Mapping[str, Any]) -> None:
        """Change limits of its batches, keys of `batch_config`, until the next reload or start.

        Raises `NotReadyError`, and `InvalidItemError` for limits that cannot hold.
        """
        async with self._one_change():
            worker = self.ready_worker()
            if "calibration" in limits:
                error = {"field": "calibration", "message": "is for the start; change it in the configuration"}
                raise InvalidItemError(summary([error]), [error])
            await worker.set_limits(validated(BatchConfig, {**worker.limits.model_dump(), **limits}))

    @asynccontextmanager
    async def _one_change(self) -> AsyncGenerator[None]:
        try:
            self._changing.acquire_nowait()
        except anyio.WouldBlock:
            raise ReloadError(self.name, "it is being reloaded already; try again later") from None
        try:
            yield
        finally:
            self._changing.release()

    async def _replace(self, worker: InferenceWorker, source: ModelSource, stopping: anyio.Event) -> None:
        """Load the model of `source`, and let it run the worker's next batches, unless `stopping` is set before."""

        async def replace() -> bool:
            await worker.replace(await self._load(source), source.settings.app_settings.batch_config)
            return True

        if not await _unless(stopping.wait, replace):
            raise NotReadyError(self.name, Readiness.DRAINING)
        self.source = source

    async def _supervise(self, worker: InferenceWorker) -> None:
        """Wait until the gateway closes. Restart a model that hangs; raises `ModelBrokenError` for one that is lost."""
        restarted_s = -math.inf
        while not self._phase.closing.is_set():
            with anyio.move_on_after(CHECK_INTERVAL_S):
                await _unless(worker.wait_until_broken, self._phase.closing.wait)
            if (problem := worker.problem) is None or self._phase.closing.is_set():
                continue
            if not worker.hangs:
                raise ModelBrokenError(self.name, problem)
            if anyio.current_time() < restarted_s + RESTART_INTERVAL_S:
                raise ModelBrokenError(self.name, f"{problem}, again after it was restarted")
            restarted_s = anyio.current_time()
            await self._restart(worker, problem)

    async def _restart(self, worker: InferenceWorker, problem: str) -> None:
        logger.error("Model %r: %s; it is loaded anew", self.name, problem)
        try:
            with anyio.fail_after(RESTART_TIMEOUT_S):
                async with self._changing:
                    await self._replace(worker, self.source, self._phase.closing)
        except Exception as error:
            if not self._phase.closing.is_set():
                raise ModelBrokenError(self.name, f"{problem}, and it could not be loaded anew") from error
        else:
            logger.error("Model %r was restarted", self.name)

    async def _load(self, source: ModelSource) -> InferencePipeline:
        """The loaded pipeline. When cancelled, what is being loaded is abandoned."""
        phase = self._phase
        is_alone, phase.loading = not phase.loading, phase.loading + 1
        phase.loads += 1
        load, used = phase.loads, private_bytes()
        thread = DedicatedThread(f"load {self.name}")
        try:
            pipeline = await thread.run(source.load)
        finally:
            thread.close()
            phase.loading -= 1
        if is_alone and phase.loads == load:  # else what others loaded meanwhile is counted too
            self._loaded_bytes = max(0, private_bytes() - used)
        return pipeline


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
        self._phase = _Phase()
        self._broken = anyio.Event()
        if sources is None:
            sources = [ModelSource(settings, name) for name in settings.model_settings.model_entries]
        self.models = {source.model_name: LocalModel(source, self._phase) for source in sources}
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
                self._phase.closing.set()

    def drain(self) -> None:
        """Before the gateway is left: end reloads, answer callers that wait for jobs, start no more. Idempotent."""
        self._phase.draining.set()
        self.jobs.drain()

    @property
    def administration(self) -> Self:
        """What can be done with the models while they run: `reload`, `set_limits` and `limits`."""
        return self

    async def set_limits(self, model_name: str, limits: Mapping[str, Any]) -> None:
        """Change limits of a model's batches; see `LocalModel.set_limits`. Raises `UnknownModelError` too."""
        await self._model(model_name).set_limits(limits)

    def limits(self, model_name: str) -> BatchConfig | None:
        """The limits of a model's batches; None before it is loaded. Raises `UnknownModelError`."""
        worker = self._model(model_name).worker
        return None if worker is None else worker.limits

    async def reload(self, model_name: str) -> None:
        """Load a model anew by the configuration as it is now, beside the one that runs, and replace that.

        No request fails for it. Where it raises, the old one goes on: `UnknownModelError`, `NotReadyError` for a model
        that does not run, `ReloadError`, `LoadError`, and `SettingsError` for a configuration with an error. Modules of
        Python are not imported again, and of the configuration only what concerns the model is taken up.
        """
        model = self._model(model_name)
        # In a thread, because it reads files and may import modules.
        await model.reload(await to_thread.run_sync(self._read_source_again, model))

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

    def _check_ready(self, model_name: str) -> None:
        self._model(model_name).ready_worker()

    def _model(self, model_name: str) -> LocalModel:
        if model_name not in self.models:
            raise UnknownModelError(model_name, list(self.models))
        return self.models[model_name]

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
        await model.serve(self._settings, self.jobs)
        if model.readiness is Readiness.BROKEN:
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
