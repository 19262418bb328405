"""How a job is written in a row of the SQLite database, and read from it."""

import sqlite3
from collections.abc import Sequence
from contextlib import closing
from typing import Any

from modalkit.batching import Priority
from modalkit.service.jobs.model import DeliveryStatus, Job, JobCounts, JobFilter, JobStatus

NEW_JOB_COLUMNS = (
    *("job_id", "model_name", "status", "message", "success_queue", "failure_queue", "meta", "priority", "created_at"),
    *("expires_at", "idempotency_key", "owner", "traceparent", "batch_id", "line", "delivery", "started_at"),
)
COLUMNS = (
    *NEW_JOB_COLUMNS,
    *("result", "error", "finished_at", "crashes", "attempts", "retry_at"),
    *("delivery_attempts", "delivery_error", "delivery_crashes"),
)
LATEST_US = 2**62
ROWS_PER_READ = 20_000
"""Jobs that are looked at for a page without a pause: other reads have their turn before the next ones."""
TEXT_COLUMNS = ("job_id", "message", "success_queue", "failure_queue", "meta", "idempotency_key", "result")
"""The columns that may be long, besides the errors."""
READ_COLUMNS = ", ".join(COLUMNS)
PAGE_COLUMNS = READ_COLUMNS.replace(" message,", " '{}',", 1)
"""The same for a page of jobs, which tells no messages: they may be large, and are not read."""
SHORT_COLUMNS = PAGE_COLUMNS.replace(" meta,", " '{}',", 1)
"""The same without what else a caller may have made large."""

# Looked up, because to call an enumeration takes several times as long.
_PRIORITIES = {priority.value: priority for priority in Priority}
_STATUSES = {status.value: status for status in JobStatus}
_DELIVERIES = {delivery.value: delivery for delivery in DeliveryStatus}


def microseconds(seconds: float) -> int:
    """A time as it is stored: whole microseconds, `LATEST_US` at most."""
    return round(min(seconds * 1_000_000, LATEST_US))


def row_from_job(job: Job) -> tuple[Any, ...]:
    """The values of `NEW_JOB_COLUMNS` of a new job."""
    return (
        job.job_id,
        job.model_name,
        str(job.status),
        job.message_json,
        job.success_queue,
        job.failure_queue,
        job.meta_json,
        str(job.priority),
        microseconds(job.created_at),
        None if job.expires_at is None else microseconds(job.expires_at),
        job.idempotency_key,
        job.owner,
        job.traceparent,
        job.batch_id,
        job.line,
        str(DeliveryStatus.NONE),
        None if job.started_at is None else microseconds(job.started_at),
    )


def job_from_row(row: Sequence[Any]) -> Job:
    """The job of a row of all `COLUMNS`."""
    job_id, model_name, status, message, success_queue, failure_queue, meta, priority, created_us, *others = row
    expires_us, idempotency_key, owner, traceparent, batch_id, line, delivery, started_us, *ended = others
    result, error, finished_us, crashes, attempts, retry_us, delivery_attempts, delivery_error, delivery_crashes = ended
    return Job(
        job_id=job_id,
        model_name=model_name,
        message_json=message,
        success_queue=success_queue,
        failure_queue=failure_queue,
        meta_json=meta,
        priority=_PRIORITIES[priority],
        created_at=created_us / 1_000_000,
        expires_at=_seconds(expires_us),
        idempotency_key=idempotency_key,
        owner=owner,
        traceparent=traceparent,
        batch_id=batch_id,
        line=line,
        status=_STATUSES[status],
        delivery=_DELIVERIES[delivery],
        result_json=result,
        error=error,
        started_at=_seconds(started_us),
        finished_at=_seconds(finished_us),
        crashes=crashes,
        attempts=attempts,
        retry_at=_seconds(retry_us),
        delivery_attempts=delivery_attempts,
        delivery_error=delivery_error,
        delivery_crashes=delivery_crashes,
    )


def _seconds(microseconds: int | None) -> float | None:
    return None if microseconds is None else microseconds / 1_000_000


NEXT_OLDEST = """
    SELECT model_name, priority, owner, created_at FROM jobs
    WHERE status = 'queued' AND crashes = 0 AND retry_at IS NULL AND (model_name, priority, owner) > (?, ?, ?)
    ORDER BY model_name, priority, owner, seq LIMIT 1
"""
"""The oldest claimable job of the next model, priority and owner after these."""

SELECT = f"SELECT {READ_COLUMNS} FROM jobs"  # noqa: S608  # names of our own, no input


