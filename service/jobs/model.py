"""A job and its life: the states, and the only ways from one to the next.

    queued ──► running ──► succeeded | failed | expired
      │  ▲        │
      │  └────────┤ after a crash
      └───────────┴──► cancelled            (queued ──► expired as well)

Beside its status a job has a delivery: `none` until it ends with a message to send, then `pending`, and at last
`delivered` or `undelivered`. Everything here is a pure function of values; the stores keep the values.
"""

from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from batching import Priority

JsonObject = dict[str, Any]


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
        """Whether the job has left this life for good."""
        return self not in (JobStatus.QUEUED, JobStatus.RUNNING)


class DeliveryStatus(StrEnum):
    """What became of the message that an ended job sends to the queue it named."""

    NONE = "none"
    """Nothing is to be sent: the job has not ended, was cancelled, or named no queue for this end."""
    PENDING = "pending"
    DELIVERED = "delivered"
    UNDELIVERED = "undelivered"
    """Given up after too many attempts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NewJob:
    """A job to be stored. `message` and `meta` are JSON objects, times are wall-clock Unix seconds.

    Raises `ValueError` for an id or a name that holds unprintable characters, which not every store and queue can keep.
    """

    job_id: str
    model_name: str
    message: JsonObject
    success_queue: str | None = None
    failure_queue: str | None = None
    meta: JsonObject = field(default_factory=dict)
    priority: Priority = Priority.BULK
    created_at: float

    def __post_init__(self) -> None:
        for name in ("job_id", "model_name", "success_queue", "failure_queue"):
            value = getattr(self, name)
            if value is not None and not value.isprintable():
                raise ValueError(f"{name} must not hold unprintable characters, got {value!r}; remove them")


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedJob:
    """How a job ended: `succeeded` with a `result` (a JSON object), `failed` or `expired` with an `error`.

    Raises `ValueError` for another status.
    """

    job_id: str
    status: JobStatus
    result: JsonObject | None = None
    error: str | None = None
    finished_at: float

    def __post_init__(self) -> None:
        if self.status not in (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.EXPIRED):
            raise ValueError(f"status must be succeeded, failed or expired, got {self.status!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class DeliveryRecord:
    """How far the delivery of a job's message has come; `attempts` counts all there have been so far.

    `pending` records a failed attempt that will be repeated. Raises `ValueError` for the status `none`.
    """

    job_id: str
    status: DeliveryStatus
    attempts: int
    error: str | None = None

    def __post_init__(self) -> None:
        if self.status is DeliveryStatus.NONE:
            raise ValueError("status must be pending, delivered or undelivered, got 'none'")


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A stored job as it was at one moment. Its JSON objects belong to the store and must not be changed."""

    job_id: str
    model_name: str
    message: JsonObject
    success_queue: str | None
    failure_queue: str | None
    meta: JsonObject
    priority: Priority
    created_at: float
    status: JobStatus = JobStatus.QUEUED
    delivery: DeliveryStatus = DeliveryStatus.NONE
    result: JsonObject | None = None
    error: str | None = None
    started_at: float | None = None
    """When it was first taken to be run; a job that runs again after a crash keeps it."""
    finished_at: float | None = None
    delivery_attempts: int = 0
    delivery_error: str | None = None

    @property
    def delivery_queue(self) -> str | None:
        """The queue that the message of this ended job goes to, or None when there is nothing to send."""
        if self.status is JobStatus.SUCCEEDED:
            return self.success_queue or None
        if self.status in (JobStatus.FAILED, JobStatus.EXPIRED):
            return self.failure_queue or None
        return None

    def started(self, now: float) -> "Job":
        """This queued job, running."""
        return replace(self, status=JobStatus.RUNNING, started_at=now if self.started_at is None else self.started_at)

    def finished(self, outcome: FinishedJob) -> "Job | None":
        """This job, ended as `outcome` says and with its delivery pending, or None if it is in no state to end so."""
        may_end = self.status is JobStatus.RUNNING or (
            self.status is JobStatus.QUEUED and outcome.status is JobStatus.EXPIRED
        )
        if not may_end:
            return None
        ended = replace(
            self, status=outcome.status, result=outcome.result, error=outcome.error, finished_at=outcome.finished_at
        )
        return ended if ended.delivery_queue is None else replace(ended, delivery=DeliveryStatus.PENDING)

    def cancelled(self, now: float) -> "Job | None":
        """This job, cancelled, or None if it has ended already."""
        return None if self.status.has_ended else replace(self, status=JobStatus.CANCELLED, finished_at=now)


def new_job(given: NewJob) -> Job:
    """The job that a store keeps of what it was given: queued."""
    return Job(
        job_id=given.job_id,
        model_name=given.model_name,
        message=given.message,
        success_queue=given.success_queue,
        failure_queue=given.failure_queue,
        meta=given.meta,
        priority=given.priority,
        created_at=given.created_at,
    )
