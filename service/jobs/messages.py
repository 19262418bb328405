"""The message that an ended job sends to its queue."""

from datetime import UTC, datetime

from pydantic_core import to_json

from modalkit.service.jobs.model import Job, JobStatus

MESSAGE_VERSION = 1


def utc_timestamp(unix_s: float) -> str:
    """Seconds since 1970 as ISO 8601 in UTC, as in ``2024-01-15T10:30:00.250000Z``."""
    return datetime.fromtimestamp(unix_s, UTC).isoformat().replace("+00:00", "Z")


def result_message(job: Job, timestamp: str, traceparent: str | None = None) -> str:
    """The message of an ended job, as JSON; numbers that JSON does not have (NaN, Infinity) are null.

    A success carries the pipeline's output under ``result``; a failure carries ``error`` and the ``original_message``,
    in the form of a `DelayedFailureOutputModel`. Both carry ``version``, ``job_id`` (by which a receiver recognises a
    message that is delivered twice), ``status`` and the caller's ``meta`` with the ``timestamp`` added. A
    ``traceparent``, where there is one, names the trace.
    """
    head = f'"version":{MESSAGE_VERSION},"job_id":{_json(job.job_id)}'
    if traceparent is not None:
        head += f',"traceparent":{_json(traceparent)}'
    if job.status is JobStatus.SUCCEEDED:
        # Joined from the stored JSON texts: to parse and write them again would take five times as long.
        return f'{{{head},"status":"success","result":{job.result_json},"meta":{_meta_with(job, timestamp)}}}'
    original = {
        "message": job.message,
        "success_queue": job.success_queue,
        "failure_queue": job.failure_queue,
        "meta": job.meta,
        "idempotency_key": job.idempotency_key,
        "expires_in": None if job.expires_at is None else round(job.expires_at - job.created_at, 6),
    }
    error = f'"status":"error","error":{_json(job.error)},"original_message":{_json(original)}'
    return f'{{{head},{error},"meta":{_meta_with(job, timestamp)}}}'


def _meta_with(job: Job, timestamp: str) -> str:
    text = job.meta_json
    if text == "{}":
        return f'{{"timestamp":"{timestamp}"}}'
    if any(part in text for part in ('"timestamp"', "NaN", "Infinity")):
        return _json({**job.meta, "timestamp": timestamp})
    return f'{text[:-1]},"timestamp":"{timestamp}"}}'


def _json(value: object) -> str:
    return to_json(value, inf_nan_mode="null").decode()
