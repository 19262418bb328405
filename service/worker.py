"""The worker: one pipeline, its scheduler and its jobs. It knows neither HTTP nor Modal."""

import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, nullcontext
from functools import partial
from typing import Any, Self, Unpack

import anyio
import anyio.to_thread
from anyio import AsyncContextManagerMixin
from pydantic import BaseModel

from modalkit.batching import (
    BatchingError,
    BatchRecord,
    BatchScheduler,
    Failure,
    MeasuredCostModel,
    Outcome,
    Priority,
    QueueOptions,
    RequestOptions,
    SchedulerStatistics,
    Success,
)
from modalkit.batching.errors import users_error
from modalkit.batching.executors import MAX_CLOSE_S
from modalkit.pipelines import AsyncInputModel, EngineChoice, InferenceOutputModel, InferencePipeline
from modalkit.pipelines.inference_pipeline import awaited, has_own
from modalkit.service.device_process import DevicePipeline
from modalkit.service.errors import (
    InvalidItemError,
    ReloadError,
    ServiceError,
    describe_with_line,
)
from modalkit.service.failure_log import FailureLog
from modalkit.service.health import Health
from modalkit.service.jobs import Job, JobStore, MemoryJobStore
from modalkit.service.jobs.manager import JobManager
from modalkit.service.jobs.runner import JobRunner
from modalkit.service.jobs_in_scheduler import JobsInScheduler
from modalkit.service.learnt_costs import LearntCosts
from modalkit.service.loading import LoadError, make_job_manager
from modalkit.service.metrics import BatchMetrics
from modalkit.service.pipeline_batches import (
    batch_policy,
    is_too_large,
    max_in_flight_of,
    run_batch_of,
)
from modalkit.service.queue_backends import QueueBackend
from modalkit.service.settings import AppSettings, BatchConfig, Settings
from modalkit.service.streams import Payload, item_of, pieces_of
from modalkit.service.tracing import active_tracing, current_traceparent
from modalkit.service.validation import run_valid, validated

logger = logging.getLogger(__name__)

BATCHES_IN_THE_JOB_WINDOW = 16


