"""What job stores have in common: their operations, and the transactions that these run in."""

import logging
import sqlite3
from abc import abstractmethod
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager
from functools import partial, wraps
from itertools import chain, islice
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from anyio.lowlevel import checkpoint
from pydantic_core import to_json

from modalkit.service.jobs import sqlite_batches as batches
from modalkit.service.jobs import sqlite_many as many
from modalkit.service.jobs.errors import IdempotencyKeyReusedError, JobStoreUnavailableError
from modalkit.service.jobs.model import Job, JobFilter, JobPage
from modalkit.service.jobs.sqlite_many import ROWS_PER_STEP
from modalkit.service.jobs.sqlite_rows import (
    condition_of,
    counts_of_jobs,
    find_job,
    microseconds,
    part_of_page,
    queued_by_model,
)
from modalkit.service.jobs.sqlite_table import JobTable, QueuePlace

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

PAGE_BYTES = 2**20
"""Bytes of text that a page of jobs may have; a page of one job may have more. It is written in one go."""

_REMEDIES = {
    "SQLITE_TOOBIG": "submit smaller items",
    "SQLITE_FULL": "free some space on its disk, at least 32 MiB",  # to copy a log of 16 MiB
    "SQLITE_BUSY": "close the other program that has it open for writing",
    "SQLITE_READONLY": "make the file and its folder writable",
}

Operation = Callable[[JobTable], Any]
"""Changes jobs, and returns the result for its caller."""


Added = list[str | IdempotencyKeyReusedError]
"""The id of each new job, or its error; see `JobStore.add`."""


