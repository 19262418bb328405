"""Feeds the stored jobs of one model to its scheduler, a limited number at a time, and stores how they end."""

import asyncio
import logging
import math
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Protocol, Self

import anyio
from anyio import AsyncContextManagerMixin
from anyio.abc import TaskGroup
from anyio.lowlevel import current_token
from pydantic import BaseModel

from modalkit.batching import Failure, Outcome, QueueFullError, SchedulerClosedError
from modalkit.batching.errors import users_error
from modalkit.batching.pending import Withdraw
from modalkit.batching.task_groups import plain_task_group
from modalkit.batching.wakeup import Future, asyncio_loop, make_future
from modalkit.pipelines import InferenceOutputModel
from modalkit.service.backoff import backoff_with_jitter
from modalkit.service.jobs.backlog import Backlog
from modalkit.service.jobs.collector import STORE_RETRY_S, Collector, store_until_closing
from modalkit.service.jobs.errors import JobStoreError
from modalkit.service.jobs.life import JobTimeoutError, deadline_of, end_of, retry_of
from modalkit.service.jobs.manager import JobManager
from modalkit.service.jobs.model import Job, JobEnd, JobRetry, JobStatus
from modalkit.service.jobs.store import Added
from modalkit.service.jobs.telemetry import record_end
from modalkit.service.jobs.window import Window

logger = logging.getLogger(__name__)

ROOM_POLL_INTERVAL_S = 0.05
"""Seconds between two attempts to start a job while the scheduler's queue is full."""
CLOCK_INTERVAL_S = 1.0
"""Seconds after which the clock is asked again: one of a test may go faster than time passes."""
BULK_WINDOW_DIVISOR = 10
"""Bulk jobs get at least one in N places of the window."""
MAX_WINDOW_BYTES = 64 * 2**20
"""Bytes of the jobs in a window beyond which no more are claimed. One claim may add as much once more."""
FIRST_JOB_RETRY_S = 2.0
"""Maximum seconds between a job's first attempt and its second; each later wait is four times as long."""

JobOutcome = Outcome[InferenceOutputModel]


class JobEngine(Protocol):
    """Runs jobs, in some batch or as a batch of their own."""

    @property
    def input_model(self) -> type[BaseModel]:
        """The class of the items."""

    @property
    def is_closed(self) -> bool:
        """Whether it takes no more jobs; those that it does not end fail with a `SchedulerClosedError`."""

    def start(self, job: Job, on_outcome: Callable[[JobOutcome], None]) -> Withdraw:
        """Run a job in some batch and call `on_outcome` in the event loop with its outcome.

        Returns a function that withdraws the job: after it, `on_outcome` is not called. Raises `QueueFullError`, and
        what is wrong with the job.
        """
        ...

    async def run_as_one_batch(self, jobs: Sequence[Job]) -> Sequence[JobOutcome]:
        """Run jobs while no other is in the pipeline; returns the outcome of each, in their order.

        Raises what the batch raises, including `BatchTimeoutError`.
        """


@dataclass(slots=True, eq=False)
class _Addition:
    """New jobs of one caller, who awaits what `JobStore.add` returns or raises for them."""

    jobs: Sequence[Job]
    added: Future[Added | Exception]


