"""Jobs in a SQLite file: an accepted job is on disk before its id is given out."""

import fcntl
import os
import sqlite3
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar, cast

import anyio

from batching import BatchPolicy, BatchScheduler, Priority, QueueFullError, SchedulerClosedError
from batching.threads import DedicatedThread
from service.jobs.errors import (
    DuplicateJobError,
    JobStoreBusyError,
    JobStoreClosedError,
    JobStoreFullError,
    JobStoreLockedError,
    JobStoreUnavailableError,
)
from service.jobs.model import DeliveryRecord, FinishedJob, Job, JobStatus, NewJob
from service.jobs.sqlite_rows import COLUMNS, NEW_JOB_COLUMNS, job_from_row, json_text, microseconds, row_from_new_job
from service.jobs.sqlite_schema import open_database

T = TypeVar("T")

OPERATIONS_PER_COMMIT = 512
WAITING_OPERATIONS = 100_000
ROWS_PER_REMOVAL = 1000

_SELECT = f"SELECT {', '.join(COLUMNS)} FROM jobs"  # noqa: S608  # names of our own, no input
_INSERT = (
    f"INSERT INTO jobs ({', '.join(NEW_JOB_COLUMNS)}) "  # noqa: S608  # as above
    f"VALUES ({', '.join('?' for _ in NEW_JOB_COLUMNS)})"
)
_TAKE = f"""
    UPDATE jobs SET status = 'running', started_at = coalesce(started_at, ?) WHERE seq IN (
        SELECT seq FROM jobs WHERE status = 'queued' AND model_name = ? AND priority = ? ORDER BY seq LIMIT ?
    ) RETURNING seq, {", ".join(COLUMNS)}
"""  # noqa: S608  # as above
_CHANGE = """
    UPDATE jobs SET status = ?, delivery = ?, result = ?, error = ?, finished_at = ? WHERE job_id = ?
"""
_REMOVE = """
    DELETE FROM jobs WHERE seq IN (
        SELECT seq FROM jobs WHERE finished_at < ? AND delivery <> 'pending' LIMIT ?
    ) RETURNING status
"""
_RECORD_DELIVERY = """
    UPDATE jobs SET delivery = ?, delivery_attempts = ?, delivery_error = ? WHERE job_id = ? AND delivery <> 'none'
"""

Operation = Callable[[], Any]