def find_job(database: sqlite3.Connection, job_id: str) -> Job | None:
    """The job of this id, or None if there is none (any more)."""
    row = database.execute(f"{SELECT} WHERE job_id = ?", (job_id,)).fetchone()
    return None if row is None else job_from_row(row)


def part_of_page(
    database: sqlite3.Connection, limit: int, which: JobFilter, before: int | None, room_bytes: int
) -> tuple[list[tuple[int, Job]], int | None]:
    """Up to `limit` jobs that match `which`, each with its `seq`, the newest first, and where the next part begins.

    They are among the `ROWS_PER_READ` jobs whose `seq` is below `before`, None for the newest ones; jobs of a batch are
    among all. Their messages are not read: `message_json` is an empty object. The part ends with the first job for
    which there is no room. None for the next part says that no jobs are left.
    """
    condition, values = condition_of(which)
    end: int = 1 + database.execute("SELECT coalesce(max(seq), 0) FROM jobs").fetchone()[0]
    before = end if before is None else min(before, end)
    first = 0 if which.batch_id is not None else max(0, before - ROWS_PER_READ)
    rows = database.execute(
        f"SELECT seq, {PAGE_COLUMNS} FROM jobs WHERE {condition} AND seq < ? AND seq >= ? ORDER BY seq DESC LIMIT ?",  # noqa: S608  # values are bound
        (*values, before, first, limit),
    )
    part = list[tuple[int, Job]]()
    with closing(rows):  # read one by one
        for sequence, *row in rows:
            job = job_from_row(row)
            part.append((sequence, job))
            room_bytes -= job.size_bytes
            if room_bytes < 0:
                return part, sequence
    # Of most sequence numbers the jobs have been removed.
    (next_before,) = database.execute("SELECT max(seq) + 1 FROM jobs WHERE seq < ?", (first,)).fetchone()
    return part, next_before


def condition_of(which: JobFilter) -> tuple[str, list[Any]]:
    """The SQL condition that selects these jobs, and the values of its question marks."""
    # States are written out as equations, so that SQLite finds the partial index for them; they need no escaping.
    conditions, values = ["true"], list[Any]()
    for column, names in (("status", which.statuses), ("delivery", which.deliveries)):
        if names:
            conditions.append(f"({' OR '.join(f'{column} = {name.value!r}' for name in names)})")
    if which.model_name is not None:
        conditions.append("model_name = ?")
        values.append(which.model_name)
    if which.ended_before is not None:
        conditions.append("finished_at < ?")
        values.append(microseconds(which.ended_before))
    if which.owner is not None:
        # The first part, so that SQLite finds the partial index, which has no jobs without an owner.
        conditions.append("owner <> '' AND owner = ?" if which.owner else "owner = ?")
        values.append(which.owner)
    if which.batch_id is not None:
        conditions.append("batch_id = ?")
        values.append(which.batch_id)
    return " AND ".join(conditions), values


COUNTED: dict[str, JobStatus | DeliveryStatus] = {
    **{status.value: status for status in JobStatus},
    **{f"delivery {delivery.value}": delivery for delivery in DeliveryStatus},
}
"""The names of the kinds of jobs in the table of counts."""


def counts_of_jobs(database: sqlite3.Connection) -> JobCounts:
    """How many jobs there are of each kind; takes the same time however many there are."""
    found = dict(database.execute("SELECT status, jobs FROM counts"))
    counts = {kind: found.get(key, 0) for key, kind in COUNTED.items()}
    return JobCounts(
        {status: counts[status] for status in JobStatus},
        {delivery: counts[delivery] for delivery in DeliveryStatus},
        _oldest_queued_at(database),
    )


def queued_by_model(database: sqlite3.Connection) -> dict[str, int]:
    """How many jobs of each model are queued, or wait for another attempt."""
    parts = ("crashes = 0 AND retry_at IS NULL", "retry_at IS NOT NULL", "crashes > 0 AND retry_at IS NULL")
    queued = " UNION ALL ".join(f"SELECT model_name FROM jobs WHERE status = 'queued' AND {part}" for part in parts)  # noqa: S608  # each part has an index
    return dict(database.execute(f"SELECT model_name, count(*) FROM ({queued}) GROUP BY model_name"))  # noqa: S608  # as above


def _oldest_queued_at(database: sqlite3.Connection) -> dict[str, float]:
    """When the first claimable job of each model was added: a step in the index for each model, priority and owner."""
    oldest_us = dict[str, int]()
    model = priority = owner = ""
    while row := database.execute(NEXT_OLDEST, (model, priority, owner)).fetchone():
        model, priority, owner, created_us = row
        oldest_us[model] = min(created_us, oldest_us.get(model, created_us))
    return {model: created_us / 1_000_000 for model, created_us in oldest_us.items()}
