"""Moves the stored jobs of one model into its scheduler, a window at a time, and stores what becomes of them."""

import heapq
import logging
import math
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Protocol, Self

import anyio

from modalkit.batching import Failure, Outcome, Priority, QueueFullError, SchedulerClosedError
from modalkit.batching.task_groups import plain_task_group
from modalkit.pipelines import InferenceOutputModel
from modalkit.service.errors import OutputNotJsonError, ServiceError, describe_error
from modalkit.service.jobs.delivery import backoff_with_jitter
from modalkit.service.jobs.errors import JobStoreError
from modalkit.service.jobs.gathering import Gathering
from modalkit.service.jobs.manager import JobManager
from modalkit.service.jobs.model import FinishedJob, Job, JobRetry, JobStatus
from modalkit.service.jobs.store import EXPIRED_IN_THE_QUEUE
from modalkit.service.outputs import output_json

logger = logging.getLogger(__name__)

RETRY_S = 0.05
LONGEST_RETRY_S = 5.0
BULK_WINDOW_DIVISOR = 10
"""Bulk jobs get at least one in N places of the window."""
LARGEST_RESULT_BYTES = 100 * 2**20
SPARE_DEADLINES = 10_000
FIRST_JOB_RETRY_S = 2.0
"""Most seconds after its first attempt until a job runs again; each later wait is four times as long."""

JobOutcome = Outcome[InferenceOutputModel]


class JobEngine(Protocol):
    """What runs jobs, in the two ways that a runner needs."""

    def start(self, job: Job, on_outcome: Callable[[JobOutcome], None]) -> Callable[[], None]:
        """Run a job in some batch and call `on_outcome` in the event loop with what became of it.

        Returns a function that withdraws it: then `on_outcome` is not called any more. Raises `QueueFullError`, and
        whatever is wrong with the job.
        """
        ...

    async def run_as_one_batch(self, jobs: Sequence[Job]) -> Sequence[JobOutcome]:
        """Run jobs while no other is in the pipeline; returns the outcome of each, in their order.

        Raises what the batch raises, `BatchTimeoutError` included.
        """
        ...


class ResultTooLargeError(ServiceError):
    """Raised for a result that is too large to be stored."""

    def __init__(self, size_bytes: int) -> None:
        super().__init__(f"the result has {size_bytes} bytes, more than the {LARGEST_RESULT_BYTES} that are stored")


@dataclass(slots=True)
class _Running:
    """A job in the window."""

    job: Job
    withdraw: Callable[[], None]


