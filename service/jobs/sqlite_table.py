"""The table of jobs in a SQLite database: what each operation of the store changes, inside a transaction."""

import sqlite3
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cache
from typing import Any, cast

from pydantic_core import from_json, to_json

from modalkit.batching import Priority
from modalkit.service.jobs import life
from modalkit.service.jobs import sqlite_statements as sql
from modalkit.service.jobs.errors import DuplicateJobError, IdempotencyKeyReusedError, JobStoreFullError
from modalkit.service.jobs.model import DeliveryRecord, DeliveryStatus, Job, JobEnd, JobRetry, JobStatus, Recovery
from modalkit.service.jobs.sqlite_many import ROWS_PER_STEP, rows_of_step
from modalkit.service.jobs.sqlite_rows import (
    COLUMNS,
    COUNTED,
    SELECT,
    SHORT_COLUMNS,
    find_job,
    job_from_row,
    microseconds,
    row_from_job,
)

Row = tuple[Any, ...]
QueuePlace = tuple[str, bool]
"""The last queue that was visited, and whether that was after the last name, from the first one on again."""

QUEUES_PER_STEP = 1000
OWNERS_PER_CLAIM = 1000
ROWS_OF_UNKNOWN_SIZE = 32
"""Rows that are read before it is known how large they are: to read the sizes of very many large ones takes seconds."""

_STATUS, _CREATED_AT, _STARTED_AT = map(COLUMNS.index, ("status", "created_at", "started_at"))
_ROWS_PER_STATEMENT = (1024, 256, 64, *range(32, 0, -1))  # few sizes, so that the statements stay prepared


