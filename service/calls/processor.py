"""The worker's side of calls: runs their entries in batches of its worker, and returns an outcome for each."""

import logging
import math
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import anyio
from pydantic import BaseModel, ValidationError
from pydantic_core import to_json

from modalkit.batching import (
    DeadlineExceededError,
    Failure,
    Outcome,
    Priority,
    QueueFullError,
    SchedulerClosedError,
)
from modalkit.batching.errors import users_error
from modalkit.pipelines import AsyncInputModel, InferenceOutputModel, RejectItem
from modalkit.service.backoff import backoff_with_jitter
from modalkit.service.calls.delivery import send_results
from modalkit.service.calls.engine import CallOptions
from modalkit.service.calls.records import CallRecords
from modalkit.service.calls.wire_format import job_object, make_job_id, outcome_object, read_entry
from modalkit.service.errors import ContainerFaultError, DeviceFaultError, describe_error
from modalkit.service.jobs import life
from modalkit.service.jobs.model import Job
from modalkit.service.jobs.queue_rules import QueueRules
from modalkit.service.jobs.runner import FIRST_JOB_RETRY_S
from modalkit.service.jobs.telemetry import record_end
from modalkit.service.loading import LoadError, import_class
from modalkit.service.pipeline_batches import is_device_fault
from modalkit.service.queue_backends import QueueBackend
from modalkit.service.settings import AsyncConfig
from modalkit.service.validation import field_errors, summary
from modalkit.service.worker import InferenceWorker

logger = logging.getLogger(__name__)

DELIVERY_SHARE = 0.1
"""Part of a call's time that is kept for telling the queues of jobs that it was too short for."""
FULL_QUEUE_RETRY_S = 0.1
"""Seconds after which jobs are submitted again to a worker whose queue was full."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A call as a worker gets it, besides its entries.

    `until_s`, by the event loop's clock, is when it has to return. Of a call that `is_kept` by a `CallQueue` there are
    records, and it runs again if its worker dies.
    """

    call_id: str
    until_s: float
    options: CallOptions = field(default_factory=CallOptions)
    is_kept: bool = False


@dataclass(slots=True)
class _Item:
    """One entry of a call while it is processed. Its `timeout_s` ends at `until_s`, by the event loop's clock."""

    priority: Priority
    timeout_s: float | None
    until_s: float | None = None
    message: BaseModel | None = None
    job: Job | None = None
    outcome: Outcome[InferenceOutputModel] | None = None


