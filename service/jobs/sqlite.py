"""Jobs in SQLite: in a file, where an accepted job is on disk before its id is given out, or in memory."""

import fcntl
import os
import sqlite3
import weakref
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, ExitStack, closing, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar, cast

from modalkit.service.jobs.errors import JobStoreClosedError, JobStoreLockedError, JobStoreUnavailableError
from modalkit.service.jobs.operation_thread import OperationThread
from modalkit.service.jobs.sqlite_schema import open_database, open_for_reading
from modalkit.service.jobs.sqlite_table import JobTable
from modalkit.service.jobs.store import JobStore

T = TypeVar("T")

MAX_OPERATIONS_PER_COMMIT = 512


class SqliteJobStore(JobStore):
    """A `JobStore` of up to `max_jobs` jobs in the SQLite file at `path`.

    One thread owns the connection. Operations that come while a transaction commits share the next one ("group
    commit"), each in a savepoint of its own, so that one that fails does so alone. With WAL and full synchronisation, a
    committed job survives the death of the process and of the machine, if the disk writes what it acknowledges. What
    only reads has a connection and a thread of its own, so it neither waits for a commit nor makes one wait.

    A lock on ``<path>.lock`` keeps other owners out; where the path is a symlink, it is beside the file itself. The
    kernel releases it when the process dies. Entering creates the folder and the file where needed, and raises
    `JobStoreLockedError`, `JobStoreSchemaError` for a file of another program, or `JobStoreUnavailableError`. Leaving
    finishes the operations that wait; when an exception leaves the block, only the transaction that runs.
    """

    durable = True

    def __init__(self, path: str | Path, *, max_jobs: int = 10_000_000) -> None:
        super().__init__(Path(path), max_jobs)
        name = f"job store {self.path.name}"
        self._writing = OperationThread(
            name, self._transaction, self._open_for_writing, max_together=MAX_OPERATIONS_PER_COMMIT
        )
        self._reading = OperationThread(f"{name}, reading", self._run_reads, self._open_for_reading, max_together=1)
        self._reader: sqlite3.Connection
        self._threads: AsyncExitStack | None = None

    async def __aenter__(self) -> Self:
        if self._threads is not None:
            raise JobStoreLockedError(self.path, os.getpid())
        async with AsyncExitStack() as threads:
            await threads.enter_async_context(self._writing)
            await threads.enter_async_context(self._reading)
            self._threads = threads.pop_all()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._threads is None:
            raise JobStoreClosedError
        threads, self._threads = self._threads, None
        await threads.__aexit__(exc_type, exc, traceback)

    async def _perform(self, operation: Callable[[JobTable], T]) -> T:
        return cast("T", await self._writing.perform(operation))

    async def _read(self, function: Callable[[sqlite3.Connection], T]) -> T:
        return cast("T", await self._reading.perform(function))

    # In the threads.

    @contextmanager
    def _open_for_writing(self) -> Iterator[None]:
        with self._errors_translated(), ExitStack() as opened:
            if self.path.is_dir():
                raise JobStoreUnavailableError(self.path, "it is a folder", f"give a file, as {self.path / 'jobs.db'}")
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Of what a symlink leads to, because two paths may lead to one database.
            lock = os.open(f"{self.path.resolve()}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            opened.callback(os.close, lock)
            self._take(lock)
            self._database = opened.enter_context(closing(open_database(self.path)))
            self._table = JobTable(self._database, self._max_jobs)
            self.commits = 0
            yield

    def _take(self, lock: int) -> None:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(lock, 20).decode(errors="replace").strip()
            raise JobStoreLockedError(self.path, int(owner) if owner.isdigit() else None) from None
        os.ftruncate(lock, 0)
        os.pwrite(lock, str(os.getpid()).encode(), 0)

    @contextmanager
    def _open_for_reading(self) -> Iterator[None]:
        with self._errors_translated(), closing(open_for_reading(self.path)) as self._reader:
            yield

    def _run_reads(self, reads: list[Callable[[Any], Any]]) -> list[Any]:
        try:
            with self._errors_translated():
                return [read(self._reader) for read in reads]
        except JobStoreUnavailableError as error:
            self.failure = error
            raise


class MemoryJobStore(JobStore):
    """A `JobStore` of up to `max_jobs` jobs in memory. Closing it keeps them: it can be opened again.

    Each operation is a transaction that runs at once, in the event loop.
    """

    durable = False

    def __init__(self, *, max_jobs: int = 1_000_000) -> None:
        super().__init__(Path(":memory:"), max_jobs)
        self._database = open_database(self.path)
        self._table = JobTable(self._database, max_jobs)
        self._is_open = False
        weakref.finalize(self, self._database.close)

    async def __aenter__(self) -> Self:
        self._is_open = True
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._is_open = False

    async def _perform(self, operation: Callable[[JobTable], T]) -> T:
        if not self._is_open:
            raise JobStoreClosedError
        (result,) = self._transaction([operation])
        if isinstance(result, Exception):
            raise result
        return cast("T", result)

    async def _read(self, function: Callable[[sqlite3.Connection], T]) -> T:
        if not self._is_open:
            raise JobStoreClosedError
        with self._errors_translated():
            return function(self._database)
