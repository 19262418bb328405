"""The worker: one pipeline, its scheduler and its jobs. It knows neither HTTP nor Modal."""

import math
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, nullcontext
from typing import Any, Self

import anyio
from anyio import AsyncContextManagerMixin
from pydantic import BaseModel

from modalkit.batching import (
    BatchPolicy,
    BatchRecord,
    BatchScheduler,
    DeadlineExceededError,
    Failure,
    MeasuredCostModel,
    Outcome,
    Priority,
    SchedulerStatistics,
    Success,
)
from modalkit.pipelines import AsyncInputModel, EngineChoice, InferenceOutputModel, InferencePipeline
from modalkit.pipelines.inference_pipeline import awaited, has_own
from modalkit.service.device_process import DevicePipeline
from modalkit.service.errors import InvalidItemError, describe_with_line
from modalkit.service.failure_log import FailureLog
from modalkit.service.jobs import Job, JobStore, MemoryJobStore
from modalkit.service.jobs.manager import JobManager
from modalkit.service.jobs.runner import JobOutcome, JobRunner
from modalkit.service.learnt_costs import LearntCosts
from modalkit.service.loading import LoadError, make_job_manager
from modalkit.service.metrics import BatchMetrics
from modalkit.service.pipeline_batches import is_too_large, max_in_flight_of, run_batch_of
from modalkit.service.queue_backends import QueueBackend
from modalkit.service.settings import AppSettings, BatchConfig, Settings
from modalkit.service.streams import Payload, StreamedItem, item_of
from modalkit.service.tracing import active_tracing, current_traceparent
from modalkit.service.validation import validated

MAX_STUCK_THREADS = 3
"""Threads stuck in batches that hang with which a worker is broken."""
BATCHES_IN_THE_JOB_WINDOW = 16