class JobRunner(AsyncContextManagerMixin):
    """Feeds the jobs of one model to an engine: a window of at most `window` at a time, however many are stored.

    Interactive jobs go before bulk ones, which keep a tenth of the window. Quarantined jobs, which were running when a
    process died, run at the start, in groups of at most `group_limit` with nothing else in the pipeline, so that a job
    that kills the process is found (see `quarantine_group_size`). Between two groups, as many other jobs run. A group
    that raises has killed nothing: its jobs run again as others do. The jobs of a group that hangs run one by one.

    A job that fails systemically, or by a transient error (see `retry_of`), runs again later, up to `max_attempts`
    times in all, with waits of 1 to 2 s, 4 to 8 s, 16 to 32 s and so on. `timeout_s` counts from a job's first start: a
    job that takes longer expires.

    Use it as an async context manager, inside that of its open `JobManager`. Leaving it claims no more jobs and waits
    for those that run; the others stay in a durable store for the next start. From a store that is not durable,
    they are run before leaving, and jobs that wait for a retry run at once, for the last time. When an exception leaves
    the block, the jobs in the window are abandoned and run again at the next start.
    """

    def __init__(
        self,
        manager: JobManager,
        model_name: str,
        engine: JobEngine,
        *,
        window: int,
        group_limit: int = 1,
        timeout_s: float = 3600.0,
        max_attempts: int = 1,
        backoff_s: Callable[[int], float] = partial(backoff_with_jitter, first_s=FIRST_JOB_RETRY_S),
    ) -> None:
        self._manager = manager
        self._model_name = model_name
        self._engine = engine
        self._window = window
        self._group_limit = min(group_limit, window)
        self._timeout_s = timeout_s
        self._max_attempts = max_attempts
        self._backoff_s = backoff_s
        self.input_model = engine.input_model
        # All mutable state.
        self._running = Window()  # the jobs in the window
        self._waiting: deque[Job] = deque()  # those of them that the scheduler has no room for yet
        self._ends: Collector[JobEnd | JobRetry | str] = Collector()  # to be stored
        self._unstored = 0  # how many ends, and new jobs for the window, are not stored yet
        self._adding_bytes = 0  # of these new jobs
        self._queued = Backlog()  # jobs that wait in the store
        self._takes_new = False  # whether new jobs may enter the window without waiting in the store
        self._next_retry_at = -math.inf  # when the next queued job may run again
        self._change = anyio.Event()  # wakes the feeding task
        self._closing = anyio.Event()
        self._engine_closed = False
        self._additions: list[_Addition] = []  # to be stored, which have come in this pass of the event loop
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task_group: TaskGroup | None = None  # until the feeding task has ended

    @asynccontextmanager
    async def __asynccontextmanager__(self) -> AsyncGenerator[Self]:
        self._loop = asyncio_loop(current_token())
        try:
            async with plain_task_group() as task_group:
                self._task_group = task_group
                self._manager.attach(self._model_name, self)
                task_group.start_soon(self._feed)
                task_group.start_soon(self._store_ends)
                try:
                    yield self
                finally:
                    self.close()
        finally:
            self._task_group = None  # also where an exception has left the block
            self._running.withdraw_all()
            self._manager.detach(self._model_name, self)

    @property
    def running(self) -> int:
        """How many jobs are in the window."""
        return len(self._running)

    def wake(self) -> None:
        """Ask the store for jobs: some were queued again, or something else has changed."""
        self._queued.add()
        self._change.set()

    async def add(self, jobs: Sequence[Job]) -> Added:
        """Store new jobs as `JobStore.add` does, and start those that the window has room for.

        Those that come in one pass of the event loop are stored together. When cancelled, they may be stored, and run.
        Once the runner has been left, they are only stored.
        """
        if self._task_group is None:
            return await self._manager.store.add(jobs)
        addition = _Addition(jobs, make_future(self._loop))
        self._additions.append(addition)
        if len(self._additions) == 1:
            self._task_group.start_soon(self._store_additions)
        added = await addition.added
        if isinstance(added, Exception):
            raise added.with_traceback(None)  # others raise it, too
        return added

    async def _store_additions(self) -> None:
        """Store what has come, wake the callers, and start the jobs that the window has room for."""
        additions, self._additions = self._additions, []
        jobs = [job for addition in additions for job in addition.jobs]
        entering, size_bytes = self._let_enter(jobs)
        self._unstored += entering
        self._adding_bytes += size_bytes
        results: Sequence[Added | Exception]
        try:
            with anyio.CancelScope(shield=True):  # else callers would not know what was stored
                results = await self._manager.store.add_each([addition.jobs for addition in additions])
        except Exception as error:  # noqa: BLE001  # the callers raise it
            results = [error] * len(additions)
        self._unstored -= entering
        self._adding_bytes -= size_bytes
        self._queued.add(len(jobs) - entering)
        self._change.set()
        for addition, added in zip(additions, results, strict=True):
            if not addition.added.done():  # else its caller was cancelled
                addition.added.set_result(added)
            if isinstance(added, Exception):
                continue
            for job, job_id in zip(addition.jobs, added, strict=True):
                # Another id is that of an earlier job with the same idempotency key.
                if job.status is JobStatus.RUNNING and job_id == job.job_id:
                    self._enter(job)
                    self._waiting.append(job)
        self._start_waiting()

    def _let_enter(self, jobs: Sequence[Job]) -> tuple[int, int]:
        """Mark the first of these new jobs, those that the window has room for; returns how many, and their bytes."""
        entering = size_bytes = 0
        if self._takes_new and not self._closing.is_set() and not self._engine_closed:
            size_limit = MAX_WINDOW_BYTES - self._running.size_bytes - self._adding_bytes
            for job in jobs[: max(0, self._wanted(math.inf) - self._queued.at_most)]:
                if size_bytes >= size_limit:
                    break
                job.status, job.started_at = JobStatus.RUNNING, job.created_at
                entering += 1
                size_bytes += job.size_bytes
        return entering, size_bytes

    def close(self) -> None:
        """Claim no more jobs, and give those that have not begun back to a durable store. Idempotent."""
        self._closing.set()
        self._change.set()

    def set_limits(self, window: int, group_limit: int) -> None:
        """Change the limits; jobs that are in the window already stay there."""
        self._window = window
        self._group_limit = min(group_limit, window)
        self._change.set()

    def abandon(self, job_id: str) -> None:
        """Withdraw a job that was cancelled in the store, if it is in the window."""
        if self._running.remove(job_id) is not None:
            self._change.set()

    # Feeding.

    async def _feed(self) -> None:
        """Run jobs until closed: quarantined groups in turns with as many others, then the others."""
        while await self._run_quarantined():
            await self._run_queued(self._group_limit)
        await self._run_queued()
        self._task_group = None
        self._ends.close()

    async def _run_quarantined(self) -> bool:
        """Run a quarantined group, if there is one, and have its ends stored; returns whether there may be more."""
        if self._engine_closed or self._leaves_jobs_stored():
            return False
        # One group at a time in the whole process: the jobs that run when it dies again are those of one group.
        async with self._manager.quarantine_lock:
            try:
                group = await self._manager.store.claim_quarantined(
                    self._model_name, self._group_limit, self._manager.clock()
                )
            except JobStoreError as error:
                await self._wait_for_the_store(error)
                return not self._closing.is_set()
            for job in group:
                self._enter(job)
            self._expire_overdue()
            await self._run_group([job for job in group if job in self._running])
            while self._unstored:
                self._change = anyio.Event()
                await self._change.wait()
        return bool(group)

    async def _run_group(self, jobs: Sequence[Job]) -> None:
        """Run jobs with nothing else in the pipeline. If that raises or hangs, they wait for the scheduler instead.

        A job that is cancelled meanwhile runs to its end, and its outcome is dropped.
        """
        if not jobs:
            return
        try:
            outcomes = await self._engine.run_as_one_batch(jobs)
        except Exception as error:  # noqa: BLE001  # the scheduler finds the item that raises or hangs
            if not self._has_closed(error):
                self._waiting += jobs
                return
            outcomes = [Failure(error)] * len(jobs)
        for job, outcome in zip(jobs, outcomes, strict=True):
            self._end(job, outcome)

    async def _run_queued(self, limit: float = math.inf) -> None:
        """Run queued jobs, with the window kept filled, until closed; a store that is not durable is emptied first.

        With a `limit`, run at most that many jobs, and return when all jobs in the window have ended.
        """
        left = limit
        self._takes_new = math.isinf(limit)
        while not self._engine_closed:
            self._change = anyio.Event()
            is_closing = self._closing.is_set()
            room = self._wanted(left)
            claimed: Sequence[Job] = ()
            now, window = self._manager.clock(), int(min(limit, self._window))
            if self._next_retry_at <= now or self._empties_the_store():
                self._queued.add()
            if room and self._queued.at_most:
                claimed = await self._queued.claim(room, partial(self._claim, now=now, window=window))
            left -= len(claimed)
            for job in claimed:
                self._enter(job)
            self._waiting += claimed
            self._expire_overdue()
            if self._leaves_jobs_stored():  # as they were before they were claimed
                for job in self._running.remove_unstarted():
                    self._add_end(job.job_id)
            self._start_waiting()
            if claimed:
                continue
            has_ended = not self._running and not self._unstored and not self._additions
            if has_ended and (is_closing or not math.isinf(limit)):
                return
            with anyio.move_on_after(self._sleep_s(may_claim=room > 0 and not is_closing)):
                await self._change.wait()

    def _wanted(self, limit: float) -> int:
        """How many jobs to claim now."""
        size_bytes = self._running.size_bytes + self._adding_bytes
        if self._waiting or self._leaves_jobs_stored() or size_bytes >= MAX_WINDOW_BYTES:
            return 0
        return int(min(limit, max(0, self._window - len(self._running) - self._unstored)))

    def _leaves_jobs_stored(self) -> bool:
        """Whether no more jobs are to be claimed: this runner closes, and the store keeps them for the next start."""
        return self._closing.is_set() and self._manager.store.durable

    def _empties_the_store(self) -> bool:
        """Whether jobs run for the last time: this runner closes, and the store does not keep them."""
        return self._closing.is_set() and not self._manager.store.durable

    async def _claim(self, limit: int, now: float, window: int) -> Sequence[Job]:
        """Claim up to `limit` jobs, after releasing those whose retry is due. Bulk jobs get a share of the `window`."""
        # A window of one job cannot be shared.
        bulk_share = min(window - 1, -(-window // BULK_WINDOW_DIVISOR))
        store = self._manager.store
        try:
            if self._empties_the_store():
                await store.release_retries(self._model_name, math.inf)
            elif self._next_retry_at <= now:
                self._next_retry_at = math.inf  # before the call: a sooner retry may be stored during it
                next_retry_at = await store.release_retries(self._model_name, now)
                self._next_retry_at = min(self._next_retry_at, math.inf if next_retry_at is None else next_retry_at)
            bulk_limit = max(0, bulk_share - self._running.bulk)
            return await store.claim(self._model_name, limit, now, bulk_limit=bulk_limit)
        except JobStoreError as error:
            self._next_retry_at = -math.inf
            await self._wait_for_the_store(error)
            self.wake()
            return []

    async def _wait_for_the_store(self, error: JobStoreError) -> None:
        logger.error("No jobs could be claimed; trying again in %g s: %s", STORE_RETRY_S, error)
        with anyio.move_on_after(STORE_RETRY_S):
            await self._closing.wait()

    def _enter(self, job: Job) -> None:
        """Add a job to the window."""
        self._running.add(job, self._deadline_of(job))
        self._manager.tell_change((job.job_id,))

    def _start_waiting(self) -> None:
        """Start jobs as long as the engine has room: interactive requests may fill its queue."""
        while self._waiting:
            job = self._waiting[0]
            if job in self._running:
                try:
                    self._running.start(job, self._engine.start(job, partial(self._end, job)))
                except QueueFullError:
                    return
                except BaseException as error:  # noqa: BLE001  # an item that is not valid any more fails alone
                    self._end(job, Failure(users_error(error)))
            self._waiting.popleft()

    def _sleep_s(self, *, may_claim: bool) -> float | None:
        """Seconds until the feeding task has to wake by itself; None if only `_change` has to wake it."""
        if self._waiting:
            return ROOM_POLL_INTERVAL_S
        until = self._running.next_deadline
        if may_claim:
            until = min(until, self._next_retry_at)
        return None if math.isinf(until) else min(CLOCK_INTERVAL_S, max(0.0, until - self._manager.clock()))

    # Ending.

    def _end(self, job: Job, outcome: JobOutcome) -> None:
        """End a job, or have it run again later; called in the event loop with its outcome."""
        if self._running.remove(job.job_id) is None:
            return
        self._change.set()
        now, retry = self._manager.clock(), None
        if isinstance(outcome, Failure):
            if self._has_closed(outcome.error):
                self._engine_closed = True  # what has not ended runs again after the next start
                return
            if not self._empties_the_store():
                retry = retry_of(
                    job,
                    outcome,
                    max_attempts=self._max_attempts,
                    deadline=self._deadline_of(job),
                    now=now,
                    backoff_s=self._backoff_s,
                )
        self._add_end(retry or self._make_end(job, outcome, now))

    def _has_closed(self, error: Exception) -> bool:
        """Whether an error is that of the closed engine; a pipeline with a scheduler of its own may raise such, too."""
        return isinstance(error, SchedulerClosedError) and self._engine.is_closed

    def _make_end(self, job: Job, outcome: JobOutcome, now: float) -> JobEnd:
        """How the job ends; the job is changed to match, so that its message can be sent without being read again."""
        end = end_of(job, outcome, now)
        job.status, job.result_json, job.error, job.finished_at = end.status, end.result_json, end.error, now
        job.item, end.job = None, job  # the item may take much memory, and has been run
        record_end(job, end.status, now)
        return end

    def _add_end(self, end: JobEnd | JobRetry | str) -> None:
        """Have an end stored, or the job of an id queued again; until then it counts as in the window."""
        self._unstored += 1
        self._ends.add(end)

    def _expire_overdue(self) -> None:
        now = self._manager.clock()
        for job in self._running.remove_overdue(now):
            self._add_end(self._make_end(job, Failure(JobTimeoutError(self._timeout_s)), now))

    def _deadline_of(self, job: Job) -> float:
        return deadline_of(job, timeout_s=self._timeout_s, now=self._manager.clock())

    async def _store_ends(self) -> None:
        """Store how jobs ended; those that ended during one step are stored together in the next."""
        while ended := await self._ends.collect():
            finished = [end for end in ended if isinstance(end, JobEnd)]
            retries = [end for end in ended if isinstance(end, JobRetry)]
            # Ends that are not stored: their jobs stay running in the store, and run again after the next start.
            if finished:
                what = f"The ends of {len(finished)} jobs"
                await store_until_closing(what, partial(self._manager.finish, finished), self._closing)
            if retries:
                what = f"The retries of {len(retries)} jobs"
                logger.warning(
                    "%s: %d jobs failed and run again later; the last one, job %s: %s",
                    *(self._model_name, len(retries), retries[-1].job_id, retries[-1].error),
                    extra={"job_id": retries[-1].job_id},
                )
                await store_until_closing(what, partial(self._manager.requeue, retries), self._closing)
                self._next_retry_at = min(self._next_retry_at, *(retry.retry_at for retry in retries))
            if returned := [end for end in ended if isinstance(end, str)]:
                what = f"The return of {len(returned)} jobs that have not begun"
                await store_until_closing(what, partial(self._manager.store.return_claimed, returned), self._closing)
                self._queued.add()
            self._unstored -= len(ended)
            self._change.set()