class CallProcessor:
    """Runs calls by a worker, and sends the results of jobs by `responses`, if there is one.

    `config` limits the run of a job and the attempts to send its result. `retries` is how often the engine runs a call
    again that failed by a `ContainerFaultError`. `clock` gives wall-clock Unix seconds.
    """

    def __init__(
        self,
        worker: InferenceWorker,
        config: AsyncConfig,
        *,
        queue_rules: QueueRules,
        responses: QueueBackend | None,
        records: CallRecords,
        retries: int = 0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._worker = worker
        self._config = config
        self._queue_rules = queue_rules
        self._responses = responses
        self._records = records
        self._retries = retries
        self._clock = clock
        self._input_models: dict[str, type[BaseModel]] = {}
        self._quarantine = anyio.Lock()

    async def process(self, entries: Sequence[object], call: Call) -> list[dict[str, Any]]:
        """Run a call; returns the outcome of each entry, in their order, as `wire_format` says.

        An entry that is invalid or fails disturbs no other. Raises `ValueError` for another number of `timeouts_s`,
        `owners` or `traceparents` than entries, `JobStoreError`, and where an item failed by a fault of the worker
        `ContainerFaultError`: then nothing has been sent. When cancelled, results of jobs may have been sent.
        """
        for name in ("timeouts_s", "owners", "traceparents"):
            values = getattr(call.options, name)
            if values is not None and len(values) != len(entries):
                raise ValueError(f"{name}: {len(values)} values for {len(entries)} entries; give each entry one")
        items = self._items(entries, call)
        if call.is_kept and _have_jobs(items):
            _cancel(items, await self._records.cancelled(call.call_id, len(items)), self._clock())
            await self._run_kept(items, call)
        else:
            await self._run(items)
        errors = [item.outcome.error for item in items if isinstance(item.outcome, Failure)]
        fault = next(filter(self._is_fault_of_worker, errors), None)
        if fault is not None and not await self._is_last_run(items, call):
            if is_device_fault(fault):
                raise DeviceFaultError(describe_error(fault)) from fault
            raise ContainerFaultError(f"the worker of this container has ended: {describe_error(fault)}") from fault
        return await self._outcomes(items, call)

    async def refuse(self, entries: Sequence[object], call: Call, error: ContainerFaultError) -> list[dict[str, Any]]:
        """Raise `error`, so that the call runs elsewhere; where it will not, all its items have failed with `error`."""
        items = self._items(entries, call)
        if not await self._is_last_run(items, call):
            raise error
        for item in items:
            item.outcome = item.outcome or Failure(error)
        return await self._outcomes(items, call)

    def _items(self, entries: Sequence[object], call: Call) -> list[_Item]:
        # The same two times for all, because entries with the same time limit are submitted in one step.
        now, now_s = self._clock(), anyio.current_time()
        left_s = (1 - DELIVERY_SHARE) * (call.until_s - now_s)
        items = [self._item(index, entry, call, now, left_s) for index, entry in enumerate(entries)]
        for item in items:
            item.until_s = None if item.timeout_s is None else now_s + item.timeout_s
        return items

    def _item(self, index: int, entry: object, call: Call, now: float, left_s: float) -> _Item:
        options = call.options
        item = _Item(
            priority=Priority(options.priority or Priority.INTERACTIVE),
            timeout_s=None if options.timeouts_s is None else options.timeouts_s[index],
        )
        try:
            request = read_entry(entry)
            if isinstance(request, AsyncInputModel):
                self._make_job(item, request, call, index, now, left_s)
            item.message = self._validated(request.message, options.input_model)
        except ValidationError as error:
            item.outcome = Failure(RejectItem(summary(field_errors(error.errors(include_url=False)))))
        except BaseException as error:  # noqa: BLE001  # a user's own validators may raise anything
            item.outcome = Failure(users_error(error))
        return item

    def _make_job(
        self, item: _Item, request: AsyncInputModel, call: Call, index: int, now: float, left_s: float
    ) -> None:
        """Make an item a job.

        Raises `QueueNotAllowedError` and `QueueNameError`; then the job names no queue but a `failure_queue` that
        passes, to which the error is sent.
        """
        options = call.options
        item.priority = Priority(options.priority or Priority.BULK)
        queued = life.new_job(
            request,
            job_id=make_job_id(call.call_id, index),
            model_name=self._worker.model_name,
            message=request.message,
            priority=item.priority,
            now=now if options.accepted_at is None else options.accepted_at,
            delivers=False,
            owner="" if options.owners is None else options.owners[index],
            traceparent=None if options.traceparents is None else options.traceparents[index],
        )
        item.job = job = life.start_job(queued, now)
        item.timeout_s = min(left_s, life.deadline_of(job, timeout_s=self._config.timeout, now=now) - now)
        if item.timeout_s <= 0:
            item.outcome = Failure(DeadlineExceededError(0.0))
        self._queue_rules.check(None, request.failure_queue)
        if self._responses is not None:
            item.job = job = replace(job, failure_queue=request.failure_queue)
        self._queue_rules.check(request.success_queue, None)
        if self._responses is not None:
            item.job = replace(job, success_queue=request.success_queue)

    def _validated(self, message: Any, input_model: str | None) -> BaseModel:
        if isinstance(message, BaseModel):
            return message
        model = self._worker.input_model if input_model is None else self._imported(input_model)
        try:
            return model.model_validate(message)
        except ValidationError as error:
            # A frontend sends the JSON form, which a strict model takes as JSON text only.
            try:
                text = to_json(message)
            except ValueError:
                raise error from None
            return model.model_validate_json(text)

    def _imported(self, path: str) -> type[BaseModel]:
        if path not in self._input_models:
            self._input_models[path] = own = self._worker.input_model
            try:
                self._input_models[path] = import_class(path, "input_model", BaseModel)
            except LoadError as error:
                logger.warning("Messages are validated as %s, because %s", own.__name__, error)
        return self._input_models[path]

    async def _run_kept(self, items: Sequence[_Item], call: Call) -> None:
        """Run the items of a call that runs again if its worker dies, and record which of them run.

        After a crash they are quarantined, to find the one that kills the worker and let it fail: they run in groups
        that get smaller with their crashes, those with few crashes first, and never beside those of another call.
        """
        crashes = await self._records.crashes(call.call_id)
        waiting = {index: item for index, item in enumerate(items) if _is_to_run(item)}
        if not crashes:
            await self._records.start_run(call.call_id, list(waiting), crashes)
            await self._run(items)
            return
        async with self._quarantine:
            while waiting:
                fewest = min(crashes[index] for index in waiting)
                group = [index for index in waiting if crashes[index] == fewest]
                group = group[: life.quarantine_group_size(fewest, len(items))]
                if life.has_crashed_too_often(fewest):
                    for index in group:
                        waiting.pop(index).outcome = Failure(ContainerFaultError(life.TOO_MANY_CRASHES))
                    continue
                await self._records.start_run(call.call_id, group, crashes)
                await self._run([waiting.pop(index) for index in group])
                for index in group:
                    crashes.pop(index, None)  # this run has shown that it does not kill the worker
            await self._records.start_run(call.call_id, (), crashes)

    async def _run(self, items: Sequence[_Item]) -> None:
        """Run items; those of one priority and time limit, nearly always all, are submitted in one step."""
        alike: defaultdict[tuple[Priority, float | None, bool], list[_Item]] = defaultdict(list)
        for item in items:
            if _is_to_run(item):
                alike[item.priority, item.timeout_s, item.job is not None].append(item)
        async with anyio.create_task_group() as task_group:
            for group in alike.values():
                task_group.start_soon(self._run_alike, group)

    async def _run_alike(self, items: Sequence[_Item]) -> None:
        """Run items; jobs again that failed by no fault of theirs, as long as there are attempts and time."""
        attempt = 1
        while True:
            await self._run_once(items)
            pause_s = backoff_with_jitter(attempt, first_s=FIRST_JOB_RETRY_S)
            retried = [(item, job) for item in items if (job := self._job_to_retry(item, pause_s)) is not None]
            if not retried:
                return
            for _, job in retried:
                job.attempts += 1
            items = [item for item, _ in retried]
            await anyio.sleep(pause_s)
            attempt += 1

    def _job_to_retry(self, item: _Item, pause_s: float) -> Job | None:
        """The job of an item that is to run again in `pause_s` seconds, because of how it failed."""
        if item.job is None or not isinstance(item.outcome, Failure) or self._is_fault_of_worker(item.outcome.error):
            return None
        retry = life.retry_of(
            item.job,
            item.outcome,
            max_attempts=self._config.max_attempts,
            deadline=math.inf if item.until_s is None else item.until_s,
            now=anyio.current_time(),
            backoff_s=lambda _: pause_s,
        )
        return None if retry is None else item.job

    async def _run_once(self, items: Sequence[_Item]) -> None:
        first = items[0]
        messages = [item.message for item in items if item.message is not None]
        outcomes: Sequence[Outcome[InferenceOutputModel]]
        while True:
            # What came before has taken time: records, other groups of the quarantine, a full queue.
            left_s = None if first.until_s is None else first.until_s - anyio.current_time()
            if left_s is not None and left_s <= 0:
                outcomes = [Failure(DeadlineExceededError(first.timeout_s or 0.0))] * len(items)
                break
            try:
                outcomes = await self._worker.predict_many(messages, priority=first.priority, timeout_s=left_s)
                break
            except Exception as error:  # noqa: BLE001  # what refuses a list is the error of each item
                outcomes = [Failure(error)] * len(items)
                may_pass = isinstance(error, QueueFullError) and not error.is_permanent
            if first.job is None or left_s is None or not may_pass:
                break
            await anyio.sleep(FULL_QUEUE_RETRY_S)  # a job that was accepted is not refused
        for item, outcome in zip(items, outcomes, strict=True):
            is_late = isinstance(outcome, Failure) and isinstance(outcome.error, DeadlineExceededError)
            item.outcome = Failure(DeadlineExceededError(item.timeout_s or 0.0)) if is_late else outcome

    def _is_fault_of_worker(self, error: Exception) -> bool:
        """Whether an item failed because this worker can run nothing any more; another one may run it."""
        # A pipeline may have a scheduler of its own, whose error says nothing of the worker.
        return is_device_fault(error) or (isinstance(error, SchedulerClosedError) and not self._worker.is_open)

    async def _is_last_run(self, items: Sequence[_Item], call: Call) -> bool:
        """Whether the engine does not run a faulty call again, so that the queues of its jobs have to be told now."""
        return call.is_kept and _have_jobs(items) and await self._records.count_fault(call.call_id) > self._retries

    async def _outcomes(self, items: Sequence[_Item], call: Call) -> list[dict[str, Any]]:
        if _have_jobs(items):
            await self._end_jobs(items, call)
        return [_outcome(item) for item in items]

    async def _end_jobs(self, items: Sequence[_Item], call: Call) -> None:
        now = self._clock()
        if call.is_kept:
            _cancel(items, await self._records.close(call.call_id, len(items)), now)
        with_jobs = [(item, item.job) for item in items if item.job is not None]
        jobs = [_ended(job, item.outcome, now) for item, job in with_jobs]
        if self._responses is not None:
            jobs = await send_results(
                self._responses,
                jobs,
                call.until_s,
                max_attempts=self._config.max_delivery_attempts,
                clock=self._clock,
            )
        for (item, _), job in zip(with_jobs, jobs, strict=True):
            item.job = job


def _ended(job: Job, outcome: Outcome[InferenceOutputModel] | None, now: float) -> Job:
    if outcome is None:
        return job
    job = life.end_job(job, life.end_of(job, outcome, now)) or job
    record_end(job, job.status, now)
    return job


def _is_to_run(item: _Item) -> bool:
    return item.message is not None and item.outcome is None


def _have_jobs(items: Sequence[_Item]) -> bool:
    return any(item.job is not None for item in items)


def _cancel(items: Sequence[_Item], cancelled: frozenset[int], now: float) -> None:
    for index in cancelled:
        item = items[index]
        if item.job is not None and (job := life.cancel_job(item.job, now)) is not None:
            item.job, item.message = job, None


def _outcome(item: _Item) -> dict[str, Any]:
    if item.job is not None:
        return job_object(item.job)
    if item.outcome is None:
        raise AssertionError("an entry was left without an outcome: this is a bug in modalkit")
    return outcome_object(item.outcome)
