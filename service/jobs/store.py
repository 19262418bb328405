"""The contract of job stores; `MemoryJobStore` and `SqliteJobStore` fulfil it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

from modalkit.service.jobs.errors import IdempotencyKeyReusedError
from modalkit.service.jobs.model import (
    DeliveryRecord,
    DeliveryStatus,
    Job,
    JobEnd,
    JobFilter,
    JobPage,
    JobRetry,
    JobStatus,
    Recovery,
)


@dataclass(frozen=True, slots=True)
class JobCounts:
    """How many jobs there are of each kind, zeros included."""

    statuses: Mapping[JobStatus, int]
    deliveries: Mapping[DeliveryStatus, int]


class JobStore(Protocol):
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

    async def __aenter__(self) -> Self: ...  # protocol methods have no body

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> bool | None: ...

    async def add(self, jobs: Sequence[Job]) -> list[str | IdempotencyKeyReusedError]:
        """Store queued jobs: all of them or, when it raises, none. Returns the id of each, in the same order.

        A job whose idempotency key is stored already is not added: its place has the id of the job with that key or,
        if that job asked for something else, an error. Raises `DuplicateJobError` for an id that is stored already or
        comes twice, and `JobStoreFullError` when the store would hold more than its limit, ended jobs included.
        """
        ...

    async def get(self, job_id: str) -> Job | None:
        """The job of this id, or None if there is none (any more)."""
        ...

    async def page(self, limit: int, which: JobFilter, cursor: int | None = None) -> JobPage:
        """Up to `limit` jobs that match `which`, the newest first, starting at the `next_cursor` of another page.

        A page that would have more than `PAGE_BYTES` has fewer jobs; `next_cursor` tells whether more follow.
        """
        ...

    async def claim(self, model_name: str, limit: int, now: float, *, bulk_limit: int = 0) -> list[Job]:
        """Make up to `limit` queued jobs of a model running, and return them.

        Quarantined jobs and jobs that wait for a retry are skipped. Interactive jobs go before bulk ones, but up to
        `bulk_limit` bulk jobs are claimed first. Jobs of one priority are claimed in the order of their addition.
        """
        ...

    async def claim_quarantined(self, model_name: str, limit: int, now: float) -> list[Job]:
        """Make a group of quarantined jobs of a model running, and return them.

        The group has jobs with the fewest crashes, as many as `quarantine_group_size` says.
        """
        ...

    async def requeue(self, retries: Sequence[JobRetry]) -> None:
        """Queue running jobs again, to be claimed once `release_retries` has released them.

        Jobs that are not running are left as they are.
        """
        ...

    async def release_retries(self, model_name: str, now: float) -> float | None:
        """Make jobs claimable whose `retry_at` has come; returns the next `retry_at` of the model's jobs, if any.

        One call releases a limited number: if more are due, the time returned has come already. An infinite `now`
        makes all due.
        """
        ...

    async def finish(self, ends: Sequence[JobEnd]) -> list[str]:
        """End jobs and, in the same step, make the deliveries due of those that named a queue for such an end.

        Returns the ids of the jobs that ended, in the order given. A job that cannot end so, because it was cancelled
        meanwhile or is unknown, is left as it is, and its id is left out.
        """
        ...

    async def cancel(self, job_id: str, now: float) -> Job | None:
        """Cancel a queued or running job; one that has ended is left as it is. Returns the job, or None if unknown."""
        ...

    async def expire(self, limit: int, now: float) -> list[str]:
        """End up to `limit` queued jobs whose `expires_at` has come, as `finish` does; returns their ids."""
        ...

    async def claim_deliveries(
        self, limit: int, now: float, *, queue_limits: Mapping[str, int], queue_limit: int
    ) -> Sequence[Job]:
        """Claim up to `limit` deliveries that are due, and return their jobs; they are not due until recorded.

        At most `queue_limit` of them go to the same queue; `queue_limits` has the limits of queues that differ. Queues
        come in turns; of one queue, the deliveries that became due first are claimed. Quarantined ones are skipped.
        """
        ...

    async def claim_quarantined_deliveries(self, limit: int) -> Sequence[Job]:
        """Claim a group of quarantined deliveries, and return their jobs.

        The group has those with the fewest crashes, as many as `quarantine_group_size` says.
        """
        ...

    async def record_deliveries(self, records: Sequence[DeliveryRecord]) -> None:
        """Record the results of attempts to deliver. Jobs whose delivery is not pending are left as they are."""
        ...

    async def replay(self, job_ids: Sequence[str] | None, now: float) -> int:
        """Make the deliveries due of those of these jobs, or of all, that are undelivered; returns how many.

        Many are changed in several steps, so that other calls go on between them.
        """
        ...

    async def recover(self, now: float) -> Recovery:
        """Recover what was claimed by a process that has ended: called once, before anything is claimed.

        Running jobs are queued again, in their old order, and claimed deliveries are due again; both are quarantined
        or, after too many crashes, failed and undelivered.
        """
        ...

    async def remove_finished(self, before: float) -> int:
        """Remove jobs that ended before that time and have nothing left to deliver; returns how many.

        Undelivered ones stay. Many are removed in several steps, so that other calls go on between them; when
        cancelled, some are left.
        """
        ...

    async def purge(self, which: JobFilter) -> int:
        """Remove ended jobs that match `which`, undelivered ones included, pending ones not; returns how many.

        In several steps, as `remove_finished` does.
        """
        ...

    async def counts(self) -> JobCounts:
        """How many jobs there are of each kind; takes the same time however many there are."""
        ...
