"""What is read of the jobs of one batch from a SQLite database.

Many rows are read as one value, for the reason that `JobTable` gives.
"""

import sqlite3
from collections.abc import Sequence
from typing import Any

from pydantic_core import from_json, to_json

from modalkit.service.jobs.model import JobBatch, JobBatchResult, JobStatus
from modalkit.service.jobs.sqlite_rows import microseconds

LATELY_S = 30.0
"""Seconds over which the rate of a batch is counted."""
RESULTS_PER_READ = 500
RESULT_BYTES_PER_READ = 2**20
"""Bytes of results that are read at once, unless one has more."""
ENDS_PER_READ = 20_000

_SIZE = " + ".join(f"coalesce(length(CAST({column} AS BLOB)), 0)" for column in ("result", "error", "meta"))
_RESULTS = f"""
    SELECT json_group_array(json_array(line, job_id, status, result, error, meta, seq)) FROM (
        SELECT *, row_number() OVER rows AS number, sum({_SIZE}) OVER rows AS size,
            sum(finished_at IS NULL) OVER rows AS unfinished
        FROM (SELECT * FROM jobs WHERE {{which}} LIMIT {RESULTS_PER_READ})
        WINDOW rows AS (ORDER BY {{order}} ROWS UNBOUNDED PRECEDING)
    ) WHERE (size <= {RESULT_BYTES_PER_READ} OR number = 1)
        AND (unfinished = 0 OR unfinished = 1 AND finished_at IS NULL)
"""  # noqa: S608  # names of our own, no input
"""The results of the jobs that match `which`, up to the first in the `order` that has not ended, which comes too."""


def _condition(batch_id: str, owner: str | None) -> tuple[str, list[Any]]:
    return ("batch_id = ?", [batch_id]) if owner is None else ("batch_id = ? AND owner = ?", [batch_id, owner])


def has_batch(database: sqlite3.Connection, batch_id: str, owner: str | None) -> bool:
    """Whether there is a job of this batch, of one owner or of all."""
    which, values = _condition(batch_id, owner)
    return bool(database.execute(f"SELECT EXISTS (SELECT 1 FROM jobs WHERE {which})", values).fetchone()[0])  # noqa: S608  # as above


def find_batch(database: sqlite3.Connection, batch_id: str, owner: str | None, now: float) -> JobBatch | None:
    """The batch of this id, with the jobs of one owner or of all; None where there is no job of it."""
    which, values = _condition(batch_id, owner)

    def one(statement: str, *more: Any) -> Any:
        return database.execute(statement.format(which=which), [*values, *more]).fetchone()[0]

    counted = dict(database.execute(f"SELECT status, count(*) FROM jobs WHERE {which} GROUP BY status", values))  # noqa: S608  # as above
    if not counted:
        return None
    statuses = {status: counted.get(status.value, 0) for status in JobStatus}
    created_us = one("SELECT created_at FROM jobs WHERE {which} ORDER BY line LIMIT 1")
    is_active = statuses[JobStatus.QUEUED] + statuses[JobStatus.RUNNING] > 0
    finished_us = None if is_active else one("SELECT max(finished_at) FROM jobs WHERE {which}")
    lately_s = min(LATELY_S, max(now - created_us / 1_000_000, 0.001))
    ended = one("SELECT count(*) FROM jobs WHERE {which} AND finished_at > ?", microseconds(now - lately_s))
    return JobBatch(
        batch_id,
        statuses,
        created_us / 1_000_000,
        None if finished_us is None else finished_us / 1_000_000,
        ended / lately_s,
    )


def results_in_order(
    database: sqlite3.Connection, batch_id: str, owner: str | None, line: int, sequence: int
) -> tuple[list[JobBatchResult], str | None]:
    """Some results, up to the first that has not ended, and the id of the job of that.

    They come in the order of `line` and `seq`, beginning after these two values: several jobs may have the same line.
    """
    which, values = _condition(batch_id, owner)
    which += " AND (line, seq) > (?, ?) ORDER BY line, seq"
    rows = _read(database, _RESULTS.format(which=which, order="line, seq"), [*values, line, sequence])
    if rows and not rows[-1].status.has_ended:
        return rows[:-1], rows[-1].job_id
    return rows, None


def ends_after(
    database: sqlite3.Connection, batch_id: str, owner: str | None, finished_us: int, sequence: int
) -> list[tuple[int, int]]:
    """When jobs of a batch ended, each with its `seq`, in this order, beginning after these two values."""
    which, values = _condition(batch_id, owner)
    (text,) = database.execute(
        f"""
        SELECT json_group_array(json_array(finished_at, seq)) FROM (
            SELECT finished_at, seq FROM jobs WHERE {which} AND finished_at >= ? AND (finished_at, seq) > (?, ?)
            ORDER BY finished_at, seq LIMIT {ENDS_PER_READ}
        )
        """,  # noqa: S608  # as above
        [*values, finished_us, finished_us, sequence],
    ).fetchone()
    return [(at, seq) for at, seq in from_json(text)]


def results_of(database: sqlite3.Connection, sequences: Sequence[int]) -> list[JobBatchResult]:
    """The results of some jobs that have ended: as many as fit into one read, beginning with the first."""
    statement = _RESULTS.format(which="seq IN (SELECT value FROM json_each(?)) ORDER BY seq", order="seq")
    return _read(database, statement, [to_json(sequences[:RESULTS_PER_READ]).decode()])


def _read(database: sqlite3.Connection, statement: str, values: list[Any]) -> list[JobBatchResult]:
    (text,) = database.execute(statement, values).fetchone()
    return [
        JobBatchResult(line, job_id, JobStatus(status), result, error, meta, sequence)
        for line, job_id, status, result, error, meta, sequence in from_json(text)
    ]
