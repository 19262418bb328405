"""Moves the stored jobs of one model into its scheduler, a window at a time, and stores what becomes of them."""

import heapq
import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Protocol, Self

import anyio

from batching import Failure, Outcome, Priority, QueueFullError, SchedulerClosedError, Success
from batching.task_groups import plain_task_group
from pipelines import InferenceOutputModel
from service.errors import OutputNotJsonError, ServiceError, describe_error
from service.jobs.errors import JobStoreError
from service.jobs.gathering import Gathering
from service.jobs.manager import JobManager
from service.jobs.model import FinishedJob, Job, JobStatus
from service.jobs.store import EXPIRED_IN_THE_QUEUE
from service.outputs import output_json

logger = logging.getLogger(__name__)

RETRY_S = 0.05
LONGEST_RETRY_S = 5.0
BULK_SHARE_OF_THE_WINDOW = 10
"""Interactive jobs leave bulk ones one place of so many, so that these go on however many of those come."""
LARGEST_RESULT_BYTES = 100 * 2**20
SPARE_DEADLINES = 10_000

JobOutcome = Outcome[InferenceOutputModel]


class JobEngine(Protocol):
    """What runs jobs, in the two ways that a runner needs."""

    def start(self, job: Job, on_outcome: Callable[[JobOutcome], None]) -> Callable[[], None]:
        """Run a job in some batch and call `on_outcome` in the event loop with what became of it.

        Returns a function that withdraws it: then `on_outcome` is not called any more. Raises `QueueFullError`, and
        whatever is wrong with the job.
        """
        ...

    async def run_alone(self, job: Job) -> InferenceOutputModel:
        """Run a job while no other is in the pipeline; raises its error."""
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
    process died run again, one by one and alone in the pipeline, so that one which kills the process is found.
    `timeout_s` counts from a job's first dispatch: one that takes longer expires. Use it as an async context manager,
    inside that of its open `JobManager`. Leaving it takes no more jobs and finishes those in the window; the others
    stay in a durable store for the next start, and are run before leaving where the store is not durable. Left by an
    exception, it abandons the window: those jobs run again at the next start.
    """

    def __init__(
        self, manager: JobManager, model_name: str, engine: JobEngine, *, window: int, timeout_s: float = 3600.0
    ) -> None:
        self._manager = manager
        self._model_name = model_name
        self._engine = engine
        self._window = window
        self._timeout_s = timeout_s
        # All mutable state: the jobs in the window, and how many of them are bulk; those of them that have no room in
        # the scheduler yet; when they expire, as a heap; the ends that are to be stored, and how many have not been;
        # what wakes the feeder; and whether more is to be done.
        self._running: dict[str, _Running] = {}
        self._bulk_running = 0
        self._waiting: deque[Job] = deque()
        self._deadlines: list[tuple[float, str]] = []
        self._ended: Gathering[tuple[Job, FinishedJob]] = Gathering()
        self._unstored = 0
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
        """Keep the window filled until closed; a store that is not durable is emptied first."""
        await self._run_suspects()
        while True:
            self._change = anyio.Event()
            draining = self._closing.is_set()
            free = max(0, self._window - len(self._running) - self._unstored)
            may_take = not (draining and self._manager.store.durable) and not self._waiting
            taken = await self._take(free) if free and may_take else []
            for job in taken:
                self._enter(job)
            self._expire_overdue()
            self._start_waiting()
            if len(taken) == free > 0:
                continue
            if self._engine_closed or (draining and not self._running and not self._unstored):
                break
            with anyio.move_on_after(self._sleep_s()):
                await self._change.wait()
        self._ended.close()

    async def _run_suspects(self) -> None:
        while not (self._engine_closed or (self._closing.is_set() and self._manager.store.durable)):
            # One at a time in the whole process: whoever is running when it dies again must be the only one.
            async with self._manager.one_suspect:
                try:
                    job = await self._manager.store.take_suspect(self._model_name, self._manager.clock())
                except JobStoreError as error:
                    await self._wait_for_the_store(error)
                    continue
                if job is None:
                    return
                await self._run_alone(job)

    async def _run_alone(self, job: Job) -> None:
        """Run a job, alone, and store how it ended. One that is cancelled meanwhile is finished, and not heard."""
        self._enter(job, _nothing)
        if self._deadline(job) <= self._manager.clock():
            self._expire(job)
        else:
            outcome: JobOutcome
            try:
                outcome = Success(await self._engine.run_alone(job))
            except Exception as error:  # noqa: BLE001  # whatever the pipeline raised is this job's error
                outcome = Failure(error)
            self._end(job, outcome)
        while self._unstored:
            self._change = anyio.Event()
            await self._change.wait()

    async def _take(self, limit: int) -> Sequence[Job]:
        # A window of one place is too small to share.
        kept = min(self._window - 1, -(-self._window // BULK_SHARE_OF_THE_WINDOW))
        try:
            return await self._manager.store.take(
                self._model_name, limit, self._manager.clock(), bulk_places=max(0, kept - self._bulk_running)
            )
        except JobStoreError as error:
            await self._wait_for_the_store(error)
            self.wake()
            return []

    async def _wait_for_the_store(self, error: JobStoreError) -> None:
        logger.error("No jobs could be taken; trying again in %g s: %s", LONGEST_RETRY_S, error)
        with anyio.move_on_after(LONGEST_RETRY_S):
            await self._closing.wait()

    def _enter(self, job: Job, withdraw: Callable[[], None] | None = None) -> None:
        """Take a job into the window."""
        self._running[job.job_id] = _Running(job, withdraw or _nothing)
        self._bulk_running += job.priority is Priority.BULK
        heapq.heappush(self._deadlines, (self._deadline(job), job.job_id))
        if withdraw is None:
            self._waiting.append(job)

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

    def _sleep_s(self) -> float | None:
        """Until something may have to be done without anybody saying so."""
        if self._waiting:
            return RETRY_S
        if not self._deadlines:
            return None
        return max(0.0, self._deadlines[0][0] - self._manager.clock())

    # Ending.

    def _end(self, job: Job, outcome: JobOutcome) -> None:
        """Called in the event loop with what became of a job."""
        if self._leave(job.job_id) is None:
            return
        if isinstance(outcome, Failure) and isinstance(outcome.error, SchedulerClosedError):
            self._engine_closed = True  # what has not ended runs again after the next start
        else:
            self._has_ended(job, self._finished(job, outcome))
        self.wake()

    def _has_ended(self, job: Job, end: FinishedJob) -> None:
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
            await self._finish(ended)
            self._unstored -= len(ended)
            self.wake()

    async def _finish(self, ended: Sequence[tuple[Job, FinishedJob]]) -> None:
        """Store ends, trying for as long as the runner is open: without it the jobs would run again."""
        delay_s = RETRY_S
        while True:
            try:
                return await self._manager.finish(ended)
            except JobStoreError:
                logger.exception("The ends of %d jobs could not be stored", len(ended))
                if self._closing.is_set():
                    return None  # they stay running in the store, and run again after the next start
            with anyio.move_on_after(delay_s):
                await self._closing.wait()
            delay_s = min(2 * delay_s, LONGEST_RETRY_S)


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
