"""How a job is written in a row of the SQLite database."""

from typing import Any

from pydantic_core import from_json, to_json

from batching import Priority
from service.jobs.model import DeliveryStatus, Job, JobStatus, JsonObject, NewJob

NEW_JOB_COLUMNS = (
    *("job_id", "model_name", "status", "message", "success_queue", "failure_queue", "meta", "priority", "created_at"),
    "delivery",
)
COLUMNS = (
    *NEW_JOB_COLUMNS,
    *("result", "error", "started_at", "finished_at", "delivery_attempts", "delivery_error"),
)
"""Named as the fields of `Job`."""


def json_text(value: JsonObject) -> str:
    """A JSON object as it is stored. Raises `ValueError` for what is none."""
    return to_json(value).decode()


def microseconds(seconds: float) -> int:
    """A time as it is stored: whole microseconds."""
    return round(seconds * 1_000_000)


def row_from_new_job(job: NewJob) -> tuple[Any, ...]:
    """The values of `NEW_JOB_COLUMNS`. Raises `ValueError` for a message or meta that is no JSON object."""
    return (
        job.job_id,
        job.model_name,
        JobStatus.QUEUED.value,
        json_text(job.message),
        job.success_queue,
        job.failure_queue,
        json_text(job.meta),
        job.priority.value,
        microseconds(job.created_at),
        DeliveryStatus.NONE.value,
    )


def job_from_row(row: tuple[Any, ...]) -> Job:
    """The job of a row of all `COLUMNS`."""
    values = dict(zip(COLUMNS, row, strict=True))
    for name in ("created_at", "started_at", "finished_at"):
        values[name] = None if values[name] is None else values[name] / 1_000_000
    for name in ("message", "meta", "result"):
        values[name] = None if values[name] is None else from_json(values[name])
    values["priority"] = Priority(values["priority"])
    values["status"] = JobStatus(values["status"])
    values["delivery"] = DeliveryStatus(values["delivery"])
    return Job(**values)