class JobRunner:
    """Feeds the jobs of one model to an engine, at most `window` at a time, however many are stored.

    Interactive jobs go before bulk ones, which keep a tenth of the window. First of all, those that were running when a
    process died run again, in groups of at most `largest_group` that have the pipeline to themselves: so the one that
    kills the process is found (see `suspects_together`). After each group as many others run, so that these wait for no
    more than one. A group that raises kills nothing: its jobs run on as others do. One that hangs runs one by one.

    A job that fails although nothing says that it is to blame (`Failure.is_systemic`) is run again later, up to
    `max_attempts` times in all, with waits of 1 to 2 s, 4 to 8 s, 16 to 32 s and so on, if it does not expire before.
    `timeout_s` counts from a job's first dispatch: one that takes longer expires. Use it as an async context manager,
    inside that of its open `JobManager`. Leaving it takes no more jobs and finishes those in the window; the others
    stay in a durable store for the next start, and are run before leaving where the store is not durable. Left by an
    exception, it abandons the window: those jobs run again at the next start. Jobs that wait to run again do so at
    once, and for the last time, where the store is not durable.
    """

    def __init__(
        self,
        manager: JobManager,
        model_name: str,
        engine: JobEngine,
        *,
        window: int,
        largest_group: int = 1,
        timeout_s: float = 3600.0,
        max_attempts: int = 1,
        backoff_s: Callable[[int], float] = partial(backoff_with_jitter, first_s=FIRST_JOB_RETRY_S),
    ) -> None:
        self._manager = manager
        self._model_name = model_name
        self._engine = engine
        self._window = window
        self._largest_group = min(largest_group, window)
        self._timeout_s = timeout_s
        self._max_attempts = max_attempts
        self._backoff_s = backoff_s
        # All mutable state: the jobs in the window, and how many of them are bulk; those of them that have no room in
        # the scheduler yet; when they expire, as a heap; the ends that are to be stored, and how many have not been;
        # when the next job in the store may run again; what wakes the feeder; and whether more is to be done.
        self._running: dict[str, _Running] = {}
        self._bulk_running = 0
        self._waiting: deque[Job] = deque()
        self._deadlines: list[tuple[float, str]] = []
        self._ended: Gathering[tuple[Job, FinishedJob | JobRetry]] = Gathering()
        self._unstored = 0
        self._next_retry_at = -math.inf
        self._change = anyio.Event()
        self._closing = anyio.Event()
        self._engine_closed = False
        self._tasks = plain_task_group()

    async def __aenter__(self) -> Self:
        task_group = await self._tasks.__aenter__()
        task_group.start_soon(self._feed)
        task_group.start_soon(self._store_ends)
        self._manager.attach(self._model_name, self)
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        self._closing.set()
        self.wake()
        try:
            return await self._tasks.__aexit__(exc_type, exc, traceback)
        finally:
            for running in self._running.values():
                running.withdraw()
            self._manager.detach(self._model_name)

    @property
    def running(self) -> int:
        """How many jobs are in the window."""
        return len(self._running)

    def wake(self) -> None:
        """Look for jobs in the store; called when one was added."""
        self._change.set()

    def abandon(self, job_id: str) -> None:
        """Let go of a job that was cancelled in the store, if it is in the window."""
        if self._leave(job_id) is not None:
            self.wake()

    # Feeding.

    async def _feed(self) -> None:
        """Run jobs until closed: suspects in turns with others, then the others, with the window kept filled."""
        while await self._run_suspects():
            await self._run_others(self._largest_group)
        await self._run_others()
        self._ended.close()

    async def _run_others(self, most: float = math.inf) -> None:
        """Run jobs as they come, until closed; a store that is not durable is emptied first.

        With `most`, run so many, or as many as there are, and those of a group that raised; return when all have ended.
        """
        places, left = min(most, self._window), most
        while not self._engine_closed:
            self._change = anyio.Event()
            draining, durable = self._closing.is_set(), self._manager.store.durable
            free = max(0, self._window - len(self._running) - self._unstored)
            wanted = 0 if (draining and durable) or self._waiting else int(min(left, free))
            taken = await self._take(wanted, int(places)) if wanted else []
            left -= len(taken)
            for job in taken:
                self._enter(job)
            self._waiting += taken
            self._expire_overdue()
            self._start_waiting()
            if len(taken) == wanted > 0:
                continue
            if not self._running and not self._unstored and (draining or not math.isinf(most)):
                return
            with anyio.move_on_after(self._sleep_s(may_take=wanted > 0 and not draining)):
                await self._change.wait()

    async def _run_suspects(self) -> bool:
        """Run a group of suspects, if there is one, and have their ends stored; returns whether there may be more."""
        if self._engine_closed or (self._closing.is_set() and self._manager.store.durable):
            return False
        # One group at a time in the whole process: whoever is running when it dies again must be in it.
        async with self._manager.one_group:
            try:
                group = await self._manager.store.take_suspects(
                    self._model_name, self._largest_group, self._manager.clock()
                )
            except JobStoreError as error:
                await self._wait_for_the_store(error)
                return True
            for job in group:
                self._enter(job)
            self._expire_overdue()
            await self._run_group([job for job in group if job.job_id in self._running])
            while self._unstored:
                self._change = anyio.Event()
                await self._change.wait()
        return bool(group)

    async def _run_group(self, jobs: Sequence[Job]) -> None:
        """Run jobs with the pipeline to themselves; those of a group that raises or hangs wait for the scheduler then.

        A job that is cancelled meanwhile runs to its end, and its outcome is dropped.
        """
        if not jobs:
            return
        try:
            outcomes = await self._engine.run_as_one_batch(jobs)
        except SchedulerClosedError as error:
            outcomes = [Failure(error)] * len(jobs)
        except Exception:  # noqa: BLE001  # the scheduler finds out whose error it is, or who hangs
            self._waiting += jobs
            return
        for job, outcome in zip(jobs, outcomes, strict=True):
            self._end(job, outcome)

    async def _take(self, limit: int, places: int) -> Sequence[Job]:
        """Take jobs from the store for so many places, those included whose time to run again has come."""
        # One place is too small to share.
        kept = min(places - 1, -(-places // BULK_WINDOW_DIVISOR))
        store, now = self._manager.store, self._manager.clock()
        try:
            if self._closing.is_set() and not store.durable:
                await store.release_retries(self._model_name, math.inf)
            elif self._next_retry_at <= now:
                self._next_retry_at = math.inf  # before the call: meanwhile a job may be told to run again sooner
                next_retry_at = await store.release_retries(self._model_name, now)
                self._next_retry_at = min(self._next_retry_at, math.inf if next_retry_at is None else next_retry_at)
            return await store.take(self._model_name, limit, now, bulk_places=max(0, kept - self._bulk_running))
        except JobStoreError as error:
            self._next_retry_at = -math.inf
            await self._wait_for_the_store(error)
            self.wake()
            return []

    async def _wait_for_the_store(self, error: JobStoreError) -> None:
        logger.error("No jobs could be taken; trying again in %g s: %s", LONGEST_RETRY_S, error)
        with anyio.move_on_after(LONGEST_RETRY_S):
            await self._closing.wait()

    def _enter(self, job: Job) -> None:
        """Take a job into the window."""
        self._running[job.job_id] = _Running(job, _nothing)
        self._bulk_running += job.priority is Priority.BULK
        heapq.heappush(self._deadlines, (self._deadline(job), job.job_id))

    def _leave(self, job_id: str) -> Job | None:
        """Take a job out of the window, and the scheduler, and return it, if it is still there."""
        running = self._running.pop(job_id, None)
        if running is None:
            return None
        running.withdraw()
        self._bulk_running -= running.job.priority is Priority.BULK
        return running.job

    def _start_waiting(self) -> None:
        """Hand jobs to the engine, as far as it has room: interactive requests may fill its queue."""
        while self._waiting:
            job = self._waiting[0]
            running = self._running.get(job.job_id)
            if running is not None:
                try:
                    running.withdraw = self._engine.start(job, partial(self._end, job))
                except QueueFullError:
                    return
                except Exception as error:  # noqa: BLE001  # an item that is none any more fails alone
                    self._end(job, Failure(error))
            self._waiting.popleft()

    def _sleep_s(self, *, may_take: bool) -> float | None:
        """Until something may have to be done without anybody saying so."""
        if self._waiting:
            return RETRY_S
        until = self._deadlines[0][0] if self._deadlines else math.inf
        if may_take:
            until = min(until, self._next_retry_at)
        return None if math.isinf(until) else max(0.0, until - self._manager.clock())

    # Ending.

    def _end(self, job: Job, outcome: JobOutcome) -> None:
        """Called in the event loop with what became of a job."""
        if self._leave(job.job_id) is None:
            return
        if isinstance(outcome, Failure) and isinstance(outcome.error, SchedulerClosedError):
            self._engine_closed = True  # what has not ended runs again after the next start
        else:
            self._has_ended(job, self._retry(job, outcome) or self._finished(job, outcome))
        self.wake()

    def _retry(self, job: Job, outcome: JobOutcome) -> JobRetry | None:
        """When and why a job is to run again, if it may be no fault of its own that it failed."""
        attempt = job.attempts + 1
        may_retry = attempt < self._max_attempts and (self._manager.store.durable or not self._closing.is_set())
        if not (isinstance(outcome, Failure) and outcome.is_systemic and may_retry):
            return None
        retry_at = self._manager.clock() + self._backoff_s(attempt)
        if retry_at >= self._deadline(job):
            return None
        return JobRetry(job_id=job.job_id, retry_at=retry_at, error=describe_error(outcome.error))

    def _has_ended(self, job: Job, end: FinishedJob | JobRetry) -> None:
        """Have an end stored; until it is, the job keeps its place in the window."""
        self._unstored += 1
        self._ended.add((job, end))

    def _finished(self, job: Job, outcome: JobOutcome) -> FinishedJob:
        result, now = _result_of(outcome), self._manager.clock()
        if isinstance(result, str):
            return FinishedJob(job_id=job.job_id, status=JobStatus.SUCCEEDED, result_json=result, finished_at=now)
        error = describe_error(result)
        return FinishedJob(job_id=job.job_id, status=JobStatus.FAILED, error=error, finished_at=now)

    def _expire_overdue(self) -> None:
        now = self._manager.clock()
        if len(self._deadlines) > 2 * len(self._running) + SPARE_DEADLINES:
            # Those of jobs that have ended lie behind that of one which takes long.
            self._deadlines = [entry for entry in self._deadlines if entry[1] in self._running]
            heapq.heapify(self._deadlines)
        while self._deadlines and (self._deadlines[0][0] <= now or self._deadlines[0][1] not in self._running):
            _, job_id = heapq.heappop(self._deadlines)
            running = self._running.get(job_id)
            if running is not None:
                self._expire(running.job)

    def _expire(self, job: Job) -> None:
        if self._leave(job.job_id) is None:
            return
        timed_out = f"the job did not finish within its timeout of {self._timeout_s:g} s"
        by_its_own = job.expires_at is not None and self._deadline(job) == job.expires_at
        end = FinishedJob(
            job_id=job.job_id,
            status=JobStatus.EXPIRED,
            error=EXPIRED_IN_THE_QUEUE if by_its_own else timed_out,
            finished_at=self._manager.clock(),
        )
        self._has_ended(job, end)

    def _deadline(self, job: Job) -> float:
        """When the job expires if it has not ended."""
        started_at = self._manager.clock() if job.started_at is None else job.started_at
        timeout_at = started_at + self._timeout_s
        return timeout_at if job.expires_at is None else min(timeout_at, job.expires_at)

    async def _store_ends(self) -> None:
        """Store how jobs ended, all those together that ended meanwhile."""
        while ended := await self._ended.take():
            finished = [(job, end) for job, end in ended if isinstance(end, FinishedJob)]
            retries = [end for _, end in ended if isinstance(end, JobRetry)]
            if finished:
                await self._store(len(finished), partial(self._manager.finish, finished))
            if retries:
                _log_retries(self._model_name, retries)
                await self._store(len(retries), partial(self._manager.store.retry_later, retries))
                self._next_retry_at = min(self._next_retry_at, *(retry.retry_at for retry in retries))
            self._unstored -= len(ended)
            self.wake()

    async def _store(self, jobs: int, store: Callable[[], Awaitable[None]]) -> None:
        """Store ends, trying for as long as the runner is open: without it the jobs would run again."""
        delay_s = RETRY_S
        while True:
            try:
                return await store()
            except JobStoreError:
                logger.exception("The ends of %d jobs could not be stored", jobs)
                if self._closing.is_set():
                    return None  # they stay running in the store, and run again after the next start
            with anyio.move_on_after(delay_s):
                await self._closing.wait()
            delay_s = min(2 * delay_s, LONGEST_RETRY_S)


def _log_retries(model_name: str, retries: Sequence[JobRetry]) -> None:
    last = retries[-1]
    logger.warning(
        "%s: %d jobs failed together and run again later; the last one, job %s: %s",
        *(model_name, len(retries), last.job_id, last.error),
    )


def _result_of(outcome: JobOutcome) -> str | Exception:
    """What is stored of a job that succeeded, or the error of one that failed."""
    if isinstance(outcome, Failure):
        return outcome.error
    try:
        result = output_json(outcome.value).decode()
    except OutputNotJsonError as error:
        return error
    return result if len(result) <= LARGEST_RESULT_BYTES else ResultTooLargeError(len(result))


def _nothing() -> None:
    pass
