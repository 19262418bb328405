"""Jobs in SQLite: in a file, where an accepted job is on disk before its id is given out, or in memory."""

import fcntl
import os
import sqlite3
import threading
import weakref
from collections.abc import Callable, Coroutine, Sequence
from functools import partial, wraps
from pathlib import Path
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, Self, TypeVar, cast

import anyio

from modalkit.batching.threads import DedicatedThread
from modalkit.service.jobs.commit_thread import CommitThread
from modalkit.service.jobs.errors import (
    IdempotencyKeyReusedError,
    JobStoreClosedError,
    JobStoreLockedError,
    JobStoreUnavailableError,
)
from modalkit.service.jobs.model import Job, JobFilter, JobPage
from modalkit.service.jobs.sqlite_rows import counts_of_jobs, find_job, page_of_jobs
from modalkit.service.jobs.sqlite_schema import open_database, open_for_reading
from modalkit.service.jobs.sqlite_table import ROWS_PER_STEP, Add, JobTable, Operation
from modalkit.service.jobs.store import JobCounts

P = ParamSpec("P")
T = TypeVar("T")

MAX_OPERATIONS_PER_COMMIT = 512
MAX_WAITING_OPERATIONS = 100_000


def _operation(
    change: Callable[Concatenate[JobTable, P], T],
) -> Callable[Concatenate["SqliteJobStore", P], Coroutine[Any, Any, T]]:
    """A method of the store that calls this one of its table in a transaction."""

    @wraps(change)
    async def perform(store: "SqliteJobStore", /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await store._perform(lambda table: change(table, *args, **kwargs))  # noqa: SLF001  # a method of it

    return perform


class SqliteJobStore:
    """A `JobStore` of up to `max_jobs` jobs in the SQLite file at `path`.

    One thread owns the connection. Operations that come while a transaction commits share the next one ("group
    commit"), each in a savepoint of its own, so that one that fails does so alone. With WAL and full synchronisation, a
    committed job survives the death of the process and of the machine, if the disk writes what it acknowledges.

    A lock on ``<path>.lock`` keeps other owners out; the kernel releases it when the process dies. Entering creates the
    folder and the file where needed, and raises `JobStoreLockedError`, `JobStoreSchemaError` for a file of another
    program, or `JobStoreUnavailableError`. Leaving finishes the operations that wait; when an exception leaves the
    block, only the transaction that runs.
    """

    durable = True

    def __init__(self, path: str | Path, *, max_jobs: int = 10_000_000) -> None:
        self.path = Path(path)
        self._max_jobs = max_jobs
        self._lock_fd = -1
        self._thread: CommitThread[Operation] = CommitThread(
            f"job store {self.path.name}",
            self._transaction,
            max_together=MAX_OPERATIONS_PER_COMMIT,
            max_waiting=MAX_WAITING_OPERATIONS,
        )
        self._reading_thread = DedicatedThread(f"job store {self.path.name}, reading")
        # A cancellation by asyncio ignores shields: it may leave a reader in its thread while the store closes.
        self._reading = threading.Lock()
        # Used only in the threads, while the store is open: a connection for transactions with what is done in them,
        # and one for what only reads, which like that neither waits for a commit nor makes one wait.
        self._database: sqlite3.Connection
        self._table: JobTable
        self._reader: sqlite3.Connection
        self._commits = 0
        self._is_open = False

    @property
    def commits(self) -> int:
        """How many transactions have been committed since the store was opened."""
        return self._commits

    async def __aenter__(self) -> Self:
        if self._is_open:
            raise JobStoreLockedError(self.path, os.getpid())
        await self._thread.start(self._open, self._close)
        self._is_open = True
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self._is_open:
            raise JobStoreClosedError
        self._is_open = False
        try:
            await self._thread.stop(self._close, abort=exc_type is not None)
        finally:
            self._reading_thread.close()

    async def add(self, jobs: Sequence[Job]) -> list[str | IdempotencyKeyReusedError]:
        """Store queued jobs: all, or none when it raises."""
        return await self._perform(Add(jobs))

    async def get(self, job_id: str) -> Job | None:
        """The job of this id."""
        return await self._read(lambda: find_job(self._reader, job_id))

    async def page(self, limit: int, which: JobFilter, cursor: int | None = None) -> JobPage:
        """Some of the jobs that match, the newest first."""
        return await self._read(lambda: page_of_jobs(self._reader, limit, which, cursor))

    claim = _operation(JobTable.claim)
    claim_quarantined = _operation(JobTable.claim_quarantined)
    requeue = _operation(JobTable.requeue)
    release_retries = _operation(JobTable.release_retries)
    finish = _operation(JobTable.finish)
    cancel = _operation(JobTable.cancel)
    expire = _operation(JobTable.expire)
    claim_deliveries = _operation(JobTable.claim_deliveries)
    claim_quarantined_deliveries = _operation(JobTable.claim_quarantined_deliveries)
    record_deliveries = _operation(JobTable.record_deliveries)
    recover = _operation(JobTable.recover)

    async def replay(self, job_ids: Sequence[str] | None, now: float) -> int:
        """Make undelivered ones of these jobs, or of all, due again; returns how many."""
        if job_ids is not None:
            return await self._perform(lambda table: table.replay_these(job_ids, now))
        # By sequence number, so that a delivery that fails again meanwhile is not replayed again and again.
        replayed, sequence = 0, 0
        while some := await self._perform(partial(JobTable.replay_after, sequence=sequence, now=now)):
            replayed, sequence = replayed + len(some), max(some)
        return replayed

    async def remove_finished(self, before: float) -> int:
        """Remove jobs that ended before that time and have nothing left to deliver."""
        return await self._in_steps(lambda table: table.remove_some(before), frees_space=True)

    async def purge(self, which: JobFilter) -> int:
        """Remove ended jobs that match, except those whose delivery is pending."""
        return await self._in_steps(lambda table: table.purge_some(which), frees_space=True)

    async def counts(self) -> JobCounts:
        """How many jobs there are of each kind."""
        return await self._read(lambda: counts_of_jobs(self._reader))

    async def _read(self, function: Callable[[], T]) -> T:
        """Read what was committed, in a thread of its own."""
        if not self._is_open:
            raise JobStoreClosedError
        with anyio.CancelScope(shield=True):
            result = await self._reading_thread.run(partial(self._exclusive_read, function))
        return result  # noqa: RET504  # a cancel scope may end its block early, says its type

    def _exclusive_read(self, function: Callable[[], T]) -> T:
        with self._reading:
            try:
                return function()
            except (sqlite3.Error, MemoryError) as error:
                raise self._unavailable(error) from error

    async def _in_steps(self, step: Callable[[JobTable], int], *, frees_space: bool = False) -> int:
        """Repeat an operation until it changes nothing more; returns how much it changed."""
        changed = 0
        while some := await self._perform(step):
            changed += some
            if frees_space and self.durable:
                await self._thread.call(self._give_space_back)
        return changed

    # Transactions.

    async def _perform(self, operation: Callable[[JobTable], T]) -> T:
        """Run an operation in a transaction, together with others that come at about the same time."""
        return cast("T", await self._thread.perform(operation))

    def _transaction(self, operations: list[Operation]) -> list[Any]:
        """Run the operations in one transaction; returns each one's result or error, or the commit's for all."""
        counts_before = self._table.counts.copy()
        try:
            self._database.execute("BEGIN IMMEDIATE")
            results = self._table.run(operations)
            if self._table.counts != counts_before:
                self._table.store_counts(counts_before)
            self._database.execute("COMMIT")
        except (sqlite3.Error, MemoryError) as error:
            self._table.counts = counts_before
            if self._database.in_transaction:
                self._database.execute("ROLLBACK")
            return [self._unavailable(error) for _ in operations]
        self._commits += 1
        return [
            self._unavailable(result) if isinstance(result, sqlite3.Error | MemoryError) else result
            for result in results
        ]

    def _unavailable(self, error: sqlite3.Error | MemoryError) -> JobStoreUnavailableError:
        remedies = {
            "SQLITE_TOOBIG": "submit smaller items",
            "SQLITE_FULL": "free some space on its disk",
            "SQLITE_BUSY": "close the other program that has it open for writing",
            "SQLITE_READONLY": "make the file and its folder writable",
        }
        name = getattr(error, "sqlite_errorname", "") or ""
        remedy = remedies.get("_".join(name.split("_")[:2]), "check its disk")
        return JobStoreUnavailableError(self.path, str(error), remedy)

    def _give_space_back(self) -> None:
        # A script, because `execute` runs one step of it, which frees one page; so it is no part of a transaction.
        try:
            self._database.executescript(f"PRAGMA incremental_vacuum({ROWS_PER_STEP})")
        except sqlite3.Error as error:
            raise self._unavailable(error) from error

    # Opening and closing, in the thread.

    def _open(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock_fd = os.open(f"{self.path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise self._cannot_be_opened(error) from error
        try:
            self._take_lock()
            self._database = open_database(self.path)
            try:
                self._table = JobTable(self._database, self._max_jobs)
                self._reader = open_for_reading(self.path)
            except BaseException:
                self._database.close()
                raise
        except BaseException as error:
            os.close(self._lock_fd)
            self._lock_fd = -1
            if isinstance(error, sqlite3.Error):
                raise self._unavailable(error) from error
            if isinstance(error, OSError):
                raise self._cannot_be_opened(error) from error
            raise
        self._commits = 0

    def _cannot_be_opened(self, error: OSError) -> JobStoreUnavailableError:
        return JobStoreUnavailableError(
            self.path, f"{error.strerror} ({error.filename})", "give another store_path, or make the folder writable"
        )

    def _take_lock(self) -> None:
        try:
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(self._lock_fd, 20).decode(errors="replace").strip()
            raise JobStoreLockedError(self.path, int(owner) if owner.isdigit() else None) from None
        os.ftruncate(self._lock_fd, 0)
        os.pwrite(self._lock_fd, str(os.getpid()).encode(), 0)

    def _close(self) -> None:
        if self._lock_fd < 0:
            return
        with self._reading:
            try:
                self._reader.close()
                self._database.close()
            finally:
                os.close(self._lock_fd)
                self._lock_fd = -1


class MemoryJobStore(SqliteJobStore):
    """A `JobStore` of up to `max_jobs` jobs in memory. Closing it keeps them: it can be opened again.

    Each operation is a transaction that runs at once, in the event loop.
    """

    durable = False

    def __init__(self, *, max_jobs: int = 1_000_000) -> None:
        super().__init__(":memory:", max_jobs=max_jobs)
        self._database = self._reader = open_database(self.path)
        self._table = JobTable(self._database, max_jobs)
        weakref.finalize(self, self._database.close)

    async def __aenter__(self) -> Self:
        self._is_open = True
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._is_open = False

    async def _read(self, function: Callable[[], T]) -> T:
        if not self._is_open:
            raise JobStoreClosedError
        return self._exclusive_read(function)

    async def _perform(self, operation: Callable[[JobTable], T]) -> T:
        if not self._is_open:
            raise JobStoreClosedError
        (result,) = self._transaction([operation])
        if isinstance(result, Exception):
            raise result
        return cast("T", result)