def batch_policy(config: BatchConfig) -> BatchPolicy:
    """The scheduler's limits as the configuration gives them."""
    return BatchPolicy(
        max_batch_size=config.max_batch_size,
        max_batch_tokens=config.max_batch_tokens,
        max_batch_s=config.max_batch_seconds,
        max_wait_s=config.wait_ms / 1000,
        max_queue_items=config.max_queue_size,
        max_age_s=config.max_age_ms / 1000,
        max_bulk_batch_s=None if config.max_bulk_batch_ms == "auto" else config.max_bulk_batch_ms / 1000,
    )


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
        self.pipelines = [pipeline] if isinstance(pipeline, InferencePipeline) else list(pipeline)
        pipeline = self.pipeline = self.pipelines[0]
        settings = None if settings is None else settings.for_model(pipeline.model_name)
        app_settings = AppSettings() if settings is None else settings.app_settings
        batch_config = app_settings.batch_config
        max_in_flight = max_in_flight_of(pipeline, batch_config)
        self.model_name = pipeline.model_name
        self.input_model = input_model or pipeline.input_model
        self._owns_jobs = jobs is None
        self._jobs = jobs or make_job_manager(settings, queue_backend, job_store)
        self._sinks: list[Callable[[BatchRecord], None]] = [BatchMetrics(self.model_name)]
        self._sinks += [FailureLog(self.model_name)] if log_failures else []
        self._sinks += [] if on_batch is None else [on_batch]
        self._costs = [LearntCosts(each, batch_config, calibrate=calibrate) for each in self.pipelines]
        self._streams = has_own(pipeline, "predict_stream")
        size_of_item: Callable[[Any], int] = pipeline.item_size
        self._scheduler: BatchScheduler[Payload, InferenceOutputModel] = BatchScheduler(
            [run_batch_of(each, max_in_flight) for each in self.pipelines],
            policy=batch_policy(batch_config),
            cost_model=[costs.model for costs in self._costs],
            item_size=(lambda payload: pipeline.item_size(item_of(payload))) if self._streams else size_of_item,
            max_in_flight=max_in_flight,
            batch_timeout_s=batch_config.batch_timeout_seconds,
            before_batch=[each.ensure_running if isinstance(each, DevicePipeline) else None for each in self.pipelines],
            is_too_large=is_too_large,
            on_batch=self._on_batch,
            on_close=self._close_pipelines if owns_pipeline else None,
            name=self.model_name,
        )
        window = min(BATCHES_IN_THE_JOB_WINDOW * batch_config.max_batch_size, batch_config.max_queue_size // 2)
        self._runner = JobRunner(
            self._jobs,
            self.model_name,
            _Engine(self._scheduler, self.input_model),
            window=max(1, window),
            group_limit=batch_config.max_batch_size,
            timeout_s=app_settings.async_config.timeout,
            max_attempts=app_settings.async_config.max_attempts,
        )

    @asynccontextmanager
    async def __asynccontextmanager__(self) -> AsyncGenerator[Self]:
        try:
            async with self._jobs if self._owns_jobs else nullcontext(), self._scheduler:
                for device, pipeline in enumerate(self.pipelines):
                    await self._warm_up(pipeline, device)
                    await self._costs[device].learn(self._scheduler, device)
                async with self._runner:
                    yield self
        finally:
            for costs in self._costs:
                await costs.keep()

    def _close_pipelines(self) -> Awaitable[object] | None:
        for pipeline in self.pipelines[1:]:
            pipeline.close()
        return self.pipeline.close()

    async def _warm_up(self, pipeline: InferencePipeline, device: int) -> None:
        try:
            await awaited(await self._scheduler.run_in_thread(pipeline.warm_up, device=device))
        except Exception as error:
            name = type(self.pipeline).__name__
            raise LoadError(
                f"model {self.model_name!r}: warming up {name} failed: {describe_with_line(error)}"
            ) from error

    async def predict(
        self,
        item: BaseModel | Mapping[str, Any],
        *,
        priority: Priority = Priority.INTERACTIVE,
        timeout_s: float | None = None,
    ) -> InferenceOutputModel:
        """Run one item in some batch and return its output, or raise its error.

        Raises what `BatchScheduler.submit` raises, `RejectItem` when the pipeline refuses the item or answers
        with the status ``error``, and whatever the pipeline raised. A cancelled call takes its item out of the queue.
        """
        return await self._scheduler.submit(
            self._validated(item), priority=priority, timeout_s=timeout_s, tag=current_traceparent()
        )

    async def predict_many(
        self,
        items: Sequence[BaseModel | Mapping[str, Any]],
        *,
        priority: Priority = Priority.INTERACTIVE,
        timeout_s: float | None = None,
    ) -> list[Outcome[InferenceOutputModel]]:
        """Run many items and return their outcomes in the same order: a `Success` or a `Failure` each.

        A mapping that is no valid item is a `Failure` with its `InvalidItemError` and disturbs no other. Before
        anything is queued, `QueueFullError` is raised when not all find room, and `SchedulerClosedError`.
        """
        checked = [self._checked(item) for item in items]
        valid = [item for item in checked if not isinstance(item, Failure)]
        ran = await self._scheduler.submit_many(
            valid, priority=priority, timeout_s=timeout_s, tag=current_traceparent()
        )
        outcomes = iter(ran)
        return [item if isinstance(item, Failure) else next(outcomes) for item in checked]

    async def predict_stream(
        self,
        item: BaseModel | Mapping[str, Any],
        *,
        priority: Priority = Priority.INTERACTIVE,
        timeout_s: float | None = None,
    ) -> AsyncGenerator[InferenceOutputModel]:
        """Run one item, and yield the pieces of its result as the pipeline's `predict_stream` makes them.

        The last one is the result; of a pipeline without `predict_stream` it is the only one. Raises what `predict`
        raises, also after some pieces; `timeout_s` is the time for all of them. To stop early, close it
        (``contextlib.aclosing``): others of the batch go on, and the batch ends when no caller waits any more.
        """
        validated = self._validated(item)
        send, receive = anyio.create_memory_object_stream[InferenceOutputModel | Outcome[InferenceOutputModel]](
            math.inf
        )
        streamed = StreamedItem(validated, send.send_nowait)
        with send, receive:
            withdraw = self._scheduler.submit_nowait(
                streamed if self._streams else streamed.item,
                send.send_nowait,
                priority=priority,
                tag=current_traceparent(),
            )
            try:
                deadline_s = math.inf if timeout_s is None else anyio.current_time() + timeout_s
                piece = None
                while True:
                    with anyio.CancelScope(deadline=deadline_s) as scope:
                        received = await receive.receive()
                    if scope.cancelled_caught:
                        raise DeadlineExceededError(timeout_s or 0.0)
                    if isinstance(received, Failure):
                        raise received.error
                    if isinstance(received, Success):
                        if received.value is not piece:
                            yield received.value
                        return
                    piece = received
                    yield piece
            finally:
                streamed.is_wanted = False
                withdraw()

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

        One that is invalid disturbs no other. Raises `JobStoreError` when none was stored.
        """
        checked = [_request(request) for request in requests]
        valid = [request for request in checked if not isinstance(request, Failure)]
        outcomes = iter(await self._jobs.submit(valid, model_name=self.model_name, priority=priority))
        return [request if isinstance(request, Failure) else next(outcomes) for request in checked]

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
    def is_broken(self) -> bool:
        """Whether this process should be replaced: too many batches hang past their timeout, or the scheduler broke."""
        return self._scheduler.is_broken or self._scheduler.stuck_threads >= MAX_STUCK_THREADS

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
        except Exception as error:  # noqa: BLE001  # a model's own validators may raise anything
            return Failure(error)


def _request(request: AsyncInputModel | Mapping[str, Any]) -> AsyncInputModel | Failure:
    try:
        return request if isinstance(request, AsyncInputModel) else validated(AsyncInputModel, request)
    except InvalidItemError as error:
        return Failure(error)


@asynccontextmanager
async def short_lived_worker(
    pipeline: InferencePipeline,
    settings: Settings,
    on_batch: Callable[[BatchRecord], None] | None = None,
    input_model: type[BaseModel] | None = None,
    *,
    owns_pipeline: bool = True,
) -> AsyncGenerator[InferenceWorker]:
    """A worker without jobs, for callers that report each error themselves; it measures no costs."""
    async with (
        JobManager(MemoryJobStore()) as jobs,
        InferenceWorker(
            pipeline,
            settings=settings,
            jobs=jobs,
            input_model=input_model,
            on_batch=on_batch,
            calibrate=False,
            log_failures=False,
            owns_pipeline=owns_pipeline,
        ) as worker,
    ):
        yield worker


class _Engine:
    """Runs stored jobs in the worker's scheduler."""

    def __init__(self, scheduler: BatchScheduler[Payload, InferenceOutputModel], input_model: type[BaseModel]) -> None:
        self._scheduler = scheduler
        self.input_model = input_model

    def start(self, job: Job, on_outcome: Callable[[JobOutcome], None]) -> Callable[[], None]:
        item = self.input_model.model_validate_json(job.message_json)
        return self._scheduler.submit_nowait(item, on_outcome, priority=job.priority, tag=job.traceparent)

    async def run_as_one_batch(self, jobs: Sequence[Job]) -> Sequence[JobOutcome]:
        outcomes: dict[str, JobOutcome] = {}
        items: dict[str, BaseModel] = {}
        for job in jobs:
            try:
                items[job.job_id] = self.input_model.model_validate_json(job.message_json)
            except Exception as error:  # noqa: BLE001  # an item that is not valid any more fails alone
                outcomes[job.job_id] = Failure(error)
        if items:
            outputs = await self._scheduler.run_as_one_batch(list(items.values()))
            for job_id, output in zip(items, outputs, strict=True):
                outcomes[job_id] = Failure(output) if isinstance(output, Exception) else Success(output)
        return [outcomes[job.job_id] for job in jobs]
