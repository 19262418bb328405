"""What the routes answer with, apart from the outputs of models."""

from datetime import UTC, datetime
from typing import Any, Self

from pydantic import BaseModel, Field

from service.jobs import DeliveryStatus, Job, JobStatus

JSON = "application/json"
PROBLEM_JSON = "application/problem+json"


class FieldError(BaseModel):
    """One thing that is wrong with a request."""

    field: str = Field(description="The path of the field, as in message.text; empty for the whole.")
    message: str = Field(description="What is wrong with it, and what to do.")
    value: Any = Field(default=None, description="The value, or its beginning.")


class Problem(BaseModel):
    """Problem details (RFC 9457)."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    errors: list[FieldError] = Field(default=[], description="Where a request is invalid.")


class JobView(BaseModel):
    """A job as its caller sees it."""

    job_id: str
    model_name: str
    status: JobStatus
    result: dict[str, Any] | None = Field(description="The model's output, once the job has succeeded.")
    error: str | None = Field(description="Why the job failed or expired.")
    meta: dict[str, Any] = Field(description="As it was given.")
    delivery: DeliveryStatus = Field(description="What became of the message to the queue that the job named.")
    delivery_attempts: int
    delivery_error: str | None
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None

    @classmethod
    def of(cls, job: Job) -> Self:
        """The view of a stored job."""
        return cls(
            job_id=job.job_id,
            model_name=job.model_name,
            status=job.status,
            result=job.result,
            error=job.error,
            meta=job.meta,
            delivery=job.delivery,
            delivery_attempts=job.delivery_attempts,
            delivery_error=job.delivery_error,
            created_at=datetime.fromtimestamp(job.created_at, UTC),
            started_at=None if job.started_at is None else datetime.fromtimestamp(job.started_at, UTC),
            finished_at=None if job.finished_at is None else datetime.fromtimestamp(job.finished_at, UTC),
        )
