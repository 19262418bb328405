"""A job and its life: the states, and the only ways from one to the next.

    queued ──► running ──► succeeded | failed | expired
      │  ▲        │
      │  └────────┤ after a crash, or to run again later
      └───────────┴──► cancelled            (queued ──► expired; failed, after too many crashes)

Beside its status a job has a delivery: `none` until it ends with a message to send, then `pending`, and at last
`delivered` or `undelivered`; from there it can be made pending again. Everything here is a pure function of values; the
stores keep the values. These are never changed, though nothing forbids it: to be frozen makes one of them three times
as slow to make, and there are several for each job.
"""

import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, cast

from pydantic_core import from_json, to_json

from modalkit.batching import Priority
from modalkit.service.errors import error_text

JsonObject = dict[str, Any]

PAGE_BYTES = 16 * 2**20
"""Most bytes of text in a page of jobs, unless one job alone has more."""

_VERSION_AND_VARIANT = 7 << 76 | 2 << 62
_RANDOM_BITS = ~(0xF << 76 | 0x3 << 62)


class JobStatus(StrEnum):
    """Where a job is in its life."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"

    @property
    def has_ended(self) -> bool:
        """Whether nothing changes its status any more."""
        return self not in (JobStatus.QUEUED, JobStatus.RUNNING)


class DeliveryStatus(StrEnum):
    """What became of the message that an ended job sends to the queue it named."""

    NONE = "none"
    """Nothing is to be sent: the job has not ended, was cancelled, or named no queue for this end."""
    PENDING = "pending"
    DELIVERED = "delivered"
    UNDELIVERED = "undelivered"
    """Given up after too many attempts; kept until it is replayed or purged."""


def new_job_id() -> str:
    """A UUID that no other job has, later ones greater (version 7 of RFC 9562).

    In the order of time, so that a store writes neighbours next to each other.
    """
    number = (time.time_ns() // 1_000_000) << 80 | int.from_bytes(os.urandom(10), "big")
    digits = f"{number & _RANDOM_BITS | _VERSION_AND_VARIANT:032x}"
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"


def json_text(value: JsonObject) -> str:
    """A JSON object as it is stored; keeps the NaN and Infinity that Python's JSON has. Raises `ValueError`."""
    return to_json(value).decode()


def read_object(text: str) -> JsonObject:
    """A stored JSON object; in place of one that readers refuse (an older version stored it), one that says so."""
    try:
        return cast("JsonObject", from_json(text))
    except ValueError as error:
        return {"unreadable": f"{len(text)} characters of JSON are stored that cannot be read: {error_text(error)}"}


def text_bytes(text: str | None) -> int:
    """How many bytes a text has in UTF-8."""
    if text is None or text.isascii():
        return len(text or "")
    return len(text.encode())


@dataclass(slots=True, kw_only=True)
class NewJob:
    """A job to be stored: JSON objects as text, times in wall-clock Unix seconds.

    `expires_at` is when it expires if it has not ended. Of jobs with the same `idempotency_key`, only the first is
    stored. Raises `ValueError` for an id or a name that holds unprintable characters, which not every store and queue
    can keep.
    """

    job_id: str
    model_name: str
    message_json: str
    success_queue: str | None = None
    failure_queue: str | None = None
    meta_json: str = "{}"
    priority: Priority = Priority.BULK
    created_at: float
    expires_at: float | None = None
    idempotency_key: str | None = None

    def __post_init__(self) -> None:
        names = (self.job_id, self.model_name, self.success_queue, self.failure_queue, self.idempotency_key)
        if not "".join(filter(None, names)).isprintable():
            for field in ("job_id", "model_name", "success_queue", "failure_queue", "idempotency_key"):
                value = getattr(self, field) or ""
                if not value.isprintable():
                    raise ValueError(f"{field} must not hold unprintable characters, got {value!r}; remove them")

    def asks_for_the_same(self, other: "NewJob | Job") -> bool:
        """Whether a repetition of the request for `other` would look like this."""
        return all(
            getattr(self, name) == getattr(other, name)
            for name in ("model_name", "message_json", "success_queue", "failure_queue", "meta_json")
        )


@dataclass(slots=True, kw_only=True)
class JobEnd:
    """How a job ended: `succeeded` with a result (a JSON object as text), `failed` or `expired` with an `error`.

    Raises `ValueError` for another status.
    """

    job_id: str
    status: JobStatus
    result_json: str | None = None
    error: str | None = None
    finished_at: float

    def __post_init__(self) -> None:
        if self.status not in (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.EXPIRED):
            raise ValueError(f"status must be succeeded, failed or expired, got {self.status!r}")


FinishedJob = JobEnd  # the old name, until every user of it has moved to `life.py`


@dataclass(slots=True, kw_only=True)
class JobRetry:
    """That a running job, whose attempt failed with `error`, is to be run again, and not before `retry_at`."""

    job_id: str
    retry_at: float
    error: str


@dataclass(slots=True, kw_only=True)
class DeliveryRecord:
    """How far the delivery of a job's message has come; `attempts` counts all there have been so far.

    `pending` records a failed attempt that is to be repeated at `due_at`. Raises `ValueError` for the status `none`.
    """

    job_id: str
    status: DeliveryStatus
    attempts: int
    error: str | None = None
    due_at: float = 0.0

    def __post_init__(self) -> None:
        if self.status is DeliveryStatus.NONE:
            raise ValueError("status must be pending, delivered or undelivered, got 'none'")