def _operation(
    change: Callable[Concatenate[JobTable, P], T],
) -> Callable[Concatenate["JobStore", P], Coroutine[Any, Any, T]]:
    """A method of the store that calls this one of its table in a transaction."""

    @wraps(change)
    async def perform(store: "JobStore", /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await store._perform(lambda table: change(table, *args, **kwargs))  # noqa: SLF001  # a method of it

    return perform


def _reading(
    read: Callable[Concatenate[sqlite3.Connection, P], T],
) -> Callable[Concatenate["JobStore", P], Coroutine[Any, Any, T]]:
    """A method of the store that calls this function with a database of what was committed."""

    @wraps(read)
    async def perform(store: "JobStore", /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await store._read(lambda database: read(database, *args, **kwargs))  # noqa: SLF001  # a method of it

    return perform


class JobStore(AbstractAsyncContextManager["JobStore"]):
    """Keeps jobs from the moment they are accepted until their results are delivered and their time is over.

    An asynchronous context manager, with one owner: the owner calls `recover` once before anything is claimed, and
    closes the store in the task that opened it. Several runners, one per model, may share a store. Changes follow
    `life.py`. Times are wall-clock Unix seconds and always passed in, because a store reads no clock; they are kept to
    the microsecond.

    Each call is one atomic step unless it says otherwise, and what it changed is stored when it returns (on disk, in a
    durable store). A cancelled call has happened completely or not at all; its caller cannot know which. Raises
    `JobStoreClosedError` when used while not open, and other `JobStoreError`s where the store fails.
    """

    durable: bool
    """Whether jobs outlive the process."""

    def __init__(self, path: Path, max_jobs: int) -> None:
        self.path = path
        self._max_jobs = max_jobs
        # Used only where transactions run, while the store is open.
        self._database: sqlite3.Connection
        self._table: JobTable
        self.commits = 0
        """How many transactions have been committed since the store was opened."""
        self.failure: JobStoreUnavailableError | None = None
        """Why the store cannot be used, until `check` finds that it can."""

    @abstractmethod
    async def _perform(self, operation: Callable[[JobTable], T]) -> T:
        """Run an operation in a transaction, perhaps together with others."""

    @abstractmethod
    async def _read(self, function: Callable[[sqlite3.Connection], T]) -> T:
        """Read what was committed."""

    async def add(self, jobs: Sequence[Job]) -> Added:
        """Store new jobs, queued or running: all or, when it raises, none. Returns the id of each, in the same order.

        A job whose idempotency key is stored already is not added: its place has the id of the job with that key or,
        if that job asked for something else, an error. Raises `DuplicateJobError` for an id that is stored already or
        comes twice, and `JobStoreFullError` when the store would hold more than its limit, ended jobs included.
        """
        (added,) = await self.add_each([jobs])
        if isinstance(added, Exception):
            raise added
        return added

    async def add_each(self, lists: Sequence[Sequence[Job]]) -> list[Added | Exception]:
        """Store the jobs of each list as `add` does; returns what that returns or raises for each, in their order."""
        return await self._perform(lambda _: self._add_each(lists))

    def _add_each(self, lists: Sequence[Sequence[Job]]) -> list[Added | Exception]:
        if len(lists) > 1:  # all by one statement, unless one of them fails
            together = self._run_alone(partial(JobTable.add, jobs=list(chain.from_iterable(lists))))
            if not isinstance(together, Exception):
                added = iter(together)
                return [list(islice(added, len(jobs))) for jobs in lists]
        return [self._run_alone(partial(JobTable.add, jobs=jobs)) for jobs in lists]

    claim = _operation(JobTable.claim)
    claim_quarantined = _operation(JobTable.claim_quarantined)
    requeue = _operation(JobTable.requeue)
    return_claimed = _operation(JobTable.return_claimed)
    release_retries = _operation(JobTable.release_retries)
    finish = _operation(JobTable.finish)
    cancel = _operation(JobTable.cancel)
    expire = _operation(JobTable.expire)
    claim_quarantined_deliveries = _operation(JobTable.claim_quarantined_deliveries)
    record_deliveries = _operation(JobTable.record_deliveries)
    recover = _operation(JobTable.recover)

    async def claim_deliveries(
        self, limit: int, now: float, *, queue_limits: Mapping[str, int], queue_limit: int
    ) -> Sequence[Job]:
        """Claim up to `limit` deliveries that are due, and return their jobs; they are not due until recorded.

        At most `queue_limit` of them go to the same queue; `queue_limits` has the limits of queues that differ. Queues
        come in turns, in the order of their names, from where the last call stopped; of one queue, the deliveries that
        became due first are claimed. Quarantined ones are skipped. It may claim fewer than are due, but none only where
        none is, or there is no room for it. Many queues with nothing due are passed in several steps, so that other
        calls go on between them.
        """
        if limit <= 0:
            return []
        place: QueuePlace | None = None
        while True:
            step = partial(JobTable.claim_deliveries, limit=limit, now=now, queue_limits=queue_limits)
            claimed, place = await self._perform(partial(step, queue_limit=queue_limit, place=place))
            if claimed or place is None:
                return claimed
            await checkpoint()  # a step in memory does not wait

    async def replay(self, job_ids: Sequence[str] | None, now: float, owner: str | None = None) -> int:
        """Make the deliveries due of those of these jobs, or of all, that are undelivered; returns how many.

        With an `owner`, only jobs of that owner are changed. All are changed in several steps, so that other calls go
        on between them.
        """
        which, values = _chosen(job_ids, JobFilter(owner=owner))
        return len(await self._change_all(many.replay_some, which, values, now))

    async def retry(self, job_ids: Sequence[str] | None, which: JobFilter, now: float) -> list[str]:
        """Queue failed, expired and cancelled jobs that match `which` once more, all or of these ids; returns the ids.

        Those whose message is about to be sent are left as they are. Many are changed in several steps.
        """
        condition, values = _chosen(job_ids, which)
        return await self._change_all(many.retry_some, condition, values, now)

    async def _change_all(
        self, change: Callable[..., list[tuple[int, str]]], which: str, values: Sequence[Any], now: float
    ) -> list[str]:
        """Make a change of `sqlite_many` to all jobs that match the condition, in several steps; returns their ids."""

        def change_some(table: JobTable, after: int) -> list[tuple[int, str]]:
            return change(self._database, table.counts, f"seq > ? AND {which}", [after, *values], now)

        # By sequence number, so that a job which is soon as it was before is not changed again and again.
        changed, sequence = list[str](), 0
        while some := await self._perform(partial(change_some, after=sequence)):
            changed += [job_id for _, job_id in some]
            sequence = max(sequence for sequence, _ in some)
            await checkpoint()  # a step in memory does not wait
        return changed

    async def cancel_some(self, which: JobFilter, now: float) -> list[Job]:
        """Cancel some of the queued and running jobs that match; returns them as before, without their messages."""
        condition, values = condition_of(which)
        return await self._perform(lambda table: many.cancel_some(self._database, table.counts, condition, values, now))

    async def remove_finished(self, before: float) -> int:
        """Remove jobs that ended before that time and have nothing left to deliver; returns how many.

        Undelivered ones stay. Many are removed in several steps, so that other calls go on between them; when
        cancelled, some are left.
        """
        removed = 0
        while some := await self._remove(partial(many.remove_old, before=before)):
            removed += some
        return removed

    async def purge(self, which: JobFilter) -> int:
        """Remove ended jobs that match `which`, undelivered ones included, pending ones not; returns how many.

        In several steps, as `remove_finished` does. To find them, all jobs may have to be looked at: that is done in
        several reads, for which no other call waits long.
        """
        condition, values = condition_of(which)
        removed = 0
        first: int | None = 0
        while first is not None:
            found, first = await self._find_purgeable(which, first)
            for start in range(0, len(found), many.ROWS_PER_STEP):
                some = found[start : start + many.ROWS_PER_STEP]
                removed += await self._remove(partial(many.purge, sequences=some, which=condition, values=values))
            await checkpoint()  # a read in memory does not wait
        return removed

    async def _remove(self, remove: Callable[[sqlite3.Connection, many.Counts], int]) -> int:
        """Do a step of a removal; returns how many jobs it removed."""

        def remove_some(table: JobTable) -> int:
            removed = remove(self._database, table.counts)
            table.has_removed |= removed > 0
            return removed

        removed = await self._perform(remove_some)
        await checkpoint()  # a step in memory does not wait
        return removed

    async def check(self) -> None:
        """See whether the store can be written and read: then it has no `failure` any more."""
        await self._perform(JobTable.check)
        await self.counts()
        self.failure = None

    get = _reading(find_job)
    _part_of_page = _reading(part_of_page)
    _find_purgeable = _reading(many.find_purgeable)
    counts = _reading(counts_of_jobs)
    queued_by_model = _reading(queued_by_model)
    batch = _reading(batches.find_batch)
    has_batch = _reading(batches.has_batch)
    results_in_order = _reading(batches.results_in_order)
    ends_after = _reading(batches.ends_after)
    results_of = _reading(batches.results_of)
    document_part = _reading(many.document_part)
    documents_bytes = _reading(many.documents_bytes)
    document_ids = _reading(many.document_ids)

    async def page(self, limit: int, which: JobFilter, cursor: int | None = None) -> JobPage:
        """Up to `limit` jobs that match `which`, the newest first, starting at the `next_cursor` of another page.

        Their messages are not read: `message_json` is an empty object. A page that would have more than `PAGE_BYTES`
        has fewer jobs; `next_cursor`, the `seq` of the last one, tells whether more follow. Many jobs that do not match
        are passed in several reads, so that others go on between them.
        """
        page, last_sequence, size_bytes = list[Job](), 0, 0
        while True:
            part, cursor = await self._part_of_page(limit + 1 - len(page), which, cursor, PAGE_BYTES - size_bytes)
            for sequence, job in part:
                size_bytes += job.size_bytes
                if page and (len(page) == limit or size_bytes > PAGE_BYTES):
                    return JobPage(page, last_sequence)
                page.append(job)
                last_sequence = sequence
            if cursor is None:
                return JobPage(page, None)
            await checkpoint()  # a read in memory does not wait

    async def put_document(self, document_id: str, part: int, owner: str, content: bytes, now: float) -> None:
        """Store a part of a document; one that is there gets the content, and keeps its owner and its age."""
        await self._perform(lambda _: many.put_document(self._database, document_id, part, owner, content, now))

    async def remove_document(self, document_id: str) -> None:
        """Remove a document with all its parts, the first one first, in several steps."""
        await self._remove_parts("document_id = ?", [document_id])

    async def remove_old_documents(self, before: float) -> None:
        """Remove documents of which a part was stored before that time, in several steps."""
        await self._remove_parts("created_at < ?", [microseconds(before)])

    async def _remove_parts(self, which: str, values: Sequence[Any]) -> None:
        while await self._perform(lambda _: many.remove_parts(self._database, which, values)):
            await checkpoint()  # a step in memory does not wait

    def _transaction(self, operations: list[Operation]) -> list[Any]:
        """Run the operations in one transaction; returns each one's result or error, or the commit's for all."""
        counts_before = self._table.counts.copy()
        try:
            self._database.execute("BEGIN IMMEDIATE")
            results = list(map(self._run_alone, operations))
            if self._table.counts != counts_before:
                self._table.store_counts(counts_before)
            self._database.execute("COMMIT")
        except (sqlite3.Error, MemoryError) as error:
            self._table.counts = counts_before
            if self._database.in_transaction:
                self._database.execute("ROLLBACK")
            self.failure = self._unavailable(error)
            return [self._unavailable(error) for _ in operations]
        self.commits += 1
        if self._table.has_removed and self.durable:
            self._give_space_back()
        return results

    def _run_alone(self, operation: Operation) -> Any:
        """Run an operation that fails alone; returns its result or its error.

        Raises `sqlite3.Error` if the whole transaction failed.
        """
        counts_before = self._table.counts.copy()
        self._database.execute("SAVEPOINT operation")
        try:
            result = operation(self._table)
        except Exception as error:
            # A `DataError` says that something is too large, which is no matter of the other operations.
            if isinstance(error, sqlite3.Error) and not isinstance(error, sqlite3.DataError):
                raise
            self._database.execute("ROLLBACK TO operation")
            self._table.counts = counts_before
            result = self._unavailable(error) if isinstance(error, sqlite3.Error | MemoryError) else error
        self._database.execute("RELEASE operation")
        return result

    def _give_space_back(self) -> None:
        """Give some free pages back to the disk; the others are used again, or given back after the next removal."""
        self._table.has_removed = False
        try:
            # A script, because `execute` runs one step of it, which frees one page; so it is no part of a transaction.
            self._database.executescript(f"PRAGMA incremental_vacuum({ROWS_PER_STEP})")
        except sqlite3.Error:
            logger.exception("Free space of %s could not be given back; trying again after the next removal", self.path)

    @contextmanager
    def _errors_translated(self) -> Iterator[None]:
        """Raises `JobStoreUnavailableError` in place of an error of the database or of the file system."""
        try:
            yield
        except (sqlite3.Error, MemoryError) as error:
            raise self._unavailable(error) from error
        except OSError as error:
            problem = f"{error.strerror} ({error.filename})"
            remedy = "give another store_path, or make the folder writable"
            raise JobStoreUnavailableError(self.path, problem, remedy) from error

    def _unavailable(self, error: sqlite3.Error | MemoryError) -> JobStoreUnavailableError:
        name = getattr(error, "sqlite_errorname", "") or ""
        return JobStoreUnavailableError(
            self.path, str(error), _REMEDIES.get("_".join(name.split("_")[:2]), "check its disk")
        )


def _chosen(job_ids: Sequence[str] | None, which: JobFilter) -> tuple[str, list[Any]]:
    """The SQL condition that selects these jobs, or all, of those that match `which`, and its values."""
    condition, values = condition_of(which)
    if job_ids is None:
        return condition, values
    of_these = "job_id IN (SELECT value FROM json_each(?))"
    return f"{condition} AND {of_these}", [*values, to_json(list(job_ids)).decode()]
