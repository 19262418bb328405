"""Runs the lists that arrive at a container, merged into batches by its worker, and says what became of each item."""

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import anyio
from pydantic import BaseModel, ValidationError
from pydantic_core import to_json

from modalkit.batching import (
    BatchingError,
    BatchTimeoutError,
    DeadlineExceededError,
    Failure,
    Outcome,
    OutputCountError,
    Priority,
    QueueFullError,
)
from modalkit.pipelines import AsyncInputModel, InferenceOutputModel
from modalkit.service.errors import (
    ContainerFaultError,
    DeviceFaultError,
    ItemRejectedError,
    ServiceError,
    describe_error,
)
from modalkit.service.jobs.life import (
    CRASHES_ALONE,
    TOO_MANY_CRASHES,
    cancel_job,
    end_job,
    end_of,
    start_job,
)
from modalkit.service.jobs.model import Job, json_text
from modalkit.service.jobs.queue_rules import QueueRules
from modalkit.service.on_modal.call_format import error_object, job_object, make_job_id, outcome_object, read_entry
from modalkit.service.on_modal.device_faults import is_device_fault
from modalkit.service.on_modal.ledger import CallLedger
from modalkit.service.on_modal.responses import ResponseSender
from modalkit.service.validation import field_errors, summary
from modalkit.service.worker import InferenceWorker

logger = logging.getLogger(__name__)

