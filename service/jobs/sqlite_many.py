"""Changes of many jobs, which a condition selects: some of them in each call, so that others come in between.

They are parts of a transaction. Counts are those of the table, and are changed with it.
"""

import sqlite3
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from typing import Any

from pydantic_core import from_json, to_json

from modalkit.service.jobs import sqlite_statements as sql
from modalkit.service.jobs.model import DeliveryStatus, Job, JobFilter, JobStatus
from modalkit.service.jobs.sqlite_rows import PAGE_COLUMNS, ROWS_PER_READ, condition_of, job_from_row, microseconds

Counts = Counter[JobStatus | DeliveryStatus]

ROWS_PER_STEP = 1000
BYTES_PER_STEP = 8 * 2**20
"""Bytes of the jobs that are changed in one step, unless one has more. Of each job, SQLite writes everything once more,
also a message that stays as it is.
"""
PARTS_PER_STEP = 4
"""Parts of documents, mostly of a MiB, that are removed in one step, which may write all their pages."""
MAX_SEQUENCE = 2**63 - 1


def rows_of_step(database: sqlite3.Connection, columns: str, chosen: str, values: Sequence[object]) -> list[list[Any]]:
    """These columns of the chosen jobs, by their sequence numbers: of as many as one step may change."""
    some, left_bytes = list[list[Any]](), BYTES_PER_STEP
    with closing(database.execute(sql.SIZES.format(columns=columns, chosen=chosen), values)) as rows:
        for size_bytes, *row in rows:  # one by one, because the sizes of large ones take long to read
            some.append(row)
            left_bytes -= size_bytes
            if left_bytes <= 0:
                break
    return some


def cancel_some(
    database: sqlite3.Connection, counts: Counts, which: str, values: Sequence[object], now: float
) -> list[Job]:
    """Cancel queued and running jobs that match the condition; returns them as before, without their messages."""
    chosen = f"SELECT seq FROM jobs WHERE status IN ('queued', 'running') AND {which} LIMIT ?"  # noqa: S608  # names of our own; values are bound
    jobs = list(map(job_from_row, rows_of_step(database, PAGE_COLUMNS, chosen, (*values, ROWS_PER_STEP))))
    database.execute(sql.CANCEL, (microseconds(now), to_json([job.job_id for job in jobs]).decode()))
    counts.subtract(Counter(job.status for job in jobs))
    counts[JobStatus.CANCELLED] += len(jobs)
    return jobs


def retry_some(
    database: sqlite3.Connection, counts: Counts, which: str, values: Sequence[object], now: float
) -> list[tuple[int, str]]:
    """Queue ended jobs that match the condition `which` once more, as if they were new, unless their message is due.

    They have as long as at first until they expire. Returns the sequence number and the id of each.
    """
    chosen = f"SELECT seq FROM jobs WHERE {sql.RETRYABLE} AND {which} ORDER BY seq LIMIT ?"  # noqa: S608  # as above
    rows = rows_of_step(database, "seq, job_id, status, delivery", chosen, (*values, ROWS_PER_STEP))
    database.execute(sql.RETRY, (microseconds(now), to_json([row[0] for row in rows]).decode()))
    for _, _, status, delivery in rows:
        counts.subtract((JobStatus(status), DeliveryStatus(delivery)))
        counts.update((JobStatus.QUEUED, DeliveryStatus.NONE))
    return [(sequence, job_id) for sequence, job_id, _, _ in rows]


def replay_some(
    database: sqlite3.Connection, counts: Counts, which: str, values: Sequence[object], now: float
) -> list[tuple[int, str]]:
    """Make undelivered deliveries due that match the condition `which`; returns sequence numbers and ids."""
    chosen = sql.UNDELIVERED.format(which=which)
    rows = rows_of_step(database, "seq, job_id", chosen, (*values, ROWS_PER_STEP))
    database.execute(sql.REPLAY, (microseconds(now), to_json([sequence for sequence, _ in rows]).decode()))
    counts[DeliveryStatus.UNDELIVERED] -= len(rows)
    counts[DeliveryStatus.PENDING] += len(rows)
    return [(sequence, job_id) for sequence, job_id in rows]


