"""Jobs in this process's memory: quick, and gone with it."""

import heapq
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Self

from batching import Priority
from service.jobs.errors import DuplicateJobError, JobStoreClosedError, JobStoreFullError
from service.jobs.model import DeliveryRecord, DeliveryStatus, FinishedJob, Job, JobStatus, NewJob, new_job


class MemoryJobStore:
    """Keeps up to `max_jobs` jobs in memory; see `JobStore` for what it promises. Closing it forgets nothing."""

    durable = False

    def __init__(self, *, max_jobs: int = 1_000_000) -> None:
        self._max_jobs = max_jobs
        self._is_open = False
        # All mutable state: the jobs; for each model and class, the ids of its queued jobs with their places as a heap;
        # the ended ones as a heap by the time of their end; and how many there are of each status.
        self._jobs: dict[str, Job] = {}
        self._places: dict[str, int] = {}
        self._next_place = 0
        self._queued: defaultdict[tuple[str, Priority], list[tuple[int, str]]] = defaultdict(list)
        self._ended: list[tuple[float, str]] = []
        self._counts = dict.fromkeys(JobStatus, 0)

    async def __aenter__(self) -> Self:
        self._is_open = True
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._is_open = False

    async def add(self, jobs: Sequence[NewJob]) -> None:
        """See `JobStore.add`."""
        self._ensure_open()
        ids = set[str]()
        for job in jobs:
            if job.job_id in self._jobs or job.job_id in ids:
                raise DuplicateJobError(job.job_id)
            ids.add(job.job_id)
        if len(self._jobs) + len(jobs) > self._max_jobs:
            raise JobStoreFullError(len(self._jobs), len(jobs), self._max_jobs)
        for job in jobs:
            self._jobs[job.job_id] = new_job(job)
            self._places[job.job_id] = self._next_place
            self._next_place += 1
            self._counts[JobStatus.QUEUED] += 1
            self._enqueue(self._jobs[job.job_id])

    async def get(self, job_id: str) -> Job | None:
        """See `JobStore.get`."""
        self._ensure_open()
        return self._jobs.get(job_id)

    async def take(self, model_name: str, limit: int, now: float, *, bulk_places: int = 0) -> list[Job]:
        """See `JobStore.take`."""
        self._ensure_open()
        taken = self._take(model_name, Priority.BULK, min(bulk_places, limit), now)
        for priority in (Priority.INTERACTIVE, Priority.BULK):
            taken += self._take(model_name, priority, limit - len(taken), now)
        return taken

    def _take(self, model_name: str, priority: Priority, limit: int, now: float) -> list[Job]:
        queued, taken = self._queued[model_name, priority], list[Job]()
        while queued and len(taken) < limit:
            _, job_id = heapq.heappop(queued)
            job = self._jobs.get(job_id)
            # What was cancelled, has expired or was removed meanwhile still has its place in the heap.
            if job is not None and job.status is JobStatus.QUEUED:
                taken.append(self._change(job.started(now)))
        return taken

    async def finish(self, outcomes: Sequence[FinishedJob]) -> list[Job]:
        """See `JobStore.finish`."""
        self._ensure_open()
        ended = []
        for outcome in outcomes:
            job = self._jobs.get(outcome.job_id)
            finished = None if job is None else job.finished(outcome)
            if finished is not None:
                ended.append(self._change(finished))
        return ended

    async def cancel(self, job_id: str, now: float) -> Job | None:
        """See `JobStore.cancel`."""
        self._ensure_open()
        job = self._jobs.get(job_id)
        if job is None:
            return None
        cancelled = job.cancelled(now)
        return job if cancelled is None else self._change(cancelled)

    async def pending_deliveries(self, limit: int, after: Job | None = None) -> list[Job]:
        """See `JobStore.pending_deliveries`."""
        self._ensure_open()
        first = None if after is None else _end(after)
        pending = (job for job in self._jobs.values() if job.delivery is DeliveryStatus.PENDING)
        return heapq.nsmallest(limit, (job for job in pending if first is None or _end(job) > first), key=_end)

    async def record_delivery(self, records: Sequence[DeliveryRecord]) -> None:
        """See `JobStore.record_delivery`."""
        self._ensure_open()
        for record in records:
            job = self._jobs.get(record.job_id)
            if job is not None and job.delivery is not DeliveryStatus.NONE:
                self._jobs[job.job_id] = replace(
                    job, delivery=record.status, delivery_attempts=record.attempts, delivery_error=record.error
                )

    async def requeue_running(self) -> int:
        """See `JobStore.requeue_running`."""
        self._ensure_open()
        running = [job for job in self._jobs.values() if job.status is JobStatus.RUNNING]
        for job in running:
            self._enqueue(self._change(replace(job, status=JobStatus.QUEUED)))
        return len(running)

    async def remove_finished(self, before: float) -> int:
        """See `JobStore.remove_finished`."""
        self._ensure_open()
        removed, kept = 0, list[tuple[float, str]]()
        while self._ended and self._ended[0][0] < before:
            end = heapq.heappop(self._ended)
            if self._jobs[end[1]].delivery is DeliveryStatus.PENDING:
                kept.append(end)
                continue
            job = self._jobs.pop(end[1])
            del self._places[job.job_id]
            self._counts[job.status] -= 1
            removed += 1
        for end in kept:
            heapq.heappush(self._ended, end)
        return removed

    async def counts(self) -> Mapping[JobStatus, int]:
        """See `JobStore.counts`."""
        self._ensure_open()
        return dict(self._counts)

    def _ensure_open(self) -> None:
        if not self._is_open:
            raise JobStoreClosedError

    def _enqueue(self, job: Job) -> None:
        heapq.heappush(self._queued[job.model_name, job.priority], (self._places[job.job_id], job.job_id))

    def _change(self, job: Job) -> Job:
        """Put a job in a new status in the place of the old one."""
        self._counts[self._jobs[job.job_id].status] -= 1
        self._counts[job.status] += 1
        self._jobs[job.job_id] = job
        if job.status.has_ended:
            heapq.heappush(self._ended, _end(job))
        return job


def _end(job: Job) -> tuple[float, str]:
    return job.finished_at or 0.0, job.job_id
