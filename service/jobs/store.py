"""What a job store promises; `MemoryJobStore` and `SqliteJobStore` keep it."""

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Protocol, Self

from service.jobs.model import DeliveryRecord, FinishedJob, Job, JobStatus, NewJob


class JobStore(Protocol):
    """Keeps jobs from the moment they are accepted until their results have been delivered and their time is over.

    An asynchronous context manager: whoever opens a store owns it, calls `requeue_running` once before anything is
    taken, and closes it in the task that opened it. Times are wall-clock Unix seconds and always passed in: a store
    never reads a clock. They are kept to the microsecond.

    Each call is one atomic step, and what it changed is stored when it returns (on disk, where a store has one).
    Several workers, one for each model, may share a store. A cancelled call has happened whole or not at all, and the
    caller cannot know which. Raises `JobStoreClosedError` when used while not open, and other `JobStoreError`s where
    the store fails.
    """

    durable: bool
    """Whether jobs outlive the process."""

    async def __aenter__(self) -> Self: ...  # protocol methods have no body

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> bool | None: ...

    async def add(self, jobs: Sequence[NewJob]) -> None:
        """Store new jobs as queued: all of them or, when it raises, none.

        Raises `DuplicateJobError` for an id that is stored already or comes twice, and `JobStoreFullError` when the
        store would hold more than its limit, ended jobs included.
        """
        ...

    async def get(self, job_id: str) -> Job | None:
        """The job of this id, or None if there is none (any more)."""
        ...

    async def take(self, model_name: str, limit: int, now: float, *, bulk_places: int = 0) -> list[Job]:
        """Make up to `limit` queued jobs of a model running, and return them.

        Interactive jobs go before bulk ones, but up to `bulk_places` of the `limit` are for bulk ones in any case. The
        jobs of one class come in the order in which they were added.
        """
        ...

    async def finish(self, outcomes: Sequence[FinishedJob]) -> list[Job]:
        """End jobs and, in the same step, mark those for delivery that named a queue for such an end.

        Returns the ended jobs, in the order given. A job that is in no state to end so, because it was cancelled
        meanwhile or is unknown, is left alone and left out: only a running job succeeds or fails, only a running or
        queued one expires.
        """
        ...

    async def cancel(self, job_id: str, now: float) -> Job | None:
        """Cancel a queued or running job; one that has ended is left as it is. Returns the job, or None if unknown."""
        ...

    async def pending_deliveries(self, limit: int, after: Job | None = None) -> list[Job]:
        """Up to `limit` jobs whose delivery is pending, those that ended first coming first.

        `after` is the last job of the page before. Jobs that end at the same time are ordered by their ids.
        """
        ...

    async def record_delivery(self, records: Sequence[DeliveryRecord]) -> None:
        """Note how deliveries went. Jobs that are unknown, or have nothing to deliver, are left alone."""
        ...

    async def requeue_running(self) -> int:
        """Make all running jobs queued again, in their old places, because nobody runs them; returns how many."""
        ...

    async def remove_finished(self, before: float) -> int:
        """Remove jobs that ended before that time and have no delivery pending; returns how many.

        Many are removed in several steps, so that other calls go on between them; when cancelled, some are left.
        """
        ...

    async def counts(self) -> Mapping[JobStatus, int]:
        """How many jobs there are in each status, zeros included; costs the same however many there are."""
        ...
