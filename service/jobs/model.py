"""The values of jobs: a job as it is stored, how it ended, what is recorded of its delivery, and pages of jobs.

`life.py` says how one state of a job leads to the next. Only a runner changes these values: a new job that starts as it
is stored, and one that has ended. They are not frozen, because making a frozen one takes three times as long.
"""

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, cast

from pydantic import BaseModel
from pydantic_core import from_json, to_json

from modalkit.batching import Priority
from modalkit.pipelines import InferenceOutputModel
from modalkit.service.outputs import may_be_refused

JsonObject = dict[str, Any]

IDS_PER_READ = 4096


class JobStatus(StrEnum):
    """The states of a job."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"

    @property
    def has_ended(self) -> bool:
        """Whether the status is final."""
        return self not in (JobStatus.QUEUED, JobStatus.RUNNING)


class DeliveryStatus(StrEnum):
    """The states of the message that an ended job sends to the queue it named."""

    NONE = "none"
    """Nothing is to be sent: the job has not ended, was cancelled, or named no queue for this end."""
    PENDING = "pending"
    DELIVERED = "delivered"
    MEMORY = "memory"
    """In a queue of the service's own memory, which only code in its process can read, and which ends with it."""
    UNDELIVERED = "undelivered"
    """Given up after too many attempts; kept until it is replayed or purged."""


_VARIANT = {digit: "89ab"[int(digit, 16) % 4] for digit in "0123456789abcdef"}
_random_parts = list[str]()
os.register_at_fork(after_in_child=_random_parts.clear)


def new_job_id() -> str:
    """One of `new_job_ids`."""
    (job_id,) = new_job_ids(1)
    return job_id


def new_job_ids(count: int) -> list[str]:
    """New UUIDs of version 7 (RFC 9562).

    Their texts sort by the time they were made, so that a store writes jobs of the same time next to each other.
    """
    while len(_random_parts) < count:
        # Many at a time, because each call of the system releases the interpreter's lock, which takes long to get back.
        more = os.urandom(10 * IDS_PER_READ).hex()
        parts = (more[start : start + 20] for start in range(0, len(more), 20))
        # The version is 7. Of the digit that has the variant, two bits are random.
        _random_parts.extend(f"-7{part[:3]}-{_VARIANT[part[3]]}{part[4:7]}-{part[8:]}" for part in parts)
    time_ms = f"{time.time_ns() // 1_000_000:012x}"
    prefix = f"{time_ms[:8]}-{time_ms[8:]}"
    return [prefix + _random_parts.pop() for _ in range(count)]


def json_text(value: JsonObject) -> str:
    """A JSON object as text; NaN and Infinity are kept, as Python's JSON has them.

    Raises `ValueError` for what cannot be written, or cannot be read again: more than 200 levels, for example.
    """
    content = to_json(value)
    if may_be_refused(content):
        from_json(content)
    return content.decode()


def read_object(text: str) -> JsonObject:
    """A stored JSON object."""
    return cast("JsonObject", from_json(text))


@dataclass(slots=True)
class JobPiece:
    """A part of the result of a job that runs; it is not stored."""

    job_id: str
    output: InferenceOutputModel


@dataclass(slots=True, kw_only=True)
class JobRetry:
    """A running job, whose attempt failed with `error`, is to run again, not before `retry_at`."""

    job_id: str
    retry_at: float
    error: str