DELIVERY_SHARE = 0.1
"""Of the time that a call has: kept for telling the queues of jobs that it was too short for."""
RUNS_TOGETHER = 3
"""How often a call with jobs may be cut short, by a preemption as well, before they run one at a time."""
ROOM_S = 0.1
"""How long jobs wait for room in a full queue before they ask again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """What is known of a call besides its list.

    `until_s`, by the event loop's clock, is when it has to return. `priority` None is interactive for items that
    somebody waits for, and bulk for jobs. A call of which the ledger knows `is_recorded`.
    """

    call_id: str
    until_s: float
    priority: Priority | None = None
    timeouts_s: Sequence[float | None] | None = None
    accepted_at: float | None = None
    is_recorded: bool = False


@dataclass(slots=True)
class _Item:
    """One entry of a list, on its way."""

    message: BaseModel | None = None
    job: Job | None = None
    priority: Priority = Priority.INTERACTIVE
    timeout_s: float | None = None
    outcome: Outcome[InferenceOutputModel] | None = None


class ListProcessor:
    """Runs lists by a worker, and has results of jobs sent.

    `sender` None sends nothing. `ledger` tells which jobs were cancelled. `job_timeout_s` bounds a job's run.
    """

    def __init__(
        self,
        worker: InferenceWorker,
        *,
        queue_rules: QueueRules,
        sender: ResponseSender | None,
        ledger: CallLedger,
        job_timeout_s: float,
        retries: int = 0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._worker = worker
        self._queue_rules = queue_rules
        self._sender = sender
        self._ledger = ledger
        self._job_timeout_s = job_timeout_s
        self._retries = retries
        self._clock = clock
        self._one_suspect = anyio.Lock()

    async def process(self, entries: Sequence[object], call: Call) -> list[dict[str, Any]]:
        """Run a list; returns what became of each entry, in their order, as `call_format` says.

        An entry that is invalid or fails disturbs no other. Raises `ValueError` for another number of times than
        entries, and of all errors of items only `DeviceFaultError`: then nothing has been sent. When cancelled, results
        of jobs may have been sent.
        """
        if call.timeouts_s is not None and len(call.timeouts_s) != len(entries):
            raise ValueError(
                f"timeouts_s: {len(call.timeouts_s)} times for {len(entries)} entries; give each entry one"
            )
        items = self._items(entries, call)
        if call.is_recorded and _has_jobs(items):
            _cancel(items, await self._ledger.cancelled(call.call_id, len(items)), self._clock())
            if await self._ledger.begin(call.call_id) > RUNS_TOGETHER:
                await self._run_one_by_one(items, call)
        await self._run([item for item in items if _is_to_run(item)])
        fault = next((error for error in map(_error_of, items) if error is not None and is_device_fault(error)), None)
        if fault is not None and not await self._was_the_last_run(items, call):
            raise DeviceFaultError(describe_error(fault)) from fault
        _log_failures(items)
        return await self._answers(items, call)

    async def refuse(self, entries: Sequence[object], call: Call, error: ContainerFaultError) -> list[dict[str, Any]]:
        """Raise `error`, for the list to be run elsewhere; where it will not be, all of it has failed with `error`."""
        items = self._items(entries, call)
        if not await self._was_the_last_run(items, call):
            raise error
        for item in items:
            item.outcome = item.outcome or Failure(error)
        return await self._answers(items, call)

    def _items(self, entries: Sequence[object], call: Call) -> list[_Item]:
        # One time for all of them: what has the same time limit is submitted in one step.
        now, left_s = self._clock(), (1 - DELIVERY_SHARE) * (call.until_s - anyio.current_time())
        return [self._item(index, entry, call, now, left_s) for index, entry in enumerate(entries)]

    def _item(self, index: int, entry: object, call: Call, now: float, left_s: float) -> _Item:
        item = _Item(
            priority=call.priority or Priority.INTERACTIVE,
            timeout_s=None if call.timeouts_s is None else call.timeouts_s[index],
        )
        try:
            request = read_entry(entry)
            if isinstance(request, AsyncInputModel):
                self._make_job(item, make_job_id(call.call_id, index), request, call, now, left_s)
            item.message = self._validated(request.message)
        except ValidationError as error:
            item.outcome = Failure(ItemRejectedError(summary(field_errors(error.errors(include_url=False)))))
        except Exception as error:  # noqa: BLE001  # a user's own validators may raise anything; it is this entry's error
            item.outcome = Failure(error)
        return item

    def _make_job(
        self, item: _Item, job_id: str, request: AsyncInputModel, call: Call, now: float, left_s: float
    ) -> None:
        """Make an item a job. Raises `QueueNotAllowedError` and `QueueNameError`; the job then names no queue."""
        created_at = now if call.accepted_at is None else call.accepted_at
        item.priority = call.priority or Priority.BULK
        job = Job(
            job_id=job_id,
            model_name=self._worker.model_name,
            message_json=json_text(request.model_dump(mode="json", by_alias=True, round_trip=True)["message"]),
            success_queue=None,
            failure_queue=None,
            meta_json=json_text(request.meta),
            priority=item.priority,
            created_at=created_at,
            expires_at=None if request.expires_in is None else created_at + request.expires_in,
            idempotency_key=request.idempotency_key,
        )
        item.job = job = start_job(job, now)
        item.timeout_s = min(self._job_timeout_s, left_s)
        if job.expires_at is not None:
            item.timeout_s = min(item.timeout_s, job.expires_at - now)
        if item.timeout_s <= 0:
            item.outcome = Failure(DeadlineExceededError(0.0))
        self._queue_rules.check(request.success_queue, request.failure_queue)
        if self._sender is not None:
            job.success_queue, job.failure_queue = request.success_queue, request.failure_queue

    def _validated(self, message: Any) -> BaseModel:
        if isinstance(message, BaseModel):
            return message
        model = self._worker.input_model
        try:
            return model.model_validate(message)
        except ValidationError as error:
            # From a web container it comes in its JSON form, which a strict model takes as such only.
            try:
                text = to_json(message)
            except ValueError:
                raise error from None
            return model.model_validate_json(text)

    async def _run(self, items: Sequence[_Item]) -> None:
        """Run items; those of one priority and time limit, nearly always all, are submitted in one step."""
        alike: defaultdict[tuple[Priority, float | None, bool], list[_Item]] = defaultdict(list)
        for item in items:
            alike[item.priority, item.timeout_s, item.job is not None].append(item)
        async with anyio.create_task_group() as task_group:
            for group in alike.values():
                task_group.start_soon(self._run_alike, group)

    async def _run_one_by_one(self, items: Sequence[_Item], call: Call) -> None:
        """Run the items of a call that its containers died with, to find the one that kills them, and let it fail.

        Each is noted before it runs, and no item of another such call runs meanwhile.
        """
        async with self._one_suspect:
            crashes = await self._ledger.crashes(call.call_id)
            for index, item in enumerate(items):
                if not _is_to_run(item):
                    continue
                if crashes.get(index, 0) >= CRASHES_ALONE:
                    item.outcome = Failure(ContainerFaultError(TOO_MANY_CRASHES))
                    continue
                await self._ledger.run_alone(call.call_id, index, crashes)
                await self._run([item])
            await self._ledger.run_alone(call.call_id, None, crashes)

    async def _run_alike(self, items: Sequence[_Item]) -> None:
        first = items[0]
        started_s, timeout_s = anyio.current_time(), first.timeout_s
        messages = [item.message for item in items if item.message is not None]
        while True:
            try:
                outcomes = await self._worker.predict_many(messages, priority=first.priority, timeout_s=timeout_s)
                break
            except Exception as error:  # noqa: BLE001  # whatever refuses a list is the error of each item
                outcomes = [Failure(error)] * len(items)
                is_for_now = isinstance(error, QueueFullError) and not error.is_permanent
            if first.job is None or first.timeout_s is None or not is_for_now:
                break
            await anyio.sleep(ROOM_S)  # an accepted job is not refused
            timeout_s = first.timeout_s - (anyio.current_time() - started_s)
            if timeout_s <= 0:
                outcomes = [Failure(DeadlineExceededError(first.timeout_s))] * len(items)
                break
        for item, outcome in zip(items, outcomes, strict=True):
            item.outcome = outcome

    async def _was_the_last_run(self, items: Sequence[_Item], call: Call) -> bool:
        """Whether Modal will not run this call again, so that the queues of its jobs have to be told now."""
        return call.is_recorded and _has_jobs(items) and await self._ledger.faults(call.call_id) > self._retries

    async def _answers(self, items: Sequence[_Item], call: Call) -> list[dict[str, Any]]:
        if _has_jobs(items):
            await self._finish(items, call)
        return [_answer(item) for item in items]

    async def _finish(self, items: Sequence[_Item], call: Call) -> None:
        now = self._clock()
        if call.is_recorded:
            _cancel(items, await self._ledger.close(call.call_id, len(items)), now)
        for item in items:
            if item.job is not None and not item.job.status.has_ended and item.outcome is not None:
                item.job = end_job(item.job, end_of(item.job, item.outcome, now))
        if self._sender is not None:
            ended = [item for item in items if item.job is not None]
            sent = await self._sender.send([item.job for item in ended if item.job is not None], call.until_s)
            for item, job in zip(ended, sent, strict=True):
                item.job = job


def _is_to_run(item: _Item) -> bool:
    return item.message is not None and item.outcome is None


def _has_jobs(items: Sequence[_Item]) -> bool:
    return any(item.job is not None for item in items)


def _error_of(item: _Item) -> Exception | None:
    return item.outcome.error if isinstance(item.outcome, Failure) else None


def _log_failures(items: Sequence[_Item]) -> None:
    """The traceback of what the pipeline raised, which does not travel; a batch that failed as a whole raised once."""
    ran = [item for item in items if item.message is not None]
    errors = {id(error): error for error in map(_error_of, ran) if error is not None}
    for error in errors.values():
        if isinstance(error, BatchTimeoutError | OutputCountError):
            logger.error("The pipeline failed: %s", error)
        elif not isinstance(error, ServiceError | BatchingError):
            logger.error("The pipeline failed", exc_info=error)


def _cancel(items: Sequence[_Item], cancelled: frozenset[int], now: float) -> None:
    for index in cancelled:
        job = items[index].job
        if job is not None and (after := cancel_job(job, now)) is not None:
            items[index].job, items[index].message = after, None


def _answer(item: _Item) -> dict[str, Any]:
    if item.job is not None:
        return job_object(item.job)
    if item.outcome is None:
        raise AssertionError("an entry was left without an outcome: this is a bug in modalkit")
    return error_object(item.outcome.error) if isinstance(item.outcome, Failure) else outcome_object(item.outcome)
