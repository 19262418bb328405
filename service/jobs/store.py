"""What a job store promises; `MemoryJobStore` and `SqliteJobStore` keep it."""

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

from modalkit.service.jobs.errors import IdempotencyKeyReusedError
from modalkit.service.jobs.model import (
    DeliveryRecord,
    DeliveryStatus,
    FinishedJob,
    Job,
    JobFilter,
    JobPage,
    JobRetry,
    JobStatus,
    NewJob,
    Recovery,
)

CRASHES_TOGETHER = 3
"""How often a suspect may be running when the process dies before it runs alone: in a group, and in a smaller one."""
CRASHES_ALONE = 3
"""How often the process may die with a suspect that runs alone before that has failed."""
MAX_CRASHES = CRASHES_TOGETHER + CRASHES_ALONE
SMALLER_GROUP_DIVISOR = 8
TOO_MANY_CRASHES = (
    f"the process died {CRASHES_ALONE} times while this job ran alone, so it is not run again; "
    "if something else stopped the process, submit the job once more"
)
TOO_MANY_DELIVERY_CRASHES = (
    f"the process died {CRASHES_ALONE} times while this message alone was being sent, so it is not sent again; "
    "replay it once the queue backend no longer ends the process"
)
EXPIRED_IN_THE_QUEUE = "the job did not end within its expires_in"


