"""The frontend's side of jobs: many share a call that a `CallQueue` keeps; each has its own id, end, cancellation."""

import logging
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self, Unpack
from weakref import WeakValueDictionary

import anyio
from anyio import AsyncContextManagerMixin
from pydantic import BaseModel

from modalkit.batching import BatchScheduler, Failure, Outcome, Priority, QueueOptions, Success
from modalkit.batching.errors import users_error
from modalkit.batching.task_groups import plain_task_group
from modalkit.pipelines import AsyncInputModel
from modalkit.service.calls.engine import CallOptions, CallQueue, CallState
from modalkit.service.calls.predictor import COST_OF_A_CALL, MAX_PARTIAL_CALLS_IN_FLIGHT, call_policy
from modalkit.service.calls.published_metrics import PublishedMetrics
from modalkit.service.calls.records import CallRecords, Reservation
from modalkit.service.calls.wire_format import json_form, make_job_id, parse_job_id, read_job
from modalkit.service.errors import NotAvailableError, ServiceError, describe_error
from modalkit.service.gateway import Model, find_model
from modalkit.service.jobs import IdempotencyKeyReusedError, Job, JobBatchLines, JobPiece, JobStatus, JobStoreError
from modalkit.service.jobs.life import is_repetition, new_job, request_digest
from modalkit.service.jobs.queue_rules import QueueRules
from modalkit.service.settings import BatchConfig
from modalkit.service.tracing import current_traceparent
from modalkit.service.validation import validated

logger = logging.getLogger(__name__)

MAX_WAITING_JOBS = 10_000
"""Most jobs of a model that wait to be sent; the configured limit of waiting items is one of the worker's queue."""
SUBMITTED_AT_ONCE = 1000
WATCH_INTERVAL_S = 2.0
"""Seconds between two questions for jobs that are watched, unless the first of them ends before."""

_STATUS_OF = {
    CallState.FAILED: JobStatus.FAILED,
    CallState.CANCELLED: JobStatus.CANCELLED,
    CallState.TIMED_OUT: JobStatus.EXPIRED,
    CallState.FORGOTTEN: JobStatus.EXPIRED,
}


@dataclass(frozen=True, slots=True)
class _Submission:
    request: AsyncInputModel
    """With a validated message."""
    traceparent: str | None
    priority: Priority = Priority.BULK
    owner: str = ""


