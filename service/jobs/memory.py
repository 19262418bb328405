"""Jobs in this process's memory: quick, and gone with it."""

import heapq
from collections import defaultdict
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Self

from modalkit.batching import Priority
from modalkit.service.jobs.errors import (
    DuplicateJobError,
    IdempotencyKeyReusedError,
    JobStoreClosedError,
    JobStoreFullError,
)
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
    cut_page,
    new_job,
)
from modalkit.service.jobs.store import (
    EXPIRED_IN_THE_QUEUE,
    MAX_CRASHES,
    TOO_MANY_CRASHES,
    TOO_MANY_DELIVERY_CRASHES,
    JobCounts,
    suspects_together,
)

Heap = list[tuple[float, str]]
Suspects = list[tuple[int, int, str]]
"""A heap of crashes, place and id."""

SPARE_ENTRIES = 1000


class MemoryJobStore:
    """Keeps up to `max_jobs` jobs in memory; see `JobStore` for what it promises. Closing it forgets nothing."""

    durable = False

    def __init__(self, *, max_jobs: int = 1_000_000) -> None:
        self._max_jobs = max_jobs
        self._is_open = False
        # All mutable state: the jobs, each with its place in the order in which they were added, and the jobs of the
        # idempotency keys; heaps of ids, which may name jobs that have moved on: what is queued, by model and class,
        # what crashed, what waits to run again, what expires, what is due, by queue, what may be removed; what is being
        # delivered, and what of it crashed how often; the counts.
        self._jobs: dict[str, Job] = {}
        self._places: dict[str, int] = {}
        self._next_place = 0
        self._by_key: dict[str, str] = {}
        self._queued: defaultdict[tuple[str, Priority], Heap] = defaultdict(list)
        self._suspects: defaultdict[str, Suspects] = defaultdict(list)
        self._retries: defaultdict[str, Heap] = defaultdict(list)
        self._expiring: Heap = []
        self._due: dict[str, Heap] = {}
        self._removable: Heap = []
        self._in_hand: set[str] = set()
        self._delivery_crashes: dict[str, int] = {}
        self._suspect_deliveries: Suspects = []
        self._statuses = dict.fromkeys(JobStatus, 0)
        self._deliveries = dict.fromkeys(DeliveryStatus, 0)

    async def __aenter__(self) -> Self:
        self._is_open = True
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._is_open = False

    async def add(self, jobs: Sequence[NewJob]) -> list[str | IdempotencyKeyReusedError]:
        """See `JobStore.add`."""
        self._ensure_open()
        ids = set[str]()
        for job in jobs:
            if job.job_id in self._jobs or job.job_id in ids:
                raise DuplicateJobError(job.job_id)
            ids.add(job.job_id)
        new = [job for job in jobs if job.idempotency_key is None or job.idempotency_key not in self._by_key]
        if len(self._jobs) + len(new) > self._max_jobs:
            raise JobStoreFullError(len(self._jobs), len(new), self._max_jobs)
        return [self._add(job) for job in jobs]

    def _add(self, given: NewJob) -> str | IdempotencyKeyReusedError:
        key = given.idempotency_key
        if key is not None:
            if key in self._by_key:
                earlier = self._jobs[self._by_key[key]]
                same = given.asks_for_the_same(earlier)
                return earlier.job_id if same else IdempotencyKeyReusedError(key, earlier.job_id)
            self._by_key[key] = given.job_id
        job = self._jobs[given.job_id] = new_job(given)
        self._places[job.job_id] = self._next_place
        self._next_place += 1
        self._statuses[job.status] += 1
        self._deliveries[job.delivery] += 1
        self._enqueue(job)
        if job.expires_at is not None:
            heapq.heappush(self._expiring, (job.expires_at, job.job_id))
        return job.job_id

    async def get(self, job_id: str) -> Job | None:
        """See `JobStore.get`."""
        self._ensure_open()
        return self._jobs.get(job_id)

    async def page(self, limit: int, which: JobFilter, cursor: int | None = None) -> JobPage:
        """See `JobStore.page`."""
        self._ensure_open()
        return cut_page(self._newest_first(which, cursor), limit)

    def _newest_first(self, which: JobFilter, cursor: int | None) -> Iterator[tuple[int, Job]]:
        for job_id in reversed(self._jobs):
            place = self._places[job_id]
            if (cursor is None or place < cursor) and which.covers(self._jobs[job_id]):
                yield place, self._jobs[job_id]

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
            if job is not None and job.status is JobStatus.QUEUED and not job.crashes and job.retry_at is None:
                taken.append(self._change(job.started(now)))
        return taken

    async def take_suspects(self, model_name: str, largest: int, now: float) -> list[Job]:
        """See `JobStore.take_suspects`."""
        self._ensure_open()
        suspects, taken = self._suspects[model_name], list[Job]()
        while suspects and (not taken or _go_together(suspects[0][0], taken[0].crashes, len(taken), largest)):
            _, _, job_id = heapq.heappop(suspects)
            job = self._jobs.get(job_id)
            if job is not None and job.status is JobStatus.QUEUED:
                taken.append(self._change(job.started(now)))
        return taken

    async def retry_later(self, retries: Sequence[JobRetry]) -> None:
        """See `JobStore.retry_later`."""
        self._ensure_open()
        for retry in retries:
            job = self._jobs.get(retry.job_id)
            deferred = None if job is None else job.deferred(retry)
            if deferred is not None:
                self._change(deferred)
                heapq.heappush(self._retries[deferred.model_name], (retry.retry_at, retry.job_id))
                if deferred.expires_at is not None:
                    heapq.heappush(self._expiring, (deferred.expires_at, deferred.job_id))

    async def release_retries(self, model_name: str, now: float) -> float | None:
        """See `JobStore.release_retries`."""
        self._ensure_open()
        retries = self._retries[model_name]
        while retries:
            retry_at, job_id = retries[0]
            job = self._jobs.get(job_id)
            still_waits = job is not None and job.retry_at == retry_at
            if still_waits and retry_at > now:
                return retry_at
            heapq.heappop(retries)
            if job is not None and still_waits:
                self._enqueue(self._change(replace(job, retry_at=None)))
        return None

    async def finish(self, outcomes: Sequence[FinishedJob], *, in_hand: Container[str] = ()) -> list[str]:
        """See `JobStore.finish`."""
        self._ensure_open()
        return [outcome.job_id for outcome in outcomes if self._finish(outcome, in_hand)]

    def _finish(self, outcome: FinishedJob, in_hand: Container[str] = ()) -> bool:
        job = self._jobs.get(outcome.job_id)
        finished = None if job is None else job.finished(outcome)
        if finished is None:
            return False
        self._change(finished)
        if finished.delivery_queue is not None and finished.job_id in in_hand:
            self._in_hand.add(finished.job_id)
        elif finished.delivery_queue is not None:
            self._put_due(finished, outcome.finished_at)
        return True

    async def cancel(self, job_id: str, now: float) -> Job | None:
        """See `JobStore.cancel`."""
        self._ensure_open()
        job = self._jobs.get(job_id)
        if job is None:
            return None
        cancelled = job.cancelled(now)
        return job if cancelled is None else self._change(cancelled)

    async def expire(self, limit: int, now: float) -> list[str]:
        """See `JobStore.expire`."""
        self._ensure_open()
        expired = list[str]()
        while self._expiring and self._expiring[0][0] <= now and len(expired) < limit:
            _, job_id = heapq.heappop(self._expiring)
            job = self._jobs.get(job_id)
            if job is not None and job.status is JobStatus.QUEUED:
                self._finish(_ended(job, JobStatus.EXPIRED, EXPIRED_IN_THE_QUEUE, now))
                expired.append(job_id)
        return expired

    async def take_deliveries(
        self, limit: int, now: float, *, places: Mapping[str, int], per_queue: int
    ) -> Sequence[Job]:
        """See `JobStore.take_deliveries`."""
        self._ensure_open()
        taken = list[Job]()
        for queue, due in list(self._due.items()):
            room = min(places.get(queue, per_queue), limit - len(taken))
            if due[0][0] > now or room <= 0:
                continue
            while due and due[0][0] <= now and room > 0:
                _, job_id = heapq.heappop(due)
                self._in_hand.add(job_id)
                taken.append(self._jobs[job_id])
                room -= 1
            del self._due[queue]
            if due:
                self._due[queue] = due  # at the end, so that queues come in turns
        return taken

    async def take_suspect_deliveries(self, largest: int) -> Sequence[Job]:
        """See `JobStore.take_suspect_deliveries`."""
        self._ensure_open()
        suspects, taken, crashes = self._suspect_deliveries, list[Job](), 0
        while suspects and (not taken or _go_together(suspects[0][0], crashes, len(taken), largest)):
            crashes, _, job_id = heapq.heappop(suspects)
            self._in_hand.add(job_id)
            taken.append(self._jobs[job_id])
        return taken

    async def record_deliveries(self, records: Sequence[DeliveryRecord]) -> None:
        """See `JobStore.record_deliveries`."""
        self._ensure_open()
        for record in records:
            job = self._jobs.get(record.job_id)
            if job is None or job.delivery is not DeliveryStatus.PENDING:
                continue
            changed = replace(
                job, delivery=record.status, delivery_attempts=record.attempts, delivery_error=record.error
            )
            self._in_hand.discard(job.job_id)
            self._delivery_crashes.pop(job.job_id, None)
            self._change(changed)
            if record.status is DeliveryStatus.PENDING:
                self._put_due(changed, record.due_at)

    async def replay(self, job_ids: Sequence[str] | None, now: float) -> int:
        """See `JobStore.replay`."""
        self._ensure_open()
        jobs = list(self._jobs.values()) if job_ids is None else [self._jobs[i] for i in job_ids if i in self._jobs]
        undelivered = [job for job in jobs if job.delivery is DeliveryStatus.UNDELIVERED]
        for job in undelivered:
            self._put_due(self._change(replace(job, delivery=DeliveryStatus.PENDING, delivery_attempts=0)), now)
        return len(undelivered)

    async def recover(self, now: float) -> Recovery:
        """See `JobStore.recover`."""
        self._ensure_open()
        undelivered = self._recover_deliveries()
        running = [job for job in self._jobs.values() if job.status is JobStatus.RUNNING]
        set_aside = list[str]()
        for job in running:
            crashed = self._change(replace(job, crashes=job.crashes + 1))
            if crashed.crashes >= MAX_CRASHES:
                self._finish(_ended(crashed, JobStatus.FAILED, TOO_MANY_CRASHES, now))
                set_aside.append(job.job_id)
            else:
                self._enqueue(self._change(replace(crashed, status=JobStatus.QUEUED)))
        return Recovery(len(running) - len(set_aside), set_aside, undelivered)

    def _recover_deliveries(self) -> list[str]:
        """Make what was in hand suspect; returns the ids of those that are set aside."""
        undelivered = list[str]()
        for job_id in sorted(self._in_hand):
            crashes = self._delivery_crashes[job_id] = self._delivery_crashes.get(job_id, 0) + 1
            if crashes < MAX_CRASHES:
                heapq.heappush(self._suspect_deliveries, (crashes, self._places[job_id], job_id))
                continue
            del self._delivery_crashes[job_id]
            job = self._jobs[job_id]
            undelivered.append(job_id)
            self._change(replace(job, delivery=DeliveryStatus.UNDELIVERED, delivery_error=TOO_MANY_DELIVERY_CRASHES))
        self._in_hand.clear()
        return undelivered

    async def remove_finished(self, before: float) -> int:
        """See `JobStore.remove_finished`."""
        self._ensure_open()
        self._forget_what_has_moved_on()
        removed = 0
        while self._removable and self._removable[0][0] < before:
            _, job_id = heapq.heappop(self._removable)
            job = self._jobs.get(job_id)
            # A replay makes a job that may be removed one that may not.
            if job is not None and job.delivery in (DeliveryStatus.NONE, DeliveryStatus.DELIVERED):
                self._remove(job)
                removed += 1
        return removed

    async def purge(self, which: JobFilter) -> int:
        """See `JobStore.purge`."""
        self._ensure_open()
        purged = [
            job
            for job in self._jobs.values()
            if job.status.has_ended and job.delivery is not DeliveryStatus.PENDING and which.covers(job)
        ]
        for job in purged:
            self._remove(job)
        return len(purged)

    async def counts(self) -> JobCounts:
        """See `JobStore.counts`."""
        self._ensure_open()
        return JobCounts(dict(self._statuses), dict(self._deliveries))

    def _forget_what_has_moved_on(self) -> None:
        """Keep heaps from growing with jobs that were cancelled, have run, or are gone, before their turn comes."""
        for heap in (self._expiring, *self._queued.values(), *self._retries.values()):
            if len(heap) > 2 * len(self._jobs) + SPARE_ENTRIES:
                heap[:] = [
                    entry
                    for entry in heap
                    if (job := self._jobs.get(entry[1])) is not None and job.status is JobStatus.QUEUED
                ]
                heapq.heapify(heap)

    def _ensure_open(self) -> None:
        if not self._is_open:
            raise JobStoreClosedError

    def _enqueue(self, job: Job) -> None:
        place = self._places[job.job_id]
        if job.crashes:
            heapq.heappush(self._suspects[job.model_name], (job.crashes, place, job.job_id))
        else:
            heapq.heappush(self._queued[job.model_name, job.priority], (place, job.job_id))

    def _put_due(self, job: Job, due_at: float) -> None:
        heapq.heappush(self._due.setdefault(job.delivery_queue or "", []), (due_at, job.job_id))

    def _change(self, job: Job) -> Job:
        """Put a job in a new state in the place of the old one."""
        old = self._jobs[job.job_id]
        self._statuses[old.status] -= 1
        self._statuses[job.status] += 1
        self._deliveries[old.delivery] -= 1
        self._deliveries[job.delivery] += 1
        self._jobs[job.job_id] = job
        if job.finished_at is not None and job.delivery in (DeliveryStatus.NONE, DeliveryStatus.DELIVERED):
            heapq.heappush(self._removable, (job.finished_at, job.job_id))
        return job

    def _remove(self, job: Job) -> None:
        del self._jobs[job.job_id], self._places[job.job_id]
        self._statuses[job.status] -= 1
        self._deliveries[job.delivery] -= 1
        if job.idempotency_key is not None:
            del self._by_key[job.idempotency_key]


def _go_together(crashes: int, group_crashes: int, taken: int, largest: int) -> bool:
    """Whether a suspect belongs into a group of which so many are taken."""
    return crashes == group_crashes and taken < suspects_together(group_crashes, largest)


def _ended(job: Job, status: JobStatus, error: str, now: float) -> FinishedJob:
    return FinishedJob(job_id=job.job_id, status=status, error=error, finished_at=now)
