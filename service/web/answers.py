"""What the routes answer with, apart from the outputs of models."""

from datetime import datetime
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from batching import Priority
from service.jobs import DeliveryStatus, JobStatus

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
    """A job as its caller sees it, made from a stored one by its attributes."""

    model_config = ConfigDict(from_attributes=True)

    job_id: str
    model_name: str
    status: JobStatus
    result: dict[str, Any] | None = Field(description="The model's output, once the job has succeeded.")
    error: str | None = Field(description="Why the job failed or expired.")
    meta: dict[str, Any] = Field(description="As it was given.")
    priority: Priority = Field(description="The class that it runs in.")
    delivery: DeliveryStatus = Field(description="What became of the message to the queue that the job named.")
    delivery_attempts: int
    delivery_error: str | None
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
