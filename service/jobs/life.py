"""The life of a job: what a new one is, how it ends, what follows an attempt to deliver its message.

    queued ──► running ──► succeeded | failed | expired
      │  ▲        │
      │  └────────┤ after a crash, or to run again later
      └───────────┴──► cancelled            (queued ──► expired; failed, after too many crashes)

A job that ended without success may be queued once more, by hand.

Beside its status a job has a delivery: `none` until it ends with a message to send, then `pending`, and at last
`delivered` or `undelivered`; a replay makes an undelivered one pending again.

Pure functions of values, used by every engine: none reads a clock, none changes a job. Those that change its state
return a new job, or None where the job is in no state for that. Times are wall-clock Unix seconds. What a store changes
by itself is SQL (`sqlite_table.py`), and tested against functions like these.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from pydantic import BaseModel
from pydantic_core import to_json, to_jsonable_python

from modalkit.batching import DeadlineExceededError, Failure, Outcome, Priority
from modalkit.batching.errors import users_error
from modalkit.pipelines import AsyncInputModel, InferenceOutputModel
from modalkit.service.backoff import backoff_with_jitter
from modalkit.service.errors import OutputNotJsonError, RetryableError, ServiceError, describe_error
from modalkit.service.jobs.model import DeliveryRecord, DeliveryStatus, Job, JobEnd, JobRetry, JobStatus, json_text
from modalkit.service.outputs import may_be_refused, output_json, plain_value
from modalkit.service.queue_backends import NotSentError, UndeliverableError

LARGEST_RESULT_BYTES = 100 * 2**20
"""Bytes of UTF-8 that the JSON of a result may have."""

CRASHES_TOGETHER = 3
"""Crashes of the process after which a quarantined job runs alone; before, it runs in a group, then a smaller one."""
CRASHES_ALONE = 3
"""Crashes of the process while a quarantined job runs alone after which the job has failed."""
MAX_CRASHES = CRASHES_TOGETHER + CRASHES_ALONE
SMALLER_GROUP_DIVISOR = 8
NOT_SENT_PAUSE_S = 5.0
"""Seconds after which a message that was not sent, because its backend was busy, is due again."""
TOO_MANY_CRASHES = (
    f"the process died {CRASHES_ALONE} times while this job ran alone, so it is not run again; "
    "if something else stopped the process, submit the job once more"
)
TOO_MANY_DELIVERY_CRASHES = (
    f"the process died {CRASHES_ALONE} times while this message alone was being sent, so it is not sent again; "
    "replay it once the queue backend no longer ends the process"
)

_REQUEST_FIELDS = ("model_name", "message_json", "success_queue", "failure_queue", "meta_json", "batch_id")
_NAME_FIELDS = ("job_id", "model_name", "success_queue", "failure_queue", "idempotency_key")


class JobTimeoutError(ServiceError):
    """Raised for a job that runs longer than the timeout of its runner."""

    def __init__(self, timeout_s: float) -> None:
        super().__init__(f"the job did not finish within its timeout of {timeout_s:g} s (async_config.timeout)")
        self.timeout_s = timeout_s


class ResultTooLargeError(ServiceError):
    """Raised for a result that is too large to be stored."""

    def __init__(self, size_bytes: int) -> None:
        super().__init__(
            f"the result has {size_bytes} bytes, more than the {LARGEST_RESULT_BYTES} that are stored; have the "
            "pipeline store what is large elsewhere, and return where it is"
        )


# Beginning.


def new_job(
    request: AsyncInputModel,
    *,
    job_id: str,
    model_name: str,
    message: BaseModel | Mapping[str, Any],
    now: float,
    delivers: bool,
    priority: Priority = Priority.BULK,
    owner: str = "",
    traceparent: str | None = None,
    place: tuple[str, int] | None = None,
) -> Job:
    """A queued job that asks for what `request` asks for.

    A job with a `place`, its batch and its line there, has these two as its idempotency key, unless it has its own.

    `message` is the request's message: a validated item or, where it is validated elsewhere, a JSON object. Without
    `delivers` the job names no queues. Raises `ValueError` for a name with unprintable characters, which not every
    store and queue can keep, and for what cannot be written as JSON or read from it.
    """
    job = Job(
        job_id=job_id,
        model_name=model_name,
        message_json=_message_json(message),
        success_queue=request.success_queue if delivers else None,
        failure_queue=request.failure_queue if delivers else None,
        meta_json=json_text(request.meta) if request.meta else "{}",
        priority=priority,
        created_at=now,
        expires_at=None if request.expires_in is None else now + request.expires_in,
        idempotency_key=request.idempotency_key,
        owner=owner,
        traceparent=traceparent,
    )
    if place is not None:
        job.batch_id, job.line = place
        job.idempotency_key = job.idempotency_key or f"{job.batch_id}:{job.line}"
    if f"{job_id}{model_name}{job.success_queue}{job.failure_queue}{job.idempotency_key}".isprintable():
        return job
    for field in _NAME_FIELDS:
        name = getattr(job, field) or ""
        if not name.isprintable():
            raise ValueError(f"{field} must not hold unprintable characters, got {name!r}; remove them")
    return job


def _message_json(message: BaseModel | Mapping[str, Any]) -> str:
    """A message as JSON; NaN and Infinity are kept, and arrays are lists.

    Raises `ValueError`, and what the model's own serializers raise.
    """
    if not isinstance(message, BaseModel):
        return json_text(to_jsonable_python(message, by_alias=True, round_trip=True))
    content = message.__pydantic_serializer__.to_json(message, by_alias=True, round_trip=True, fallback=plain_value)
    if b"null" in content or may_be_refused(content):  # null may stand for NaN here
        return json_text(message.model_dump(mode="json", by_alias=True, round_trip=True, fallback=plain_value))
    return content.decode()


def is_same_request(one: Job, other: Job) -> bool:
    """Whether two jobs ask for the same, so that one of them may be a repetition of the other.

    Priority and `expires_at` are not compared.
    """
    return all(getattr(one, name) == getattr(other, name) for name in _REQUEST_FIELDS)


def is_repetition(job: Job, earlier: Job, input_model: type[BaseModel]) -> bool:
    """Whether a new job asks for the same as an earlier one, whose message was valid by another `input_model`.

    The earlier message is compared as this model reads it: a field that was added since has its default there, too.
    """
    try:
        message = _message_json(input_model.model_validate_json(earlier.message_json))
    except BaseException as error:  # noqa: BLE001  # a user's own validators may raise anything
        users_error(error)
        return False
    return is_same_request(job, replace(earlier, message_json=message))


def request_digest(job: Job) -> str:
    """A text that is equal for two jobs where `is_same_request` holds, and differs for others."""
    return hashlib.sha256(to_json([getattr(job, name) for name in _REQUEST_FIELDS])).hexdigest()


# Running.


def start_job(job: Job, now: float) -> Job:
    """This queued job, running. A job that runs again keeps the time of its first start."""
    started_at = max(now, job.created_at) if job.started_at is None else job.started_at
    return replace(job, status=JobStatus.RUNNING, started_at=started_at)


def deadline_of(job: Job, *, timeout_s: float, now: float) -> float:
    """When the job expires unless it has ended: `timeout_s` after its first start, or at its own `expires_at`."""
    timeout_at = (now if job.started_at is None else job.started_at) + timeout_s
    return timeout_at if job.expires_at is None else min(timeout_at, job.expires_at)


def retry_of(
    job: Job,
    outcome: Outcome[InferenceOutputModel],
    *,
    max_attempts: int,
    deadline: float,
    now: float,
    backoff_s: Callable[[int], float],
) -> JobRetry | None:
    """When a running job is to run again, or None if `outcome` ends it.

    Only a failure that is not the job's fault is repeated: a systemic one, or one that the pipeline declares transient.
    It is not repeated after attempt number `max_attempts`, nor if the job would expire, at `deadline`, before the next
    attempt.
    """
    attempt = job.attempts + 1
    if not isinstance(outcome, Failure) or attempt >= max_attempts:
        return None
    if not (outcome.is_systemic or isinstance(outcome.error, RetryableError)):
        return None
    retry_at = now + backoff_s(attempt)
    if retry_at >= deadline:
        return None
    return JobRetry(job_id=job.job_id, retry_at=retry_at, error=describe_error(outcome.error))


# Ending.


def end_of(job: Job, outcome: Outcome[InferenceOutputModel], now: float) -> JobEnd:
    """How a job with this outcome ends.

    It has expired if the error is one of time (`JobTimeoutError`, `DeadlineExceededError`), and failed for any other
    error, for a result that is no JSON and for one of more than `LARGEST_RESULT_BYTES`.
    """
    result = _result_of(outcome)
    if isinstance(result, str):
        return JobEnd(job_id=job.job_id, status=JobStatus.SUCCEEDED, result_json=result, finished_at=now)
    if isinstance(result, JobTimeoutError | DeadlineExceededError):
        error = describe_error(result)
        if job.expires_at is not None and job.expires_at <= now:
            error = expires_in_passed(job.expires_at - job.created_at)
        return JobEnd(job_id=job.job_id, status=JobStatus.EXPIRED, error=error, finished_at=now)
    return JobEnd(job_id=job.job_id, status=JobStatus.FAILED, error=describe_error(result), finished_at=now)


def expires_in_passed(expires_in_s: float) -> str:
    """The error of a job that has not ended so many seconds after it was accepted, as it asked."""
    return f"the job did not end within its expires_in of {round(expires_in_s, 6):g} s"


def _result_of(outcome: Outcome[InferenceOutputModel]) -> str | Exception:
    """The result as JSON, or the error."""
    if isinstance(outcome, Failure):
        return outcome.error
    try:
        result = output_json(outcome.value)
    except OutputNotJsonError as error:
        return error
    return result.decode() if len(result) <= LARGEST_RESULT_BYTES else ResultTooLargeError(len(result))


def end_job(job: Job, end: JobEnd) -> Job | None:
    """This job, ended, with its delivery pending where it names a queue for such an end.

    Only a running job succeeds or fails; a queued one may expire too.
    """
    is_running = job.status is JobStatus.RUNNING
    if not (is_running or (job.status is JobStatus.QUEUED and end.status is JobStatus.EXPIRED)):
        return None
    queue = job.success_queue if end.status is JobStatus.SUCCEEDED else job.failure_queue
    return replace(
        job,
        status=end.status,
        result_json=end.result_json,
        error=end.error,
        finished_at=end.finished_at,
        attempts=job.attempts + is_running,
        retry_at=None,
        delivery=DeliveryStatus.PENDING if queue else DeliveryStatus.NONE,
    )


def cancel_job(job: Job, now: float) -> Job | None:
    """This queued or running job, cancelled. No message is sent for it."""
    if job.status.has_ended:
        return None
    return replace(job, status=JobStatus.CANCELLED, finished_at=now, retry_at=None)


# Crashes.


def quarantine_group_size(crashes: int, limit: int) -> int:
    """How many quarantined jobs run together, or are sent together, after so many crashes of the process with them.

    After the first crash `limit`, after the second an eighth of that, then one: so the one that kills the process is
    found in few crashes, and the others run soon.
    """
    if crashes >= CRASHES_TOGETHER:
        return 1
    return limit if crashes <= 1 else max(1, limit // SMALLER_GROUP_DIVISOR)


def has_crashed_too_often(crashes: int) -> bool:
    """Whether a job, or a delivery, with which the process died so often is not tried again."""
    return crashes >= MAX_CRASHES


# Delivery.


def after_delivery_attempt(
    job: Job,
    error: Exception | None,
    *,
    max_attempts: int,
    now: float,
    is_last: bool = False,
    backoff_s: Callable[[int], float] = backoff_with_jitter,
    delivered: DeliveryStatus = DeliveryStatus.DELIVERED,
) -> DeliveryRecord:
    """What the next attempt to deliver means: `delivered` without an `error`, else due again or undelivered.

    A message is undelivered if its error is an `UndeliverableError`, if this was attempt number `max_attempts`, or if
    the attempt `is_last` for another reason. After a `NotSentError` it was no attempt, and it is due again
    after `NOT_SENT_PAUSE_S`.
    """
    was_sent = not isinstance(error, NotSentError)
    attempts = job.delivery_attempts + was_sent
    if error is None:
        return DeliveryRecord(job_id=job.job_id, status=delivered, attempts=attempts)
    text = describe_error(error)
    if is_last or isinstance(error, UndeliverableError) or (was_sent and attempts >= max_attempts):
        return DeliveryRecord(job_id=job.job_id, status=DeliveryStatus.UNDELIVERED, attempts=attempts, error=text)
    due_at = now + (backoff_s(attempts) if was_sent else NOT_SENT_PAUSE_S)
    return DeliveryRecord(
        job_id=job.job_id, status=DeliveryStatus.PENDING, attempts=attempts, error=text, due_at=due_at
    )


def record_delivery(job: Job, record: DeliveryRecord) -> Job | None:
    """This job after an attempt to deliver its message. It leaves the quarantine, because the attempt has ended."""
    if job.delivery is not DeliveryStatus.PENDING:
        return None
    return replace(
        job,
        delivery=record.status,
        delivery_attempts=record.attempts,
        delivery_error=record.error,
        delivery_crashes=0,
    )
