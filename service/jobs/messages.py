"""The message that a finished job sends to its queue."""

from datetime import UTC, datetime
from typing import Any

from pydantic_core import to_json

from pipelines import AsyncInputModel, DelayedFailureOutputModel
from service.jobs.model import Job, JobStatus

MESSAGE_VERSION = 1


def utc_timestamp(unix_s: float) -> str:
    """Seconds since 1970 as ISO 8601 in UTC, as in ``2024-01-15T10:30:00.250000Z``."""
    return datetime.fromtimestamp(unix_s, UTC).isoformat().replace("+00:00", "Z")


def result_message(job: Job, sent_at: float) -> str:
    """The JSON text for the queue of a finished job; numbers that JSON does not have (NaN, Infinity) are null.

    A success carries the pipeline's output under ``result``; a failure carries ``error`` and the ``original_message``.
    Both carry ``version``, ``job_id`` (a message may be delivered twice: it tells them apart), ``status`` and the
    caller's ``meta`` with a ``timestamp`` added.
    """
    meta = {**job.meta, "timestamp": utc_timestamp(sent_at)}
    content: dict[str, Any] = {"version": MESSAGE_VERSION, "job_id": job.job_id}
    if job.status is JobStatus.SUCCEEDED:
        content |= {"status": "success", "result": job.result, "meta": meta}
    else:
        failure = DelayedFailureOutputModel(
            status="error",
            error=job.error,
            meta=meta,
            original_message=AsyncInputModel(
                message=job.message, success_queue=job.success_queue, failure_queue=job.failure_queue, meta=job.meta
            ),
        )
        content |= failure.model_dump(mode="json")
    return to_json(content, inf_nan_mode="null").decode()