@dataclass(slots=True, kw_only=True)
class Job:
    """A stored job as it was at one moment. What is JSON is kept as text, and read when asked for."""

    job_id: str
    model_name: str
    message_json: str
    success_queue: str | None = None
    failure_queue: str | None = None
    meta_json: str = "{}"
    priority: Priority = Priority.BULK
    created_at: float
    expires_at: float | None = None
    idempotency_key: str | None = None
    status: JobStatus = JobStatus.QUEUED
    delivery: DeliveryStatus = DeliveryStatus.NONE
    result_json: str | None = None
    error: str | None = None
    started_at: float | None = None
    """When it was first taken to be run; a job that runs again after a crash keeps it."""
    finished_at: float | None = None
    crashes: int = 0
    """How often the process died while this job was running; 0 again once a run has shown that it kills none."""
    attempts: int = 0
    """How many runs have ended, whatever with; those that a crash cut short do not count."""
    retry_at: float | None = None
    """When this queued job may run again, while it waits for that; `error` says why its last attempt failed."""
    delivery_attempts: int = 0
    delivery_error: str | None = None
    delivery_crashes: int = 0
    """How often the process died during the delivery, since an attempt last ended."""

    @property
    def message(self) -> JsonObject:
        """The item that is run."""
        return read_object(self.message_json)

    @property
    def meta(self) -> JsonObject:
        """What the caller wants back with the result."""
        return read_object(self.meta_json)

    @property
    def result(self) -> JsonObject | None:
        """The pipeline's output, once the job has succeeded."""
        return None if self.result_json is None else read_object(self.result_json)

    @property
    def delivery_queue(self) -> str | None:
        """The queue that the message of this ended job goes to, or None when there is nothing to send."""
        if self.status is JobStatus.SUCCEEDED:
            return self.success_queue or None
        if self.status in (JobStatus.FAILED, JobStatus.EXPIRED):
            return self.failure_queue or None
        return None

    @property
    def size_bytes(self) -> int:
        """How many bytes its longer texts have."""
        texts = (self.message_json, self.meta_json, self.result_json, self.error, self.delivery_error)
        return sum(map(text_bytes, texts))

    def started(self, now: float) -> "Job":
        """This queued job, running; it was not started before it was created, whatever `now` says."""
        started_at = max(now, self.created_at) if self.started_at is None else self.started_at
        return replace(self, status=JobStatus.RUNNING, started_at=started_at)

    def finished(self, outcome: JobEnd) -> "Job | None":
        """This job, ended as `outcome` says and with its delivery pending, or None if it is in no state to end so."""
        may_end = self.status is JobStatus.RUNNING or (
            self.status is JobStatus.QUEUED and outcome.status is JobStatus.EXPIRED
        )
        if not may_end:
            return None
        queue = self.success_queue if outcome.status is JobStatus.SUCCEEDED else self.failure_queue
        return replace(
            self,
            status=outcome.status,
            result_json=outcome.result_json,
            error=outcome.error,
            finished_at=outcome.finished_at,
            attempts=self.attempts + (self.status is JobStatus.RUNNING),
            retry_at=None,
            delivery=DeliveryStatus.PENDING if queue else DeliveryStatus.NONE,
        )

    def cancelled(self, now: float) -> "Job | None":
        """This job, cancelled, or None if it has ended already."""
        if self.status.has_ended:
            return None
        return replace(self, status=JobStatus.CANCELLED, finished_at=now, retry_at=None)

    def deferred(self, retry: "JobRetry") -> "Job | None":
        """This running job, queued to run again later, or None if it is not running."""
        if self.status is not JobStatus.RUNNING:
            return None
        return replace(
            self,
            status=JobStatus.QUEUED,
            attempts=self.attempts + 1,
            retry_at=retry.retry_at,
            error=retry.error,
            crashes=0,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class JobFilter:
    """Which jobs are meant: those that every part that is given applies to; empty means any."""

    statuses: Sequence[JobStatus] = ()
    deliveries: Sequence[DeliveryStatus] = ()
    model_name: str | None = None
    ended_before: float | None = None

    def covers(self, job: Job) -> bool:
        """Whether the job is one of them."""
        return (
            (not self.statuses or job.status in self.statuses)
            and (not self.deliveries or job.delivery in self.deliveries)
            and self.model_name in (None, job.model_name)
            and (self.ended_before is None or (job.finished_at is not None and job.finished_at < self.ended_before))
        )


@dataclass(frozen=True, slots=True)
class JobPage:
    """Some of many jobs, the newest first."""

    jobs: Sequence[Job]
    next_cursor: int | None
    """Where the next page starts, or None when this was the last."""


def cut_page(jobs: Iterable[tuple[int, Job]], limit: int) -> JobPage:
    """The page of the first `limit` jobs, each with its place; of fewer, where these have `PAGE_BYTES` already."""
    page, last_place, size_bytes = list[Job](), 0, 0
    for place, job in jobs:
        size_bytes += job.size_bytes
        if page and (len(page) == limit or size_bytes > PAGE_BYTES):
            return JobPage(page, last_place)
        page.append(job)
        last_place = place
    return JobPage(page, None)


@dataclass(frozen=True, slots=True)
class Recovery:
    """What a store made of the jobs that nobody ran any more when it was opened."""

    requeued: int
    set_aside: Sequence[str]
    """Those that the process died with once too often, by their ids: they have failed."""
    undelivered: Sequence[str] = field(default_factory=list)
    """Those whose messages the process died with once too often, by their ids."""


def new_job(given: NewJob) -> Job:
    """The job that a store keeps of what it was given: queued."""
    return Job(
        job_id=given.job_id,
        model_name=given.model_name,
        message_json=given.message_json,
        success_queue=given.success_queue,
        failure_queue=given.failure_queue,
        meta_json=given.meta_json,
        priority=given.priority,
        created_at=given.created_at,
        expires_at=given.expires_at,
        idempotency_key=given.idempotency_key,
    )