class JobTable:
    """The table of jobs behind one connection, used by one thread at a time: the operations of a `JobStore`.

    Methods are called in a transaction, whose owner restores `counts` when it rolls back.

    Many rows are written by one statement and read as one value: the connection releases the interpreter's lock at each
    step of a statement, and waits for the event loop's thread each time before it goes on.
    """

    def __init__(self, database: sqlite3.Connection, max_jobs: int) -> None:
        self._database = database
        self._max_jobs = max_jobs
        self._last_queue = ""
        self._last_owners: dict[tuple[str, Priority], str] = {}  # whose turn was last in each model and priority
        self._has_owners = bool(database.execute("SELECT EXISTS (SELECT 1 FROM jobs WHERE owner <> '')").fetchone()[0])
        self.has_removed = False
        """Whether jobs were removed, so that there may be free pages; set to False by the owner of the transaction."""
        self.counts: Counter[JobStatus | DeliveryStatus] = Counter()
        for key, jobs in database.execute("SELECT status, jobs FROM counts"):
            self.counts[COUNTED[key]] = jobs

    def store_counts(self, before: Counter[JobStatus | DeliveryStatus]) -> None:
        """Write the counts that differ from those of `before`; there is at least one."""
        changed = [(key, self.counts[kind]) for key, kind in COUNTED.items() if self.counts[kind] != before[kind]]
        self._database.execute(
            f"INSERT OR REPLACE INTO counts (status, jobs) VALUES {', '.join(['(?, ?)'] * len(changed))}",  # noqa: S608  # as above
            [value for row in changed for value in row],
        )

    def add(self, jobs: Sequence[Job]) -> list[str | IdempotencyKeyReusedError]:
        """Store jobs, except those whose idempotency key is stored already."""
        keys = [(job.idempotency_key, job.owner) for job in jobs if job.idempotency_key is not None]
        if keys and (len(set(keys)) < len(keys) or self._are_known(keys)):
            return [self._add_with_key(job) for job in jobs]
        self._insert(jobs)
        return [job.job_id for job in jobs]

    def _are_known(self, keys: Sequence[tuple[str, str]]) -> bool:
        """Whether any of these idempotency keys, each with its owner, is stored."""
        return bool(self._database.execute(sql.KNOWN_KEYS, (_json(keys),)).fetchone()[0])

    def _add_with_key(self, job: Job) -> str | IdempotencyKeyReusedError:
        if job.idempotency_key is not None:
            key = (job.idempotency_key, job.owner)
            row = self._database.execute(f"{SELECT} WHERE idempotency_key = ? AND owner = ?", key).fetchone()
            if row is not None:
                earlier = job_from_row(row)
                if life.is_same_request(job, earlier):
                    return earlier.job_id
                return IdempotencyKeyReusedError(job.idempotency_key, earlier.job_id)
        self._insert([job])
        return job.job_id

    def _insert(self, jobs: Sequence[Job]) -> None:
        stored = sum(self.counts[status] for status in JobStatus)
        if stored + len(jobs) > self._max_jobs:
            raise JobStoreFullError(stored, len(jobs), self._max_jobs)
        try:
            inserted = self._write(sql.INSERT, [row_from_job(job) for job in jobs])
        except sqlite3.IntegrityError:
            self._database.execute("ROLLBACK TO operation")
            duplicate = jobs[0].job_id if len(jobs) == 1 else self._first_duplicate([job.job_id for job in jobs])
            raise DuplicateJobError(duplicate) from None
        self._has_owners = self._has_owners or any(job.owner for job in jobs)
        running = [job.status for job in jobs].count(JobStatus.RUNNING)  # to count by hashes of states takes longer
        self.counts[JobStatus.RUNNING] += running
        self.counts[JobStatus.QUEUED] += inserted - running
        self.counts[DeliveryStatus.NONE] += inserted

    def _first_duplicate(self, job_ids: Sequence[str]) -> str:
        """The first id that comes twice or is stored already."""
        twice = next((job_id for job_id, count in Counter(job_ids).items() if count > 1), None)
        return twice or next(job_id for job_id in job_ids if find_job(self._database, job_id) is not None)

    def claim(self, model_name: str, limit: int, now: float, *, bulk_limit: int = 0) -> list[Job]:
        """Make up to `limit` queued jobs of a model running, and return them.

        Quarantined jobs and jobs that wait for a retry are skipped. Interactive jobs go before bulk ones, but up to
        `bulk_limit` bulk jobs are claimed first. Jobs of one priority and owner are claimed in the order of their
        addition; of several owners, each gets an equal part of the jobs.
        """
        for_interactive = max(0, limit - bulk_limit)
        claimed = self._claim_fairly(now, model_name, Priority.INTERACTIVE, for_interactive)
        may_be_more = len(claimed) == for_interactive
        are_left = may_be_more or (claimed and self._is_claimable(model_name, Priority.INTERACTIVE))  # as too large
        for_bulk = bulk_limit if are_left else limit - len(claimed)
        claimed += self._claim_fairly(now, model_name, Priority.BULK, min(for_bulk, limit - len(claimed)))
        if may_be_more:
            claimed += self._claim_fairly(now, model_name, Priority.INTERACTIVE, limit - len(claimed))
        return claimed

    def _is_claimable(self, model_name: str, priority: Priority) -> bool:
        """Whether any job of a model and priority can be claimed."""
        return bool(self._database.execute(sql.IS_CLAIMABLE, (model_name, priority)).fetchone()[0])

    def _claim_fairly(self, now: float, model_name: str, priority: Priority, limit: int) -> list[Job]:
        if not self._has_owners:
            return self._claim(sql.CLAIMABLE, now, model_name, priority, "", limit)
        owners, last_owner = list[str](), self._last_owners.get((model_name, priority), "")
        for which in ("owner > ?4", "owner <= ?4"):  # those after the last one come first
            values = (model_name, priority, OWNERS_PER_CLAIM - len(owners), last_owner)
            owners += [owner for (owner,) in self._database.execute(sql.OWNERS.format(which=which), values)]
        claimed, size_bytes = list[Job](), 0
        while owners and limit > 0 and size_bytes <= sql.BYTES_PER_READ:
            share, turns, owners = -(-limit // len(owners)), owners, []
            for owner in turns:
                claimed += (some := self._claim(sql.CLAIMABLE, now, model_name, priority, owner, min(share, limit)))
                limit, size_bytes = limit - len(some), size_bytes + sum(job.size_bytes for job in some)
                if len(some) == share:
                    owners.append(owner)  # which may have more
                if limit <= 0 or size_bytes > sql.BYTES_PER_READ:
                    self._last_owners[model_name, priority] = owner
                    break
        return claimed

    def claim_quarantined(self, model_name: str, limit: int, now: float) -> list[Job]:
        """Make a group of quarantined jobs of a model running, and return them.

        The group has jobs with the fewest crashes, as many as `quarantine_group_size` says.
        """
        row = self._database.execute(sql.FEWEST_CRASHES, (model_name,)).fetchone()
        if row is None:
            return []
        return self._claim(sql.QUARANTINED, now, model_name, row[0], life.quarantine_group_size(row[0], limit))

    def requeue(self, retries: Sequence[JobRetry]) -> None:
        """Queue running jobs again, to be claimed once `release_retries` has released them.

        Jobs that are not running are left as they are.
        """
        rows = [(retry.job_id, microseconds(retry.retry_at), retry.error) for retry in retries]
        self._move(JobStatus.RUNNING, JobStatus.QUEUED, self._write(sql.REQUEUE, rows))

    def return_claimed(self, job_ids: Sequence[str]) -> None:
        """Queue running jobs as they were before they were claimed, because they did not begin.

        Jobs that are not running are left as they are.
        """
        returned = self._database.execute(sql.RETURN, (_json(job_ids),)).rowcount
        self._move(JobStatus.RUNNING, JobStatus.QUEUED, returned)

    def release_retries(self, model_name: str, now: float) -> float | None:
        """Make jobs claimable whose `retry_at` has come; returns the next `retry_at` of the model's jobs, if any.

        One call releases a limited number: if more are due, the time returned has come already. An infinite `now`
        makes all due.
        """
        due = rows_of_step(self._database, "seq", sql.DUE_RETRIES, (microseconds(now), model_name, ROWS_PER_STEP))
        self._database.execute(sql.RELEASE, (_json([sequence for (sequence,) in due]),))
        row = self._database.execute(sql.NEXT_RETRY, (model_name,)).fetchone()
        return None if row is None else row[0] / 1_000_000

    def _claim(self, chosen: str, now: float, *values: object) -> list[Job]:
        now_us = microseconds(now)
        rows = self._read(chosen, values, sql.START, now_us)
        self._move(JobStatus.QUEUED, JobStatus.RUNNING, len(rows))
        for row in rows:
            row[_STATUS] = JobStatus.RUNNING.value
            if row[_STARTED_AT] is None:  # `now` may be older than a job that was added in the same transaction
                row[_STARTED_AT] = max(now_us, row[_CREATED_AT])
        return [job_from_row(row) for row in rows]

    def finish(self, ends: Sequence[JobEnd], claimed: Collection[str] = ()) -> list[str]:
        """End jobs and, in the same step, make the deliveries due of those that named a queue for such an end.

        Returns the ids of the jobs that ended, in the order given. A job that cannot end so, because it was cancelled
        meanwhile or is unknown, is left as it is, and its id is left out. Deliveries of the jobs with the ids `claimed`
        are claimed at once.
        """
        if not self._end(JobStatus.RUNNING, ends, claimed):  # one was cancelled, for example: end the others only
            jobs = {end.job_id: find_job(self._database, end.job_id) for end in ends}
            found = [
                (job.status, end) for end in ends if (job := jobs.pop(end.job_id, None)) and life.end_job(job, end)
            ]
            for before in (JobStatus.RUNNING, JobStatus.QUEUED):
                self._end(before, [end for status, end in found if status is before], claimed)
            ends = [end for _, end in found]
        return [end.job_id for end in ends]

    def _end(self, before: JobStatus, ends: Sequence[JobEnd], claimed: Collection[str] = ()) -> bool:
        """End jobs whose status is `before`; where one has another status, end none and return False."""
        rows = [
            (
                *(end.job_id, str(end.status), end.result_json, end.error),
                *(finished_us := microseconds(end.finished_at), str(before)),
                sql.CLAIMED if end.job_id in claimed else finished_us,
            )
            for end in ends
        ]
        if self._write(sql.END, rows) < len(rows):
            self._database.execute("ROLLBACK TO operation")
            return False
        for status, jobs in Counter(end.status for end in ends).items():
            self._move(before, status, jobs)
        (sending,) = self._database.execute(sql.COUNT_PENDING, (_json([end.job_id for end in ends]),)).fetchone()
        self._move(DeliveryStatus.NONE, DeliveryStatus.PENDING, sending)
        return True

    def cancel(self, job_id: str, now: float) -> Job | None:
        """Cancel a queued or running job; one that has ended is left as it is. Returns the job, or None if unknown."""
        job = find_job(self._database, job_id)
        cancelled = None if job is None else life.cancel_job(job, now)
        if job is None or cancelled is None:
            return job
        self._database.execute(sql.CANCEL, (microseconds(now), _json([job_id])))
        self._move(job.status, JobStatus.CANCELLED, 1)
        return cancelled

    def expire(self, limit: int, now: float) -> list[Job]:
        """End up to `limit` queued jobs whose `expires_at` has come, fewer large ones, as `finish` does.

        Returns them as before, without their messages and their `meta`.
        """
        rows = rows_of_step(self._database, SHORT_COLUMNS, sql.EXPIRED, (microseconds(now), limit))
        jobs = list(map(job_from_row, rows))
        errors = [(job.job_id, life.expires_in_passed((job.expires_at or now) - job.created_at)) for job in jobs]
        self._end_queued(errors, JobStatus.EXPIRED, now)
        return jobs

    def _end_queued(self, errors: Iterable[tuple[str, str]], status: JobStatus, now: float) -> list[str]:
        """End queued jobs, each by its id and with its error; returns their ids."""
        ends = [JobEnd(job_id=job_id, status=status, error=error, finished_at=now) for job_id, error in errors]
        self._end(JobStatus.QUEUED, ends)
        return [end.job_id for end in ends]

    def claim_deliveries(
        self, limit: int, now: float, queue_limits: Mapping[str, int], queue_limit: int, place: QueuePlace | None
    ) -> tuple[list[Job], QueuePlace | None]:
        """A step of `JobStore.claim_deliveries`: visit some queues, after `place` or from where the last claim stopped.

        Returns what was claimed, and where a next step goes on; None where all queues were visited.
        """
        claimed, size_bytes, left = list[Job](), 0, QUEUES_PER_STEP
        first = self._last_queue  # and where the round ends
        queue, wrapped = place or (first, False)
        while left > 0 and len(claimed) < limit and size_bytes <= sql.BYTES_PER_READ:
            values = (microseconds(now), queue, left)
            found, visited = self._database.execute(sql.NEXT_DUE_QUEUE, values).fetchone()
            left -= visited
            if found is None and not wrapped:
                queue, wrapped = "", True
                continue
            if found is None or (wrapped and found > first):
                return claimed, None
            queue = cast("str", found)
            room = min(queue_limits.get(queue, queue_limit), limit - len(claimed))
            if room > 0:
                rows = self._read(sql.DUE, (microseconds(now), queue, room), sql.CLAIM_DELIVERIES)
                jobs = [job_from_row(row) for row in rows]
                claimed += jobs
                size_bytes += sum(job.size_bytes for job in jobs)
                self._last_queue = queue if jobs else self._last_queue
        return claimed, (queue, wrapped)

    def claim_quarantined_deliveries(self, limit: int) -> list[Job]:
        """Claim a group of quarantined deliveries, and return their jobs.

        The group has those with the fewest crashes, as many as `quarantine_group_size` says.
        """
        row = self._database.execute(sql.FEWEST_DELIVERY_CRASHES).fetchone()
        if row is None:
            return []
        size = life.quarantine_group_size(row[0], limit)
        rows = self._read(sql.QUARANTINED_DELIVERIES, (row[0], size), sql.CLAIM_DELIVERIES)
        return [job_from_row(row) for row in rows]

    def record_deliveries(self, records: Sequence[DeliveryRecord]) -> None:
        """Record the results of attempts to deliver. Jobs whose delivery is not pending are left as they are."""
        for status in DeliveryStatus:
            due = status is DeliveryStatus.PENDING
            rows = [
                (each.job_id, str(status), each.attempts, each.error, microseconds(each.due_at) if due else None)
                for each in records
                if each.status is status
            ]
            self._move(DeliveryStatus.PENDING, status, self._write(sql.RECORD_DELIVERIES, rows))

    def recover(self, now: float) -> Recovery:
        """Recover what was claimed by a process that has ended: called once, before anything is claimed.

        Running jobs are queued again, in their old order, and claimed deliveries are due again; both are quarantined
        or, after too many crashes, failed and undelivered.
        """
        undelivered = self._recover_deliveries(microseconds(now))
        requeued = self._database.execute(sql.REQUEUE_CRASHED).rowcount
        self._move(JobStatus.RUNNING, JobStatus.QUEUED, requeued)
        rows = self._database.execute(sql.CRASHED, (life.MAX_CRASHES,))
        errors = [(job_id, life.TOO_MANY_CRASHES) for (job_id,) in rows]
        failed = self._end_queued(errors, JobStatus.FAILED, now)
        return Recovery(requeued - len(failed), failed, undelivered)

    def _recover_deliveries(self, now_us: int) -> list[str]:
        """Quarantine what was claimed; returns the ids of what is undelivered."""
        # In two statements, so that each uses its partial index.
        self._database.execute(sql.QUARANTINE_DELIVERIES.format(which="delivery_crashes > 0"), (now_us,))
        crashed, queue = sql.QUARANTINE_DELIVERIES.format(which="delivery_crashes = 0 AND delivery_queue = ?"), ""
        while (row := self._database.execute(sql.NEXT_QUEUE, (queue,)).fetchone()) is not None:
            queue = row[0]
            self._database.execute(crashed, (now_us, queue))
        rows = self._database.execute(
            sql.GIVE_UP_DELIVERIES, (life.TOO_MANY_DELIVERY_CRASHES, life.MAX_CRASHES)
        ).fetchall()
        self._move(DeliveryStatus.PENDING, DeliveryStatus.UNDELIVERED, len(rows))
        return [job_id for (job_id,) in rows]

    def check(self) -> None:
        """Write something, and change nothing: to see whether the database can be written."""
        key, kind = next(iter(COUNTED.items()))
        self._database.execute("INSERT OR REPLACE INTO counts (status, jobs) VALUES (?, ?)", (key, self.counts[kind]))

    def _read(self, chosen: str, values: tuple[Any, ...], change: str, *changed: object) -> list[list[Any]]:
        """The `COLUMNS` of the chosen jobs, in their order, after `change` was made to them: as many as fit at once.

        The last of the `values` is the limit of the chosen ones. The change makes that they are not chosen again.
        """
        *which, limit = values
        few = min(limit, ROWS_OF_UNKNOWN_SIZE)
        rows, size = self._read_some(chosen, (*which, few), change, *changed)
        more = min(limit - few, (sql.BYTES_PER_READ - size) * few // max(size, 1)) if len(rows) == few else 0
        if more > 0:
            rows += self._read_some(chosen, (*which, more), change, *changed)[0]
        return rows

    def _read_some(
        self, chosen: str, values: tuple[Any, ...], change: str, *changed: object
    ) -> tuple[list[list[Any]], int]:
        """What `_read` returns of all that are chosen, whose sizes are read first, and about how long it is.

        Where the first alone does not fit, it is read without JSON, which might become longer than SQLite allows.
        """
        (text,) = self._database.execute(sql.READ.format(chosen=chosen), values).fetchone()
        rows: list[list[Any]] = sorted(from_json(text), key=lambda row: cast("int", row[0]))
        if not rows:
            rows = list(map(list, self._database.execute(sql.READ_FIRST.format(chosen=chosen), values)))
        if rows:
            self._database.execute(change, (*changed, _json([row[0] for row in rows])))
        return [row[1:] for row in rows], len(text)

    def _write(self, statement: str, rows: Sequence[Row]) -> int:
        """Run a statement with `{rows}` of values, many at a time; returns how many rows it changed."""
        changed = start = 0
        for count in _ROWS_PER_STATEMENT:
            while len(rows) - start >= count:
                values = [value for row in rows[start : start + count] for value in row]
                changed += self._database.execute(_with_rows(statement, len(rows[0]), count), values).rowcount
                start += count
        return changed

    def _move(self, before: JobStatus | DeliveryStatus, after: JobStatus | DeliveryStatus, jobs: int) -> None:
        self.counts[before] -= jobs
        self.counts[after] += jobs


@cache  # of few statements, with few counts of rows
def _with_rows(statement: str, columns: int, count: int) -> str:
    """A statement with the placeholders of its `{rows}`."""
    placeholders = f"({', '.join('?' * columns)})"
    return statement.format(rows=", ".join([placeholders] * count))


def _json(values: Sequence[object]) -> str:
    return to_json(values).decode()