class SqliteJobStore:
    """Keeps up to `max_jobs` jobs in the SQLite file at `path`; see `JobStore` for what it promises.

    One thread owns the connection. Operations that come while a transaction commits share the next one ("group
    commit"), each in a savepoint of its own, so that one that fails does so alone. With WAL and full synchronisation, a
    committed job survives the death of the process and of the machine, as far as the disk keeps what it says.

    A lock on ``<path>.lock`` keeps other owners out; the kernel releases it when the process dies. Entering creates the
    folder and the file where needed, and raises `JobStoreLockedError`, `JobStoreSchemaError` for a file that is not
    ours, or `JobStoreUnavailableError`. Leaving it finishes the operations that wait; cancelled, only the transaction
    that runs.
    """

    durable = True

    def __init__(self, path: str | Path, *, max_jobs: int = 10_000_000) -> None:
        self.path = Path(path)
        self._max_jobs = max_jobs
        self._thread = DedicatedThread(f"job store {self.path.name}")
        self._lock_fd = -1
        # asyncio's own cancellation knows no shields: it may leave a transaction in one thread while another closes.
        self._in_use = threading.Lock()
        # Used only in the thread while the store is open: the connection, and how many jobs of each status there are.
        self._database: sqlite3.Connection
        self._counts: Counter[JobStatus] = Counter()
        self._commits = 0
        self._scheduler: BatchScheduler[Operation, Any] | None = None

    @property
    def commits(self) -> int:
        """How many transactions have been committed since the store was opened."""
        return self._commits

    async def __aenter__(self) -> Self:
        if self._scheduler is not None:
            raise JobStoreLockedError(self.path, os.getpid())
        try:
            with anyio.CancelScope(shield=True):
                await self._thread.run(self._open)
        except BaseException:
            self._thread.close()
            raise
        scheduler: BatchScheduler[Operation, Any] = BatchScheduler(
            self._run_transaction,
            policy=BatchPolicy(max_batch_size=OPERATIONS_PER_COMMIT, max_queue_items=WAITING_OPERATIONS),
            name="job store",
        )
        self._scheduler = await scheduler.__aenter__()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        if self._scheduler is None:
            raise JobStoreClosedError
        try:
            return await self._scheduler.__aexit__(exc_type, exc, traceback)
        finally:
            self._scheduler = None
            with anyio.CancelScope(shield=True):
                await self._thread.run(self._close)
            self._thread.close()

    async def add(self, jobs: Sequence[NewJob]) -> None:
        """See `JobStore.add`."""
        rows = [row_from_new_job(job) for job in jobs]
        await self._perform(partial(self._add, rows))

    async def get(self, job_id: str) -> Job | None:
        """See `JobStore.get`."""
        return await self._perform(partial(self._find, job_id))

    async def take(self, model_name: str, limit: int, now: float, *, bulk_places: int = 0) -> list[Job]:
        """See `JobStore.take`."""
        return await self._perform(partial(self._take, model_name, limit, microseconds(now), bulk_places))

    async def finish(self, outcomes: Sequence[FinishedJob]) -> list[Job]:
        """See `JobStore.finish`."""
        return await self._perform(partial(self._finish, outcomes))

    async def cancel(self, job_id: str, now: float) -> Job | None:
        """See `JobStore.cancel`."""
        return await self._perform(partial(self._cancel, job_id, now))

    async def pending_deliveries(self, limit: int, after: Job | None = None) -> list[Job]:
        """See `JobStore.pending_deliveries`."""
        return await self._perform(partial(self._pending_deliveries, limit, after))

    async def record_delivery(self, records: Sequence[DeliveryRecord]) -> None:
        """See `JobStore.record_delivery`."""
        await self._perform(partial(self._record_delivery, records))

    async def requeue_running(self) -> int:
        """See `JobStore.requeue_running`."""
        return await self._perform(self._requeue_running)

    async def remove_finished(self, before: float) -> int:
        """See `JobStore.remove_finished`."""
        removed = 0
        while step := await self._perform(partial(self._remove_finished, microseconds(before))):
            removed += step
            with anyio.CancelScope(shield=True):
                await self._thread.run(self._give_space_back)
        return removed

    async def counts(self) -> Mapping[JobStatus, int]:
        """See `JobStore.counts`."""
        return await self._perform(lambda: {status: self._counts[status] for status in JobStatus})

    # Transactions.

    async def _perform(self, operation: Callable[[], T]) -> T:
        """Run an operation in a transaction, together with others that come at about the same time."""
        if self._scheduler is None:
            raise JobStoreClosedError
        try:
            return cast("T", await self._scheduler.submit(operation))
        except QueueFullError as error:
            raise JobStoreBusyError(error.depth) from error
        except SchedulerClosedError as error:
            raise JobStoreClosedError from error

    async def _run_transaction(self, operations: list[Operation]) -> list[Any]:
        # Shielded, because the connection must not be closed, or used by another thread, before the transaction ends.
        with anyio.CancelScope(shield=True):
            results = await self._thread.run(partial(self._exclusive_transaction, operations))
        return results  # noqa: RET504  # a cancel scope may end its block early, says its type

    def _exclusive_transaction(self, operations: list[Operation]) -> list[Any]:
        with self._in_use:
            return self._transaction(operations)

    def _transaction(self, operations: list[Operation]) -> list[Any]:
        """Run the operations in one transaction; returns each one's result or error, or the commit's for all."""
        counts_before = self._counts.copy()
        try:
            self._database.execute("BEGIN IMMEDIATE")
            results = [self._run_alone(operation) for operation in operations]
            if self._counts != counts_before:
                self._store_counts()
            self._database.execute("COMMIT")
        except sqlite3.Error as error:
            if self._database.in_transaction:
                self._database.execute("ROLLBACK")
            self._counts = counts_before
            return [self._unavailable(error)] * len(operations)
        self._commits += 1
        return results

    def _run_alone(self, operation: Operation) -> Any:
        counts_before = self._counts.copy()
        self._database.execute("SAVEPOINT operation")
        try:
            result = operation()
        except sqlite3.Error:
            raise  # the database's trouble is everybody's
        except Exception as error:  # noqa: BLE001  # handed to the operation's caller
            self._database.execute("ROLLBACK TO operation")
            self._counts = counts_before
            result = error
        self._database.execute("RELEASE operation")
        return result

    def _store_counts(self) -> None:
        self._database.executemany(
            "INSERT OR REPLACE INTO counts (status, jobs) VALUES (?, ?)",
            [(status.value, self._counts[status]) for status in JobStatus],
        )

    def _unavailable(self, error: sqlite3.Error) -> JobStoreUnavailableError:
        remedies = {
            "SQLITE_FULL": "free some space on its disk",
            "SQLITE_BUSY": "close the other program that has it open for writing",
            "SQLITE_READONLY": "make the file and its folder writable",
        }
        name = getattr(error, "sqlite_errorname", "") or ""
        remedy = remedies.get("_".join(name.split("_")[:2]), "check its disk")
        return JobStoreUnavailableError(self.path, str(error), remedy)

    # Operations, each run in the thread and inside a transaction.

    def _add(self, rows: list[tuple[Any, ...]]) -> None:
        stored = sum(self._counts.values())
        if stored + len(rows) > self._max_jobs:
            raise JobStoreFullError(stored, len(rows), self._max_jobs)
        for row in rows:
            try:
                self._database.execute(_INSERT, row)
            except sqlite3.IntegrityError as error:
                raise DuplicateJobError(row[0]) from error
        self._counts[JobStatus.QUEUED] += len(rows)

    def _find(self, job_id: str) -> Job | None:
        row = self._database.execute(f"{_SELECT} WHERE job_id = ?", (job_id,)).fetchone()
        return None if row is None else job_from_row(row)

    def _take(self, model_name: str, limit: int, now_us: int, bulk_places: int) -> list[Job]:
        taken = self._take_of(model_name, Priority.BULK, min(bulk_places, limit), now_us)
        for priority in (Priority.INTERACTIVE, Priority.BULK):
            taken += self._take_of(model_name, priority, limit - len(taken), now_us)
        return taken

    def _take_of(self, model_name: str, priority: Priority, limit: int, now_us: int) -> list[Job]:
        rows = self._database.execute(_TAKE, (now_us, model_name, priority.value, limit)).fetchall()
        self._counts[JobStatus.QUEUED] -= len(rows)
        self._counts[JobStatus.RUNNING] += len(rows)
        return [job_from_row(row[1:]) for row in sorted(rows, key=lambda row: cast("int", row[0]))]

    def _finish(self, outcomes: Sequence[FinishedJob]) -> list[Job]:
        ended = []
        for outcome in outcomes:
            job = self._find(outcome.job_id)
            finished = None if job is None else job.finished(outcome)
            if job is not None and finished is not None:
                self._change(job, finished)
                ended.append(finished)
        return ended

    def _cancel(self, job_id: str, now: float) -> Job | None:
        job = self._find(job_id)
        cancelled = None if job is None else job.cancelled(now)
        if job is None or cancelled is None:
            return job
        self._change(job, cancelled)
        return cancelled

    def _change(self, old: Job, new: Job) -> None:
        """Store a job's new status and what came with it."""
        result = None if new.result is None else json_text(new.result)
        finished_us = None if new.finished_at is None else microseconds(new.finished_at)
        self._database.execute(
            _CHANGE, (new.status.value, new.delivery.value, result, new.error, finished_us, new.job_id)
        )
        self._counts[old.status] -= 1
        self._counts[new.status] += 1

    def _pending_deliveries(self, limit: int, after: Job | None) -> list[Job]:
        start = (-1, "") if after is None else (microseconds(after.finished_at or 0.0), after.job_id)
        rows = self._database.execute(
            f"{_SELECT} WHERE delivery = 'pending' AND (finished_at, job_id) > (?, ?) "
            "ORDER BY finished_at, job_id LIMIT ?",
            (*start, limit),
        )
        return [job_from_row(row) for row in rows]

    def _record_delivery(self, records: Sequence[DeliveryRecord]) -> None:
        self._database.executemany(
            _RECORD_DELIVERY,
            [(record.status.value, record.attempts, record.error, record.job_id) for record in records],
        )

    def _requeue_running(self) -> int:
        requeued = self._database.execute("UPDATE jobs SET status = 'queued' WHERE status = 'running'").rowcount
        self._counts[JobStatus.RUNNING] -= requeued
        self._counts[JobStatus.QUEUED] += requeued
        return requeued

    def _remove_finished(self, before_us: int) -> int:
        removed = [JobStatus(status) for (status,) in self._database.execute(_REMOVE, (before_us, ROWS_PER_REMOVAL))]
        self._counts.subtract(Counter(removed))
        return len(removed)

    def _give_space_back(self) -> None:
        # A script, because `execute` runs one step of it, which frees one page; so it is no part of a transaction.
        try:
            self._database.executescript(f"PRAGMA incremental_vacuum({ROWS_PER_REMOVAL})")
        except sqlite3.Error as error:
            raise self._unavailable(error) from error

    # Opening and closing, in the thread.

    def _open(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock_fd = os.open(f"{self.path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise JobStoreUnavailableError(
                self.path,
                f"{error.strerror} ({error.filename})",
                "give another store_path, or make the folder writable",
            ) from error
        try:
            self._take_lock()
            self._database = open_database(self.path)
            try:
                counted = self._database.execute("SELECT status, jobs FROM counts").fetchall()
            except BaseException:
                self._database.close()
                raise
        except BaseException as error:
            os.close(self._lock_fd)
            if isinstance(error, sqlite3.Error):
                raise self._unavailable(error) from error
            raise
        self._counts = Counter({JobStatus(status): jobs for status, jobs in counted})
        self._commits = 0

    def _take_lock(self) -> None:
        try:
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(self._lock_fd, 20).decode(errors="replace").strip()
            raise JobStoreLockedError(self.path, int(owner) if owner.isdigit() else None) from None
        os.ftruncate(self._lock_fd, 0)
        os.pwrite(self._lock_fd, str(os.getpid()).encode(), 0)

    def _close(self) -> None:
        with self._in_use:
            try:
                self._database.close()
            finally:
                os.close(self._lock_fd)