class CallJobs(AsyncContextManagerMixin):
    """Accepts jobs as calls of a queue, tells what became of them, and cancels them, whichever process accepted them.

    The `Jobs` of a gateway over `models`; an async context manager. Calls cannot be listed, so it has no
    administration. See `CallModel` for `input_model_path`.
    """

    administration: None = None
    failure: None = None

    def __init__(
        self,
        queue: CallQueue,
        records: CallRecords,
        models: Mapping[str, Model],
        *,
        queue_rules: QueueRules,
        config: BatchConfig,
        input_model_path: str | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._queue = queue
        self._records = records
        self._models = models
        self._queue_rules = queue_rules
        self._input_model_path = input_model_path
        self._clock = clock
        self._locks_of_keys: WeakValueDictionary[tuple[str, str], anyio.Lock] = WeakValueDictionary()
        self._schedulers: dict[str, BatchScheduler[_Submission, str]] = {
            name: BatchScheduler(
                partial(self._enqueue, name),
                policy=call_policy(config, max_waiting=MAX_WAITING_JOBS),
                cost_model=COST_OF_A_CALL,
                max_in_flight=MAX_PARTIAL_CALLS_IN_FLIGHT,
                name=f"jobs of {name}",
            )
            for name in models
        }

    @asynccontextmanager
    async def __asynccontextmanager__(self) -> AsyncGenerator[Self]:
        async with AsyncExitStack() as stack:
            for scheduler in self._schedulers.values():
                await stack.enter_async_context(scheduler)
            yield self

    def check_accepting(self, model_name: str) -> None:
        """Raise `UnknownModelError` for a model that there is not."""
        find_model(self._models, model_name)

    async def submit(
        self,
        requests: Sequence[AsyncInputModel],
        *,
        model_name: str,
        batch: JobBatchLines | None = None,
        **options: Unpack[QueueOptions],
    ) -> list[Outcome[str]]:
        """Accept jobs; returns the id or the error of each, in their order, once the queue keeps them.

        One that is refused disturbs no other. A repetition of a request with the same `idempotency_key` gets the id of
        the first, where the `owner` is the same. When cancelled, any of the jobs may have been accepted. Raises
        `UnknownModelError`, and `NotAvailableError` for a `batch`.
        """
        if batch is not None:
            raise NotAvailableError("batch_id: the engine that runs the jobs cannot list them, so it has no batches")
        model = find_model(self._models, model_name)
        outcomes: list[Outcome[str]] = [Failure(RuntimeError("it was not submitted"))] * len(requests)

        async def submit(index: int) -> None:
            try:
                outcomes[index] = Success(await self._submit(model, requests[index], options))
            except BaseException as error:  # noqa: BLE001  # a user's own validators may raise anything
                outcomes[index] = Failure(users_error(error))

        for start in range(0, len(requests), SUBMITTED_AT_ONCE):
            async with anyio.create_task_group() as task_group:
                for index in range(start, min(start + SUBMITTED_AT_ONCE, len(requests))):
                    task_group.start_soon(submit, index)
        return outcomes

    async def get(self, job_id: str, wait_s: float = 0.0) -> Job | None:
        """The job as it is now, or once its call returns within `wait_s` seconds; None if there is none.

        A queue does not say when a call starts: until it returns, its jobs are ``queued``. Raises `JobStoreError`.
        """
        found = parse_job_id(job_id)
        if found is None:
            return None
        call_id, index = found
        if wait_s > 0 and await self._records.is_cancelled(call_id, index):
            wait_s = 0.0  # the job has ended, though its call may run on
        try:
            result = await self._queue.result(call_id, wait_s)
        except ServiceError as error:
            raise JobStoreError(describe_error(error)) from error
        if result.state is CallState.RETURNED:
            try:
                return read_job(result.outcomes[index])
            except (LookupError, TypeError, ValueError):
                return None  # the call may be one of something else
        recorded = await self._records.jobs(call_id)
        if result.state is CallState.UNKNOWN or (recorded is not None and index >= len(recorded)):
            return None
        unrecorded = Job(job_id=job_id, model_name="", message_json="{}", created_at=0.0)
        job = unrecorded if recorded is None else recorded[index]
        if await self._records.is_cancelled(call_id, index):
            return replace(job, status=JobStatus.CANCELLED)
        return replace(job, status=_STATUS_OF.get(result.state, JobStatus.QUEUED), error=result.error)

    async def watch(self, job_ids: Sequence[str]) -> AsyncGenerator[Job | JobPiece]:
        """Jobs as they are now, and again after changes; it ends once all have ended. Unknown ones are left out.

        A queue tells nothing by itself, so it is asked again and again. Raises `JobStoreError`.
        """
        left: dict[str, JobStatus | None] = dict.fromkeys(job_ids)
        wait_s = 0.0
        while left:
            for job_id, status in list(left.items()):
                job, wait_s = await self.get(job_id, wait_s), 0.0
                if job is None or job.status.has_ended:
                    del left[job_id]
                else:
                    left[job_id] = job.status
                if job is not None and job.status is not status:
                    yield job
            wait_s = WATCH_INTERVAL_S

    async def cancel(self, job_id: str) -> Job | None:
        """Cancel a job that has not ended; returns the job as it then is, or None if there is none.

        The other jobs of its call go on; a call of which all jobs are cancelled is ended. Raises `JobStoreError`.
        """
        job, found = await self.get(job_id), parse_job_id(job_id)
        if job is None or found is None or job.status.has_ended:
            return job
        call_id, index = found
        if not await self._records.cancel(call_id, index):
            return await self.get(job_id)
        recorded = await self._records.jobs(call_id)
        if recorded is not None and len(await self._records.cancelled(call_id, len(recorded))) == len(recorded):
            try:
                await self._queue.cancel(call_id)
            except ServiceError:
                logger.exception("Call %s could not be ended; its worker will find its jobs cancelled", call_id)
        return replace(job, status=JobStatus.CANCELLED, finished_at=self._clock())

    async def _submit(self, model: Model, request: AsyncInputModel, options: QueueOptions) -> str:
        self._queue_rules.check(request.success_queue, request.failure_queue)
        message = request.message
        if not isinstance(message, BaseModel):
            message = validated(model.input_model, message)
        submission = _Submission(
            request.model_copy(update={"message": message}), traceparent=current_traceparent(), **options
        )
        job = self._job("", model.name, submission, self._clock())  # raises what is wrong with it
        if request.idempotency_key is None:
            return await self._send(model.name, submission)
        # One at a time in this process, so that a repetition in the same list finds the first; and shielded, because a
        # caller that was cancelled will repeat the request.
        lock = self._locks_of_keys.setdefault((submission.owner, request.idempotency_key), anyio.Lock())
        async with lock:
            with anyio.CancelScope(shield=True):
                reservation = Reservation(request.idempotency_key, request_digest(job), submission.owner)
                try:
                    job_id = await self._submit_once(reservation, model.name, submission)
                except IdempotencyKeyReusedError as error:
                    job_id = error.job_id
                    if not await self._is_repetition(job, job_id, model.input_model):
                        raise
        return job_id

    async def _is_repetition(self, job: Job, earlier_id: str, input_model: type[BaseModel]) -> bool:
        found = parse_job_id(earlier_id)
        recorded = None if found is None else await self._records.jobs(found[0])
        return found is not None and recorded is not None and is_repetition(job, recorded[found[1]], input_model)

    async def _submit_once(self, reservation: Reservation, model_name: str, submission: _Submission) -> str:
        known = await self._records.reserve(reservation)
        if known is not None:
            return known
        try:
            async with plain_task_group() as renewing:
                renewing.start_soon(self._records.renew, reservation)
                job_id = await self._send(model_name, submission)
                renewing.cancel_scope.cancel()
        except Exception:
            try:
                await self._records.release(reservation)
            except Exception:
                logger.exception("The idempotency key of a job that was not accepted is still reserved")
            raise
        try:
            await self._records.keep(reservation, job_id)
        except JobStoreError:
            # The job is accepted; after an error its caller would submit it again.
            logger.exception("The idempotency key of job %s could not be recorded", job_id)
        return job_id

    async def _send(self, model_name: str, submission: _Submission) -> str:
        scheduler = self._schedulers[model_name]
        return await scheduler.submit(submission, priority=submission.priority, owner=submission.owner)

    async def _enqueue(self, model_name: str, submissions: list[_Submission]) -> Sequence[str | Exception]:
        accepted_at = self._clock()
        entries = [json_form(submission.request) for submission in submissions]
        owners = [submission.owner for submission in submissions]
        traceparents = [submission.traceparent for submission in submissions]
        options = CallOptions(
            priority=str(submissions[0].priority),
            accepted_at=accepted_at,
            input_model=self._input_model_path,
            owners=owners if any(owners) else None,
            traceparents=traceparents if any(traceparents) else None,
        )
        try:
            call_id = await self._queue.enqueue(model_name, entries, options)
        except NotAvailableError as error:
            return [error] * len(submissions)
        except ServiceError as error:
            return [JobStoreError(describe_error(error))] * len(submissions)
        job_ids = [make_job_id(call_id, index) for index in range(len(submissions))]
        jobs = [
            self._job(job_id, model_name, submission, accepted_at)
            for job_id, submission in zip(job_ids, submissions, strict=True)
        ]
        try:
            await self._records.record(call_id, jobs)
        except JobStoreError:
            # The jobs are accepted, because the queue keeps the call. Only until they end, less can be told of them.
            logger.exception("What the jobs of call %s ask for could not be recorded", call_id)
        return job_ids

    def _job(self, job_id: str, model_name: str, submission: _Submission, now: float) -> Job:
        message: BaseModel = submission.request.message
        return new_job(
            submission.request,
            job_id=job_id,
            model_name=model_name,
            message=message,
            priority=submission.priority,
            now=now,
            delivers=True,
            owner=submission.owner,
            traceparent=submission.traceparent,
        )


@dataclass(eq=False)
class CallGateway(AsyncContextManagerMixin):
    """Models and jobs over an engine. Entering it enters what it `opens`, in that order, and then the jobs."""

    models: Mapping[str, Model]
    jobs: CallJobs
    opens: Sequence[AbstractAsyncContextManager[Any]]
    published_metrics: PublishedMetrics | None = None
    """Where processes that cannot be scraped publish their metrics."""
    administration: None = None
    is_draining: bool = False

    @asynccontextmanager
    async def __asynccontextmanager__(self) -> AsyncGenerator[Self]:
        async with AsyncExitStack() as stack:
            for resource in (*self.opens, self.jobs):
                await stack.enter_async_context(resource)
            yield self

    async def metrics_of_processes(self, own: str) -> dict[str, str]:
        """The metrics of this process and of those that publish theirs."""
        return {"": own} if self.published_metrics is None else await self.published_metrics.with_own(own)
