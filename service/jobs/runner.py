"""Moves the stored jobs of one model into its scheduler, a window at a time, and stores what becomes of them."""

import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

import anyio
from anyio.abc import TaskGroup

from batching import DeadlineExceededError, Priority, QueueFullError, SchedulerClosedError
from batching.task_groups import plain_task_group
from service.errors import describe_error
from service.jobs.errors import JobStoreError
from service.jobs.manager import JobManager
from service.jobs.model import FinishedJob, Job, JobStatus

logger = logging.getLogger(__name__)

RETRY_S = 0.05
LONGEST_RETRY_S = 5.0
BULK_SHARE_OF_THE_WINDOW = 10
"""Interactive jobs leave bulk ones one place of so many, so that these go on however many of those come."""
UNSTORABLE = "what became of the job could not be stored; the service's log tells why"

RunJob = Callable[[Job, float], Awaitable[dict[str, Any]]]
"""Runs a job within so many seconds and returns its result as a JSON object, or raises its error."""


class JobRunner:
    """Feeds the jobs of one model to `run_job`, at most `window` at a time, however many are stored.

    Interactive jobs go before bulk ones, which keep a tenth of the window.
    `timeout_s` counts from a job's first dispatch: one that takes longer expires. Use it as an async context manager,
    inside that of its open `JobManager`. Leaving it takes no more jobs and finishes those in the window; the others
    stay in a durable store for the next start, and are run before leaving where the store is not durable. Left by an
    exception, it abandons the window: those jobs run again at the next start.
    """

    def __init__(
        self, manager: JobManager, model_name: str, run_job: RunJob, *, window: int, timeout_s: float = 3600.0
    ) -> None:
        self._manager = manager
        self._model_name = model_name
        self._run_job = run_job
        self._window = window
        self._timeout_s = timeout_s
        # All mutable state: the jobs in the window, each with what cancels it, how many of them are bulk, and what
        # wakes the feeder.
        self._running: dict[str, anyio.CancelScope] = {}
        self._bulk_running = 0
        self._change = anyio.Event()
        self._closing = False
        self._tasks = plain_task_group()

    async def __aenter__(self) -> Self:
        task_group = await self._tasks.__aenter__()
        task_group.start_soon(self._feed, task_group)
        self._manager.attach(self._model_name, self)
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        self._closing = True
        self.wake()
        try:
            return await self._tasks.__aexit__(exc_type, exc, traceback)
        finally:
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
        if scope := self._running.get(job_id):
            scope.cancel()

    async def _feed(self, task_group: TaskGroup) -> None:
        """Keep the window filled until closed; a store that is not durable is emptied first."""
        while True:
            self._change = anyio.Event()
            draining = self._closing
            if draining and self._manager.store.durable:
                return
            free = self._window - len(self._running)
            jobs = await self._take(free) if free else []
            for job in jobs:
                scope = self._running[job.job_id] = anyio.CancelScope()
                self._bulk_running += job.priority is Priority.BULK
                task_group.start_soon(self._run, job, scope)
            if len(jobs) == free > 0:
                continue
            if draining and not jobs and not self._running:
                return
            await self._change.wait()

    async def _take(self, limit: int) -> list[Job]:
        # A window of one place is too small to share.
        kept = min(self._window - 1, -(-self._window // BULK_SHARE_OF_THE_WINDOW))
        try:
            return await self._manager.store.take(
                self._model_name, limit, self._manager.clock(), bulk_places=max(0, kept - self._bulk_running)
            )
        except JobStoreError:
            logger.exception("No jobs could be taken from the store; trying again in %g s", LONGEST_RETRY_S)
            with anyio.move_on_after(LONGEST_RETRY_S):
                await self._change.wait()
            self.wake()
            return []

    async def _run(self, job: Job, scope: anyio.CancelScope) -> None:
        try:
            outcome = None
            with scope:
                outcome = await self._outcome(job)
            # Outside the scope: a cancellation that comes too late must not stop what the end sets off.
            if outcome is not None:
                await self._finish(outcome)
        finally:
            del self._running[job.job_id]
            self._bulk_running -= job.priority is Priority.BULK
            self.wake()

    async def _outcome(self, job: Job) -> FinishedJob | None:
        """How the job ended, or None when its scheduler was closed before it did."""
        started_at = self._manager.clock() if job.started_at is None else job.started_at
        remaining_s = started_at + self._timeout_s - self._manager.clock()
        result, error = None, None
        try:
            result = await self._run_patiently(job, remaining_s)
            status = JobStatus.SUCCEEDED
        except DeadlineExceededError:
            status, error = JobStatus.EXPIRED, f"the job did not finish within its timeout of {self._timeout_s:g} s"
        except SchedulerClosedError:
            return None
        except Exception as failure:  # noqa: BLE001  # whatever the pipeline raised is this job's error
            status, error = JobStatus.FAILED, describe_error(failure)
        return FinishedJob(
            job_id=job.job_id, status=status, result=result, error=error, finished_at=self._manager.clock()
        )

    async def _run_patiently(self, job: Job, timeout_s: float) -> dict[str, Any]:
        """Run the job; while interactive requests fill the scheduler's queue, wait for room."""
        deadline_s = anyio.current_time() + timeout_s
        while (remaining_s := deadline_s - anyio.current_time()) > 0:
            try:
                return await self._run_job(job, remaining_s)
            except QueueFullError:
                await anyio.sleep(RETRY_S)
        raise DeadlineExceededError(timeout_s)

    async def _finish(self, outcome: FinishedJob) -> None:
        """Store the outcome, trying for as long as the runner is open: without it the job would run again."""
        delay_s = RETRY_S
        while True:
            try:
                return await self._manager.finish(outcome)
            except Exception as error:
                # The job of an outcome that no store can keep fails; it must not take the others of its model along.
                logger.exception("The end of job %s (%s) could not be stored", outcome.job_id, outcome.status)
                if not isinstance(error, JobStoreError) and outcome.error != UNSTORABLE:
                    outcome = replace(outcome, status=JobStatus.FAILED, result=None, error=UNSTORABLE)
                    continue
                if self._closing:
                    return None  # it stays running in the store, and runs again after the next start
            await anyio.sleep(delay_s)
            delay_s = min(2 * delay_s, LONGEST_RETRY_S)
