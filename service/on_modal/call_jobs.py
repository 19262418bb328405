"""Jobs as calls that Modal keeps: many share one call, and each is told and cancelled by itself."""

import hashlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self
from weakref import WeakValueDictionary

import anyio
from pydantic_core import to_json

from modalkit.batching import BatchScheduler, Priority
from modalkit.pipelines import AsyncInputModel
from modalkit.service.errors import ServiceError, describe_error
from modalkit.service.jobs import Job, JobStatus, JobStoreError
from modalkit.service.jobs.model import json_text
from modalkit.service.jobs.queue_rules import QueueRules
from modalkit.service.on_modal.call_format import make_job_id, parse_job_id, read_job
from modalkit.service.on_modal.ledger import CallLedger, Reservation
from modalkit.service.on_modal.lists import BY_THE_CALL, EAGER_LISTS, list_policy
from modalkit.service.on_modal.remote import Calls, CallState, RemoteService
from modalkit.service.settings import BatchConfig

logger = logging.getLogger(__name__)

WAITING_JOBS = 10_000
"""How many may wait to be sent, however few items may wait for a worker: that bound is not one of jobs."""

_STATUS_OF = {
    CallState.FAILED: JobStatus.FAILED,
    CallState.CANCELLED: JobStatus.CANCELLED,
    CallState.TIMED_OUT: JobStatus.EXPIRED,
    CallState.FORGOTTEN: JobStatus.EXPIRED,
}


@dataclass(frozen=True, slots=True)
class _Submission:
    entry: dict[str, Any]
    priority: Priority