def find_purgeable(database: sqlite3.Connection, which: JobFilter, first: int) -> tuple[list[int], int | None]:
    """Sequence numbers of jobs to `purge` that match `which`, and where the next search begins.

    They are among the `ROWS_PER_READ` jobs whose `seq` is at least `first`; jobs of a batch are among all. None for the
    next search says that no jobs are left.
    """
    condition, values = condition_of(which)
    end = MAX_SEQUENCE if which.batch_id is not None else first + ROWS_PER_READ
    chosen = f"SELECT seq FROM jobs WHERE {sql.PURGEABLE} AND {condition} AND seq >= ? AND seq < ?"  # noqa: S608  # as above
    (text,) = database.execute(f"SELECT json_group_array(seq) FROM ({chosen})", (*values, first, end)).fetchone()  # noqa: S608  # as above
    (next_first,) = database.execute("SELECT min(seq) FROM jobs WHERE seq >= ?", (end,)).fetchone()
    return list(from_json(text)), next_first


def purge(
    database: sqlite3.Connection, counts: Counts, sequences: Sequence[int], which: str, values: Sequence[object]
) -> int:
    """Remove those of these jobs that have ended, are not about to be delivered and match `which`; returns how many."""
    return _remove(database, counts, sql.PURGE.format(which=which), [to_json(sequences).decode(), *values])


def remove_old(database: sqlite3.Connection, counts: Counts, before: float) -> int:
    """Remove jobs that ended before that time and have nothing left to deliver; returns how many."""
    return _remove(database, counts, sql.REMOVE, [microseconds(before), ROWS_PER_STEP])


def _remove(database: sqlite3.Connection, counts: Counts, statement: str, values: Sequence[object]) -> int:
    removed = database.execute(statement, values).fetchall()
    for status, delivery in removed:
        counts.subtract((JobStatus(status), DeliveryStatus(delivery)))
    return len(removed)


# Documents: files of clients of other servers, in parts.


def put_document(
    database: sqlite3.Connection, document_id: str, part: int, owner: str, content: bytes, now: float
) -> None:
    """Store a part of a document; one that is there gets the content, and keeps its owner and its age."""
    database.execute(
        "INSERT INTO documents VALUES (?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET content = excluded.content",
        (document_id, part, owner, microseconds(now), content),
    )


def remove_parts(database: sqlite3.Connection, which: str, values: Sequence[object]) -> int:
    """Remove some parts of the documents that match the condition `which`, their first ones first; returns how many."""
    chosen = f"SELECT document_id, part FROM documents WHERE {which} ORDER BY part LIMIT ?"  # noqa: S608  # as above
    removal = f"DELETE FROM documents WHERE (document_id, part) IN ({chosen})"  # noqa: S608  # as above
    return database.execute(removal, (*values, PARTS_PER_STEP)).rowcount


def document_part(database: sqlite3.Connection, document_id: str, part: int, owner: str | None) -> bytes | None:
    """A part of a document of an owner, or of any; None where there is none."""
    which = "true" if owner is None else "owner = ?"
    row = database.execute(
        f"SELECT content FROM documents WHERE document_id = ? AND part = ? AND {which}",  # noqa: S608  # as above
        [document_id, part, *([] if owner is None else [owner])],
    ).fetchone()
    return None if row is None else row[0]


def documents_bytes(database: sqlite3.Connection) -> int:
    """The bytes of all documents."""
    row = database.execute("SELECT coalesce(sum(length(content)), 0) FROM documents").fetchone()
    return int(row[0])


def document_ids(database: sqlite3.Connection, prefix: str, owner: str | None) -> list[str]:
    """The ids of all documents with this beginning of an owner, or of all, the newest first."""
    which = "true" if owner is None else "owner = ?"
    rows = database.execute(
        f"SELECT document_id FROM documents WHERE part = 0 AND substr(document_id, 1, ?) = ? AND {which} "  # noqa: S608  # as above
        "ORDER BY created_at DESC, document_id DESC",
        [len(prefix), prefix, *([] if owner is None else [owner])],
    )
    return [document_id for (document_id,) in rows]