@dataclass(slots=True, kw_only=True)
class DeliveryRecord:
    """The result of attempt number `attempts` to deliver a job's message.

    With the status `pending` the attempt failed, and the next one is due at `due_at`. Raises `ValueError` for the
    status `none`.
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
    """A stored job as it was at one moment. Fields named `…_json` hold JSON objects as text.

    Times are wall-clock Unix seconds.
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
    owner: str = ""
    """The name of the API key that it was made with; empty where keys have no names."""
    traceparent: str | None = None
    """The trace of the request that asked for it, as W3C's header has it."""
    batch_id: str | None = None
    line: int | None = None
    """Its line in its batch of jobs."""
    status: JobStatus = JobStatus.QUEUED
    delivery: DeliveryStatus = DeliveryStatus.NONE
    result_json: str | None = None
    error: str | None = None
    started_at: float | None = None
    """When it was first claimed to be run; a job that runs again keeps it."""
    finished_at: float | None = None
    crashes: int = 0
    """How often the process died while this job was running, since a run of it last ended.

    A queued job with crashes is quarantined: it runs apart from other jobs.
    """
    attempts: int = 0
    """How many runs have ended; those that a crash cut short do not count."""
    retry_at: float | None = None
    """When this queued job may run again; `error` says why its last attempt failed."""
    delivery_attempts: int = 0
    delivery_error: str | None = None
    delivery_crashes: int = 0
    """How often the process died during the delivery, since an attempt last ended."""
    item: BaseModel | None = field(default=None, repr=False, compare=False)
    """The message as it was validated, where the job was not read from a store; it is not stored."""

    @property
    def message(self) -> JsonObject:
        """The item to run."""
        return read_object(self.message_json)

    @property
    def meta(self) -> JsonObject:
        """The caller's own values, which are sent back with the result."""
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
        """Bytes of UTF-8 of its longer texts."""
        size_bytes = 0
        for text in (self.message_json, self.meta_json, self.result_json, self.error, self.delivery_error):
            if text:
                size_bytes += len(text) if text.isascii() else len(text.encode())
        return size_bytes


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
    job: Job | None = None
    """The job, where its runner has it: its message can be sent without being read from the store again."""

    def __post_init__(self) -> None:
        if self.status not in (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.EXPIRED):
            raise ValueError(f"status must be succeeded, failed or expired, got {self.status!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class JobFilter:
    """Selects jobs: those that match every condition that is given; no condition selects all."""

    statuses: Sequence[JobStatus] = ()
    deliveries: Sequence[DeliveryStatus] = ()
    model_name: str | None = None
    ended_before: float | None = None
    owner: str | None = None
    batch_id: str | None = None


ALL_JOBS = JobFilter()


@dataclass(frozen=True, slots=True)
class JobPage:
    """Some of many jobs, the newest first."""

    jobs: Sequence[Job]
    next_cursor: int | None
    """Where the next page starts, or None when this was the last."""


@dataclass(frozen=True, slots=True)
class JobCounts:
    """How many jobs there are of each kind, zeros included."""

    statuses: Mapping[JobStatus, int]
    deliveries: Mapping[DeliveryStatus, int]
    oldest_queued_at: Mapping[str, float]
    """When the oldest job of each model was accepted of those that are queued and may run now."""


@dataclass(frozen=True, slots=True)
class JobBatchLines:
    """Where new jobs belong: their batch of jobs, and the line of each."""

    batch_id: str
    lines: Sequence[int]


@dataclass(frozen=True, slots=True)
class JobBatch:
    """The stored jobs of one batch of jobs, counted."""

    batch_id: str
    statuses: Mapping[JobStatus, int]
    """How many there are in each state, zeros included."""
    created_at: float
    """When the first of its jobs was accepted."""
    finished_at: float | None
    """When the last of its jobs ended; None while any has not."""
    jobs_per_s: float
    """How many of its jobs ended per second lately."""

    @property
    def jobs(self) -> int:
        """How many there are."""
        return sum(self.statuses.values())

    @property
    def active(self) -> int:
        """How many of its jobs have not ended."""
        return self.statuses[JobStatus.QUEUED] + self.statuses[JobStatus.RUNNING]

    @property
    def drain_s(self) -> float | None:
        """Seconds until all have ended, if they go on ending as lately; None where none has ended lately."""
        if not self.active:
            return 0.0
        return self.active / self.jobs_per_s if self.jobs_per_s else None


@dataclass(slots=True)
class JobBatchResult:
    """How one job of a batch of jobs ended."""

    line: int
    job_id: str
    status: JobStatus
    result_json: str | None
    error: str | None
    meta_json: str
    sequence: int
    """The job's number in the store; the order of jobs of the same line."""


@dataclass(frozen=True, slots=True)
class Recovery:
    """What `JobStore.recover` did with jobs and deliveries that were claimed when the last process died."""

    requeued: int
    """How many jobs are queued again, quarantined."""
    failed: Sequence[str]
    """The ids of jobs with which the process died too often."""
    undelivered: Sequence[str] = field(default_factory=list)
    """The ids of jobs with whose deliveries the process died too often."""