class JobSpawner:
    """Accepts the jobs of one model: those that come together become one call. An async context manager."""

    def __init__(
        self,
        remote: RemoteService,
        ledger: CallLedger,
        queue_rules: QueueRules,
        config: BatchConfig,
        *,
        model_name: str,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._remote = remote
        self._ledger = ledger
        self._queue_rules = queue_rules
        self._model_name = model_name
        self._clock = clock
        self._keys_in_hand: WeakValueDictionary[str, anyio.Lock] = WeakValueDictionary()
        self._scheduler: BatchScheduler[_Submission, str] = BatchScheduler(
            self._spawn,
            policy=list_policy(config, may_wait=WAITING_JOBS),
            cost_model=BY_THE_CALL,
            max_in_flight=EAGER_LISTS,
            name=f"jobs for {model_name}",
        )

    async def __aenter__(self) -> Self:
        await self._scheduler.__aenter__()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        return await self._scheduler.__aexit__(exc_type, exc, traceback)

    async def submit(self, request: AsyncInputModel, priority: Priority) -> str:
        """Accept a job, and return its id once Modal has it. See `InferenceWorker.submit`."""
        self._queue_rules.check(request.success_queue, request.failure_queue)
        submission = _submission(request, priority)
        if request.idempotency_key is None:
            return await self._scheduler.submit(submission, priority=priority)
        # One after the other here, so that a repetition in the same list finds the first; and to the end, as a caller
        # that was cut short will repeat the request.
        lock = self._keys_in_hand.setdefault(request.idempotency_key, anyio.Lock())
        async with lock:
            with anyio.CancelScope(shield=True):
                return await self._submit_once(request.idempotency_key, submission, priority)
        raise AssertionError("a shielded scope was cut short: this is a bug in modalkit")

    async def _submit_once(self, key: str, submission: _Submission, priority: Priority) -> str:
        reserved = await self._ledger.reserve(key, self._digest(submission))
        if not isinstance(reserved, Reservation):
            return reserved
        try:
            job_id = await self._scheduler.submit(submission, priority=priority)
        except Exception:
            await self._ledger.give_back(reserved)
            raise
        try:
            await self._ledger.keep(reserved, job_id)
        except JobStoreError:
            # It is accepted, and an error would have it submitted again.
            logger.exception("That job %s has an idempotency key could not be noted", job_id)
        return job_id

    def _digest(self, submission: _Submission) -> str:
        """The same for all requests that ask for the same."""
        asked = [submission.entry[name] for name in ("message", "success_queue", "failure_queue", "meta")]
        return hashlib.sha256(to_json([self._model_name, *asked])).hexdigest()

    async def _spawn(self, submissions: list[_Submission]) -> Sequence[str | Exception]:
        accepted_at = self._clock()
        entries, priority = [submission.entry for submission in submissions], submissions[0].priority
        try:
            call_id = await self._remote.spawn(entries, priority=str(priority), accepted_at=accepted_at)
        except ServiceError as error:
            return [JobStoreError(describe_error(error))] * len(submissions)
        job_ids = [make_job_id(call_id, index) for index in range(len(submissions))]
        jobs = [
            _accepted(job_id, self._model_name, submission, accepted_at)
            for job_id, submission in zip(job_ids, submissions, strict=True)
        ]
        try:
            await self._ledger.record(call_id, jobs)
        except JobStoreError:
            # They are accepted: Modal has the call. Only until they end, less can be told of them.
            logger.exception("What the jobs of call %s ask for could not be noted", call_id)
        return job_ids


class CallJobs:
    """Tells what became of jobs, and cancels them, whichever process accepted them."""

    def __init__(self, calls: Calls, ledger: CallLedger, *, clock: Callable[[], float] = time.time) -> None:
        self._calls = calls
        self._ledger = ledger
        self._clock = clock

    async def job(self, job_id: str, wait_s: float = 0.0) -> Job | None:
        """The job as it is now, or once its call returns within `wait_s` seconds; None if there is none.

        Modal does not say when a call begins: until it returns, its jobs are ``queued``. Raises `JobStoreError`.
        """
        place = parse_job_id(job_id)
        if place is None:
            return None
        call_id, index = place
        if wait_s > 0 and await self._ledger.is_cancelled(call_id, index):
            wait_s = 0.0  # it has ended, though its call goes on
        try:
            result = await self._calls.result(call_id, wait_s)
        except ServiceError as error:
            raise JobStoreError(describe_error(error)) from error
        if result.state is CallState.RETURNED:
            return _job_at(result.outcomes, index)
        noted = await self._ledger.jobs(call_id)
        if result.state is CallState.UNKNOWN or (noted is not None and index >= len(noted)):
            return None
        job = _unknown(job_id) if noted is None else noted[index]
        if await self._ledger.is_cancelled(call_id, index):
            return replace(job, status=JobStatus.CANCELLED)
        return replace(job, status=_STATUS_OF.get(result.state, JobStatus.QUEUED), error=result.error)

    async def cancel(self, job_id: str) -> Job | None:
        """Cancel a job that has not ended; returns the job as it then is, or None if there is none.

        Others of its call go on; a call of which all jobs are cancelled is ended. Raises `JobStoreError`.
        """
        job, place = await self.job(job_id), parse_job_id(job_id)
        if job is None or place is None or job.status.has_ended:
            return job
        call_id, index = place
        if not await self._ledger.cancel(call_id, index):
            return await self.job(job_id)
        noted = await self._ledger.jobs(call_id)
        if noted is not None and len(await self._ledger.cancelled(call_id, len(noted))) == len(noted):
            try:
                await self._calls.cancel(call_id)
            except ServiceError:
                logger.exception("Call %s could not be ended; its container will find its jobs cancelled", call_id)
        return replace(job, status=JobStatus.CANCELLED, finished_at=self._clock())


def _submission(request: AsyncInputModel, priority: Priority) -> _Submission:
    return _Submission(request.model_dump(mode="json", by_alias=True, round_trip=True), priority)


def _accepted(job_id: str, model_name: str, submission: _Submission, accepted_at: float) -> Job:
    entry = submission.entry
    return Job(
        job_id=job_id,
        model_name=model_name,
        message_json=json_text(entry["message"]),
        success_queue=entry["success_queue"],
        failure_queue=entry["failure_queue"],
        meta_json=json_text(entry["meta"]),
        priority=submission.priority,
        created_at=accepted_at,
        expires_at=None if entry["expires_in"] is None else accepted_at + entry["expires_in"],
        idempotency_key=entry["idempotency_key"],
    )


def _job_at(outcomes: Sequence[Mapping[str, Any]], index: int) -> Job | None:
    """The job at a place in what a call returned, which may be a call of anything."""
    try:
        return read_job(outcomes[index])
    except (LookupError, TypeError, ValueError):
        return None


def _unknown(job_id: str) -> Job:
    """A job of which no more is known than that its call is there."""
    return Job(
        job_id=job_id,
        model_name="",
        message_json="{}",
        success_queue=None,
        failure_queue=None,
        meta_json="{}",
        priority=Priority.BULK,
        created_at=0.0,
    )
