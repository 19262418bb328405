"""The answers of routes, except the outputs of models."""

from dataclasses import replace
from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from modalkit.batching import Priority
from modalkit.service.jobs import DeliveryStatus, Job, JobStatus
from modalkit.service.outputs import with_nulls

JSON = "application/json"
NDJSON = "application/x-ndjson"
EVENT_STREAM = "text/event-stream"
PROBLEM_JSON = "application/problem+json"


class FieldError(BaseModel):
    """One thing that is wrong with a request."""

    field: str = Field(description="The path of the field, as in message.text; empty for the whole.")
    message: str = Field(description="What is wrong with it, and what to do.")
    value: Any = Field(default=None, description="The value, or its beginning.")


class Problem(BaseModel):
    """Problem details (RFC 9457)."""

    type: str = Field(description="What kind of problem it is: a URI that docs/problems.md explains.")
    title: str
    status: int
    detail: str
    errors: list[FieldError] = Field(default=[], description="Where a request is invalid.")


PROBLEM_ANSWERS: dict[int | str, dict[str, Any]] = {
    "default": {
        "description": "Problem details (RFC 9457)",
        "content": {PROBLEM_JSON: {"schema": {"$ref": "#/components/schemas/Problem"}}},
    }
}
"""For OpenAPI: the answer of a route to a request that fails."""

JOB_LINKS = {
    operation: {"operationId": operation, "parameters": {"job_id": "$response.body#/job_id"}}
    for operation in ("get_job", "cancel_job", "replay_job")
}
"""For OpenAPI: what can be asked of a job that was accepted."""


class JobView(BaseModel):
    """A job as its caller sees it, validated from the attributes of a stored `Job`."""

    model_config = ConfigDict(from_attributes=True)

    job_id: str
    model_name: str
    status: JobStatus
    result: dict[str, Any] | None = Field(description="The model's output, once the job has succeeded.")
    error: str | None = Field(description="Why the job failed or expired, or why its last attempt failed.")
    meta: dict[str, Any] = Field(description="As it was given.")
    priority: Priority = Field(description="The lane that it runs in.")
    owner: str = Field(default="", description="The name of the API key that made it; empty where it has none.")
    batch_id: str | None = Field(default=None, description="The batch that it is a line of.")
    line: int | None = Field(default=None, description="Its line there.")
    delivery: DeliveryStatus = Field(
        description="What became of the message to the queue that the job named. `memory`: it is in the memory of the "
        "service, where only code in its process can read it."
    )
    delivery_attempts: int
    delivery_error: str | None = Field(description="Why the last attempt to deliver failed.")
    crashes: int = Field(
        description="How often the process died while the job was running; 0 again once it is known to be harmless."
    )
    attempts: int = Field(
        default=0, description="How many runs of the job have ended; those that a crash cut short do not count."
    )
    retry_at: datetime | None = Field(default=None, description="When the job may run again, while it waits for that.")
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    expires_at: datetime | None


class JobDetails(JobView):
    """A single job, with what was asked for."""

    message: Any
    success_queue: str | None
    failure_queue: str | None
    idempotency_key: str | None


def job_json(job: Job, view: type[JobView] = JobView) -> bytes:
    """What `view` shows of a job, in JSON. What is stored as JSON is copied, not read: it may be large."""
    content = view.model_validate(replace(job, message_json="null", meta_json="{}", result_json=None)).model_dump_json()
    # The last field first, so that what was put in is not searched.
    for empty, text in (('"message":null', job.message_json), ('"meta":{}', job.meta_json)):
        content = _put_in(content, empty, with_nulls(text.encode()).decode())
    return _put_in(content, '"result":null', job.result_json or "null").encode()


def _put_in(content: str, empty: str, value: str) -> str:
    """An object in JSON with `value` as that of the field whose empty one is `empty`, where it has that."""
    return content.replace(empty, f"{empty[: empty.index(':')]}:{value}", 1)


class JobPageView(BaseModel):
    """One page of jobs."""

    jobs: list[JobView] = Field(description="The newest first.")
    next_cursor: int | None = Field(description="The `cursor` of the next page; null when this is the last.")


class ModelView(BaseModel):
    """A model as an operator sees it."""

    name: str
    readiness: str = Field(description="`ready`, `loading`, `restarting`, `draining`, `broken` or `failed`.")
    problem: str | None = Field(description="Why it takes no requests, or should get none.")
    engine: str | None = Field(description="What computes it.")
    batch_config: dict[str, Any] | None = Field(description="The limits of its batches; null where it does not run.")


class Submitted(BaseModel):
    """The answer for one job of several: its id, or why it was refused."""

    job_id: str | None = None
    status: str | None = Field(default=None, description="`error` where the job was refused.")
    error: str | None = None


class FailedItem(BaseModel):
    """The answer for one item of several that has no result."""

    status: Literal["error"]
    error: str = Field(description="Why.")


class SubmittedLine(Submitted):
    """The answer for one line of a stream of jobs."""

    line: int = Field(description="The number of the line, from 1.")
    problem: Problem | None = Field(
        default=None, description="What a request with this line alone is answered with, where it was refused."
    )


class FailedSlot(BaseModel):
    """The answer for one item of a stream that failed."""

    status: Literal["error"]
    error: str
    problem: Problem = Field(description="What a request with this item alone is answered with.")


class BatchView(BaseModel):
    """The stored jobs of a batch of jobs, counted; validated from the attributes of a `JobBatch`."""

    model_config = ConfigDict(from_attributes=True)

    batch_id: str
    jobs: int = Field(description="How many are stored; more may be submitted.")
    statuses: dict[JobStatus, int] = Field(description="How many are in each state.")
    created_at: datetime = Field(description="When the first was accepted.")
    finished_at: datetime | None = Field(description="When the last ended; null while any has not.")
    jobs_per_s: float = Field(description="How many ended per second in the last 30 seconds.")
    drain_s: float | None = Field(
        description="Seconds until all have ended, at that rate; null where none has ended lately."
    )


class BatchLine(BaseModel):
    """How one job of a batch ended."""

    line: int = Field(description="Its line in the batch.")
    job_id: str
    status: JobStatus
    result: dict[str, Any] | None = Field(description="The model's output, once the job has succeeded.")
    error: str | None = Field(description="Why there is none.")
    meta: dict[str, Any] = Field(description="As it was given.")


class Cancelled(BaseModel):
    """How many jobs were cancelled."""

    cancelled: int


class Retried(BaseModel):
    """How many jobs run once more."""

    retried: int


class Replayed(BaseModel):
    """How many results are sent once more."""

    replayed: int


class Purged(BaseModel):
    """How many jobs were removed."""

    purged: int