def suspects_together(crashes: int, largest: int) -> int:
    """How many suspects run together, or are sent together, that were in hand at so many deaths of the process.

    After the first death `largest`, after the second an eighth of them, then one alone: so the one that kills the
    process is found in few deaths, and the others run soon.
    """
    if crashes >= CRASHES_TOGETHER:
        return 1
    return largest if crashes <= 1 else max(1, largest // SMALLER_GROUP_DIVISOR)


@dataclass(frozen=True, slots=True)
class JobCounts:
    """How many jobs there are of each kind, zeros included."""

    statuses: Mapping[JobStatus, int]
    deliveries: Mapping[DeliveryStatus, int]


class JobStore(Protocol):
    """Keeps jobs from the moment they are accepted until their results have been delivered and their time is over.

    An asynchronous context manager: whoever opens a store owns it, calls `recover` once before anything is taken, and
    closes it in the task that opened it. Times are wall-clock Unix seconds and always passed in: a store never reads a
    clock. They are kept to the microsecond.

    Each call is one atomic step unless it says otherwise, and what it changed is stored when it returns (on disk, where
    a store has one). Several workers, one for each model, may share a store. A cancelled call has happened whole or not
    at all, and the caller cannot know which. Raises `JobStoreClosedError` when used while not open, and other
    `JobStoreError`s where the store fails.
    """

    durable: bool
    """Whether jobs outlive the process."""

    async def __aenter__(self) -> Self: ...  # protocol methods have no body

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> bool | None: ...

    async def add(self, jobs: Sequence[NewJob]) -> list[str | IdempotencyKeyReusedError]:
        """Store new jobs as queued: all of them or, when it raises, none. Returns the id of each, in the same order.

        A job whose idempotency key is taken is not stored: its id is that of the job that has the key, or, if that one
        asked for something else, an error is in its place. Raises `DuplicateJobError` for an id that is stored already
        or comes twice, and `JobStoreFullError` when the store would hold more than its limit, ended jobs included.
        """
        ...

    async def get(self, job_id: str) -> Job | None:
        """The job of this id, or None if there is none (any more)."""
        ...

    async def page(self, limit: int, which: JobFilter, cursor: int | None = None) -> JobPage:
        """Up to `limit` jobs that `which` covers, the newest first; `cursor` is what the page before says is next.

        A page has fewer where more would have too many bytes (`PAGE_BYTES`); its `next_cursor` says whether any follow.
        """
        ...

    async def take(self, model_name: str, limit: int, now: float, *, bulk_places: int = 0) -> list[Job]:
        """Make up to `limit` queued jobs of a model running, and return them.

        Suspects are not among them, nor jobs that wait to run again. Interactive jobs go before bulk ones, but up to
        `bulk_places` of the `limit` are for bulk ones in any case. The jobs of one class come in the order in which
        they were added.
        """
        ...

    async def take_suspects(self, model_name: str, largest: int, now: float) -> list[Job]:
        """Make a group of suspects running: queued jobs that were running when a process died.

        Those that were least often, and as many of them as `suspects_together` says.
        """
        ...

    async def retry_later(self, retries: Sequence[JobRetry]) -> None:
        """Queue running jobs again, to be taken when `release_retries` has let go of them; counts their attempts.

        They are no suspects any more, because a run of theirs has ended. Jobs that are not running are left alone.
        """
        ...

    async def release_retries(self, model_name: str, now: float) -> float | None:
        """Let jobs be taken, in their old places, whose `retry_at` has come; returns when the next one's does, if any.

        Many are released in several calls: then the time returned has come already. An infinite `now` releases all.
        """
        ...

    async def finish(self, outcomes: Sequence[FinishedJob], *, in_hand: Container[str] = ()) -> list[str]:
        """End jobs and, in the same step, mark those for delivery that named a queue for such an end.

        Deliveries of jobs `in_hand` count as taken by `take_deliveries`: the caller attempts them at once.
        Returns the ids of the jobs that ended like this, in the order given. A job that is in no state to, because it
        was cancelled meanwhile or is unknown, is left alone and left out: only a running job succeeds or fails, only a
        running or queued one expires.
        """
        ...

    async def cancel(self, job_id: str, now: float) -> Job | None:
        """Cancel a queued or running job; one that has ended is left as it is. Returns the job, or None if unknown."""
        ...

    async def expire(self, limit: int, now: float) -> list[str]:
        """End up to `limit` queued jobs whose `expires_at` has come, as `finish` does; returns their ids."""
        ...

    async def take_deliveries(
        self, limit: int, now: float, *, places: Mapping[str, int], per_queue: int
    ) -> Sequence[Job]:
        """Take up to `limit` jobs whose delivery is due, to attempt it; they are due no more until it is recorded.

        At most `per_queue` of them go to the same queue, or as many as `places` says where it names that queue. Queues
        come in turns; of one queue, those are taken that became due first. No suspects are among them.
        """
        ...

    async def take_suspect_deliveries(self, largest: int) -> Sequence[Job]:
        """Take a group of suspects: jobs whose deliveries were being attempted when a process died.

        Those that were least often, and as many of them as `suspects_together` says.
        """
        ...

    async def record_deliveries(self, records: Sequence[DeliveryRecord]) -> None:
        """Note how deliveries went; none of them is suspect any more, because its attempt has ended.

        Jobs that are unknown, or have nothing to deliver, are left alone.
        """
        ...

    async def replay(self, job_ids: Sequence[str] | None, now: float) -> int:
        """Make the undelivered ones of these jobs, or all that there are, due again with all their attempts.

        Returns how many. Many are changed in several steps, so that other calls go on between them.
        """
        ...

    async def recover(self, now: float) -> Recovery:
        """Take note that nobody runs or delivers any job, because the process that did has ended.

        Running jobs are queued again, in their old places, and deliveries that were being attempted are due; both count
        one crash more. With `MAX_CRASHES`, a job fails, and a delivery is set aside as undelivered.
        """
        ...

    async def remove_finished(self, before: float) -> int:
        """Remove jobs that ended before that time and have nothing left to deliver; returns how many.

        Undelivered ones stay. Many are removed in several steps, so that other calls go on between them; when
        cancelled, some are left.
        """
        ...

    async def purge(self, which: JobFilter) -> int:
        """Remove the ended jobs that `which` covers, undelivered ones included, pending ones not; returns how many.

        In several steps, as `remove_finished` does.
        """
        ...

    async def counts(self) -> JobCounts:
        """How many jobs there are of each kind; costs the same however many there are."""
        ...