class InferenceWorker(AsyncContextManagerMixin):
    """Runs a pipeline on batches of the items that many callers send one by one.

    Several pipelines are the same model on as many devices (see `load_on_devices`), which take batches from one queue.

    Use it as an async context manager (asyncio or trio), entered and left in the same task; leaving it finishes what
    was accepted. Without `settings` it runs on their defaults, with jobs kept in memory and no queue. `queue_backend`
    replaces the one that the settings name; a `job_store`, not yet open, is opened and closed by the worker. Workers in
    one process share jobs and deliveries by an open `jobs`, in place of these two.

    Items are instances of `input_model` (by default the pipeline's own), or mappings, which are validated:
    `InvalidItemError`, a ``ValueError``, is raised before anything is queued. On entering, the pipeline's warm-up runs,
    which raises `LoadError` if it fails, and the costs of its batches are read or measured, as the settings say.
    Without `calibrate` they are not measured, which suits short uses. `on_batch` is called in the event loop with the
    record of each batch. The pipeline's `close` is called after the last batch, unless other workers use the pipeline
    too and this one does not own it (`owns_pipeline` False).

    What the pipeline raises is logged with its traceback, once a minute for each distinct error. `log_failures` False
    is for callers that report each error themselves.
    """

    def __init__(
        self,
        pipeline: InferencePipeline | Sequence[InferencePipeline],
        *,
        settings: Settings | None = None,
        queue_backend: QueueBackend | None = None,
        job_store: JobStore | None = None,
        jobs: JobManager | None = None,
        input_model: type[BaseModel] | None = None,
        on_batch: Callable[[BatchRecord], None] | None = None,
        calibrate: bool = True,
        log_failures: bool = True,
        owns_pipeline: bool = True,
    ) -> None:
        if isinstance(pipeline, type):
            raise TypeError(f"InferenceWorker takes a pipeline, not its class: {pipeline.__name__}(...)")
        self.pipelines = [pipeline] if isinstance(pipeline, InferencePipeline) else list(pipeline)
        pipeline = self.pipeline = self.pipelines[0]
        settings = None if settings is None else settings.for_model(pipeline.model_name)
        app_settings = AppSettings() if settings is None else settings.app_settings
        batch_config = app_settings.batch_config
        self.limits = batch_config
        """The limits of its batches."""
        self.model_name = pipeline.model_name
        self.input_model = input_model or pipeline.input_model
        self._owns_jobs = jobs is None
        self._jobs = jobs or make_job_manager(settings, queue_backend, job_store)
        self._costs = [LearntCosts(each, batch_config, calibrate=calibrate) for each in self.pipelines]
        self._owns_pipeline = owns_pipeline
        self._streams = has_own(pipeline, "predict_stream")
        self._scheduler: BatchScheduler[Payload, InferenceOutputModel] = BatchScheduler(
            **self._how_to_run(self.pipelines, batch_config),
            on_close=self._close_of(self.pipelines),
            cost_model=[costs.model for costs in self._costs],
            is_too_large=is_too_large,
            on_batch=self._on_batch,
            name=self.model_name,
        )
        self.health = Health(self._scheduler)
        """Whether its batches can run."""
        failure_log = FailureLog(self.model_name) if log_failures else None
        sinks = (self.health, BatchMetrics(self.model_name), failure_log, on_batch)
        self._sinks: list[Callable[[BatchRecord], None]] = [sink for sink in sinks if sink is not None]
        self._runner = JobRunner(
            self._jobs,
            self.model_name,
            JobsInScheduler(self._scheduler, self.input_model, self._jobs.tell_piece if self._streams else None),
            window=_job_window(batch_config),
            group_limit=batch_config.max_batch_size,
            timeout_s=app_settings.async_config.timeout,
            max_attempts=app_settings.async_config.max_attempts,
        )

    @asynccontextmanager
    async def __asynccontextmanager__(self) -> AsyncGenerator[Self]:
        try:
            async with self._jobs if self._owns_jobs else nullcontext(), self._scheduler:
                for device, costs in enumerate(self._costs):
                    await self._warm_up(device)
                    await costs.learn(self._scheduler, device)
                async with self._runner:
                    yield self
        finally:
            for costs in self._costs:
                await costs.keep()

    def _how_to_run(self, pipelines: Sequence[InferencePipeline], limits: BatchConfig) -> dict[str, Any]:
        """The arguments of the scheduler that depend on the pipeline and its limits."""
        pipeline = pipelines[0]
        max_in_flight = max_in_flight_of(pipeline, limits)
        size_of_item: Callable[[Any], int] | None = None  # all have the size 1
        if has_own(pipeline, "item_size"):
            size_of_item = (lambda item: pipeline.item_size(item_of(item))) if self._streams else pipeline.item_size

        def demand() -> int:
            return self._scheduler.demand // len(pipelines)

        return {
            "run_batch": [run_batch_of(each, max_in_flight, demand) for each in pipelines],
            "policy": batch_policy(limits),
            "item_size": size_of_item,
            "max_in_flight": max_in_flight,
            "batch_timeout_s": limits.batch_timeout_seconds,
            "preparations": [
                # A process that was started again may compile something for its first batches.
                each.preparation._replace(on_ready=costs.model.expect_first_runs)
                if isinstance(each, DevicePipeline)
                else None
                for each, costs in zip(pipelines, self._costs, strict=True)
            ],
        }

    async def _warm_up(self, device: int) -> None:
        pipeline = self.pipelines[device]
        try:
            await awaited(await self._scheduler.run_in_thread(pipeline.warm_up, device=device))
        except BaseException as error:
            raise self._warm_up_error(pipeline, users_error(error)) from error

    def _warm_up_error(self, pipeline: InferencePipeline, error: Exception) -> LoadError:
        name = type(pipeline).__name__
        return LoadError(f"model {self.model_name!r}: warming up {name} failed: {describe_with_line(error)}")

    def _close_of(self, pipelines: Sequence[InferencePipeline]) -> Callable[[], object] | None:
        def close() -> Awaitable[object] | None:
            for pipeline in pipelines[1:]:
                pipeline.close()
            return pipelines[0].close()

        return close if self._owns_pipeline else None

    async def replace(self, pipelines: Sequence[InferencePipeline], limits: BatchConfig) -> None:
        """Run the next batches by other pipelines of this model, one for each device, within these limits.

        No request fails for it. They are warmed up before, while batches go on. What waits is kept, as are costs and
        statistics; batches that run end by the old pipelines, which are closed then. Raises `LoadError` if the warm-up
        fails, and `ReloadError` for a pipeline that is too different to take over: then nothing has changed, and the
        new ones are closed.
        """
        try:
            self._check_alike(pipelines)
            await self._scheduler.replace(
                **self._how_to_run(pipelines, limits),
                warm_up=[pipeline.warm_up for pipeline in pipelines],
                on_close=self._close_of(pipelines),
            )
        except BaseException as error:
            await self._close_refused(pipelines)
            if not isinstance(error, Exception) or isinstance(error, (ServiceError, BatchingError)):
                raise
            raise self._warm_up_error(pipelines[0], error) from error
        await self._follow(pipelines, limits)

    async def _close_refused(self, pipelines: Sequence[InferencePipeline]) -> None:
        """Close pipelines that will not take over; an error is logged."""
        if (close := self._close_of(pipelines)) is None:
            return
        try:
            with anyio.fail_after(MAX_CLOSE_S, shield=True):
                # In a tuple, because trio refuses a function that returns a coroutine.
                (result,) = await anyio.to_thread.run_sync(lambda: (close(),), abandon_on_cancel=True)
                await awaited(result)
        except BaseException as error:
            refused = "%s: closing the pipeline that was refused failed; what it holds may not be free"
            logger.exception(refused, self.model_name, exc_info=users_error(error))

    def _check_alike(self, pipelines: Sequence[InferencePipeline]) -> None:
        pipeline = pipelines[0]
        if len(pipelines) != len(self.pipelines):
            raise ReloadError(self.model_name, f"it had {len(self.pipelines)} devices before; restart the service")
        if has_own(pipeline, "predict_stream") != self._streams:
            raise ReloadError(self.model_name, "predict_stream of its class has changed; restart the service")

    async def set_limits(self, limits: BatchConfig) -> None:
        """Form the next batches within these limits, once those that run have ended; what waits is kept."""
        await self._scheduler.replace(**self._how_to_run(self.pipelines, limits), in_turn=True)
        await self._follow(self.pipelines, limits)

    async def _follow(self, pipelines: Sequence[InferencePipeline], limits: BatchConfig) -> None:
        """Take up what the scheduler runs from now on."""
        self.pipelines, self.pipeline, self.limits = list(pipelines), pipelines[0], limits
        self._runner.set_limits(_job_window(limits), limits.max_batch_size)
        for costs, pipeline in zip(self._costs, pipelines, strict=True):
            await costs.follow(pipeline, limits)

    def check_room(self, **options: Unpack[RequestOptions]) -> None:
        """Raise what a request should be refused with now, before it is read: see `BatchScheduler.check_room`."""
        self._scheduler.check_room(**options)

    async def predict(
        self, item: BaseModel | Mapping[str, Any], **options: Unpack[RequestOptions]
    ) -> InferenceOutputModel:
        """Run one item in some batch and return its output, or raise its error. Owners get equal shares.

        Raises what `BatchScheduler.submit` raises, `RejectItem` when the pipeline refuses the item or answers
        with the status ``error``, and whatever the pipeline raised. A cancelled call takes its item out of the queue.
        """
        return await self._scheduler.submit(self._validated(item), tag=current_traceparent(), **options)

    def predict_many_nowait(
        self,
        items: Sequence[BaseModel],
        on_outcome: Callable[[int, Outcome[InferenceOutputModel]], None],
        **options: Unpack[QueueOptions],
    ) -> list[Callable[[], object] | Failure]:
        """Queue items and return at once; see `BatchScheduler.submit_many_nowait`."""
        return self._scheduler.submit_many_nowait(items, on_outcome, tag=current_traceparent(), **options)

    async def predict_many(
        self, items: Sequence[BaseModel | Mapping[str, Any]], **options: Unpack[RequestOptions]
    ) -> list[Outcome[InferenceOutputModel]]:
        """Run many items and return their outcomes in the same order: a `Success` or a `Failure` each.

        A mapping that is no valid item is a `Failure` with its `InvalidItemError` and does not affect the others.
        Raises `QueueFullError` if there is no room for all of them, and `SchedulerClosedError`; then none is queued.
        """
        run = partial(self._scheduler.submit_many, tag=current_traceparent(), **options)
        return await run_valid([self._checked(item) for item in items], run)

    async def predict_stream(
        self, item: BaseModel | Mapping[str, Any], **options: Unpack[RequestOptions]
    ) -> AsyncGenerator[InferenceOutputModel]:
        """Run one item, and yield the pieces of its result as the pipeline's `predict_stream` makes them.

        The last one is the result; of a pipeline without `predict_stream` it is the only one. Raises what `predict`
        raises, also after some pieces; `timeout_s` is the time for all of them. To stop early, close it
        (``contextlib.aclosing``): others of the batch go on, and the batch ends when no caller waits any more.
        """
        last = None
        pieces = self.predict_pieces(item, **options)
        async with aclosing(pieces):
            async for piece in pieces:
                if not isinstance(piece, Success):
                    last = piece
                    yield piece
                elif piece.value is not last:
                    yield piece.value

    def predict_pieces(
        self,
        item: BaseModel | Mapping[str, Any],
        *,
        timeout_s: float | None = None,
        **options: Unpack[QueueOptions],
    ) -> AsyncGenerator[InferenceOutputModel | Success[InferenceOutputModel]]:
        """As `predict_stream`, but the result comes once more as a `Success`, at the end.

        A caller that is slow misses the oldest of more than `MAX_UNREAD_PIECES` pieces.
        """
        submit = partial(self._scheduler.submit_nowait, tag=current_traceparent(), **options)
        return pieces_of(self._validated(item), submit, timeout_s, streams=self._streams)

    async def submit(self, request: AsyncInputModel | Mapping[str, Any], *, priority: Priority = Priority.BULK) -> str:
        """Accept a job and return its id, once it is stored: its result is kept, and sent to the queue it names.

        A repetition of a request with the same `idempotency_key` gets the id of the first. Raises `InvalidItemError`
        for a mapping that is no `AsyncInputModel` and for a message that is no valid item, `QueueNotAllowedError`,
        `QueueNameError` and `JobStoreError`. When cancelled, the job may have been accepted.
        """
        (outcome,) = await self.submit_many([request], priority=priority)
        if isinstance(outcome, Failure):
            raise outcome.error
        return outcome.value

    async def submit_many(
        self, requests: Sequence[AsyncInputModel | Mapping[str, Any]], *, priority: Priority = Priority.BULK
    ) -> list[Outcome[str]]:
        """Accept many jobs in one step, and return the id or the error of each, in the same order.

        One that is invalid does not affect the others. Raises `JobStoreError` when none was stored.
        """
        submit = partial(self._jobs.submit, model_name=self.model_name, priority=priority)
        return await run_valid([_request(request) for request in requests], submit)

    async def job(self, job_id: str, *, wait_s: float = 0.0) -> Job | None:
        """The job of this id as it is now, or once it ends within `wait_s` seconds; None if there is none."""
        return await self._jobs.get(job_id, wait_s)

    async def cancel(self, job_id: str) -> Job | None:
        """Cancel a job that has not ended; returns the job as it then is, or None if there is none."""
        return await self._jobs.cancel(job_id)

    async def replay(self, job_ids: Sequence[str] | None = None) -> int:
        """Send undelivered results, of these jobs or of all, once more; returns how many."""
        return await self._jobs.replay(job_ids)

    def statistics(self) -> SchedulerStatistics:
        """An immutable snapshot of the requests and batches that wait, run and are done."""
        return self._scheduler.statistics()

    @property
    def engine_choice(self) -> EngineChoice | None:
        """What computes the model, where the pipeline says so."""
        return self.pipeline.engine_choice

    @property
    def costs(self) -> MeasuredCostModel:
        """The measured costs of this pipeline's batches, on its first device."""
        return self._costs[0].model

    @property
    def is_open(self) -> bool:
        """Whether items are accepted: inside the `async with` block, unless the scheduler is broken."""
        return self._scheduler.is_open

    @property
    def is_broken(self) -> bool:
        """Whether this process should be replaced, unless another pipeline helps: see `problem`."""
        return self.problem is not None

    @property
    def problem(self) -> str | None:
        """Why no batch can run any more: the device or the scheduler is broken, or too many batches hang. Else None."""
        return self.health.problem

    @property
    def hangs(self) -> bool:
        """Whether too many batches hang past their timeout. Another pipeline, with new threads, may run."""
        return self.health.hangs

    async def wait_until_broken(self) -> None:
        """Wait until the scheduler breaks: then nothing runs any more. It may never return."""
        await self._scheduler.wait_until_broken()

    def _on_batch(self, record: BatchRecord) -> None:
        if (tracing := active_tracing()) is not None:
            tracing.record_batch(self.model_name, record)
        for sink in self._sinks:
            sink(record)

    def _validated(self, item: BaseModel | Mapping[str, Any]) -> BaseModel:
        return item if isinstance(item, BaseModel) else validated(self.input_model, item)

    def _checked(self, item: BaseModel | Mapping[str, Any]) -> BaseModel | Failure:
        try:
            return self._validated(item)
        except BaseException as error:  # noqa: BLE001  # a model's own validators may raise anything
            return Failure(users_error(error))


def _job_window(limits: BatchConfig) -> int:
    return max(1, min(BATCHES_IN_THE_JOB_WINDOW * limits.max_batch_size, limits.max_queue_size // 2))


def _request(request: AsyncInputModel | Mapping[str, Any]) -> AsyncInputModel | Failure:
    try:
        return request if isinstance(request, AsyncInputModel) else validated(AsyncInputModel, request)
    except InvalidItemError as error:
        return Failure(error)


@asynccontextmanager
async def short_lived_worker(
    pipeline: InferencePipeline, settings: Settings, **options: Any
) -> AsyncGenerator[InferenceWorker]:
    """A worker without jobs, for callers that report each error themselves; it measures no costs.

    `options` are further arguments of `InferenceWorker`.
    """
    async with (
        JobManager(MemoryJobStore()) as jobs,
        InferenceWorker(
            pipeline, settings=settings, jobs=jobs, calibrate=False, log_failures=False, **options
        ) as worker,
    ):
        yield worker
