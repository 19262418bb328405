"""Jobs in the memory of this process: fast, and lost with it."""

import heapq
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Self

from modalkit.batching import Priority
from modalkit.service.jobs import life
from modalkit.service.jobs.errors import (
    DuplicateJobError,
    IdempotencyKeyReusedError,
    JobStoreClosedError,
    JobStoreFullError,
)
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
    cut_page,
)
from modalkit.service.jobs.store import JobCounts

Heap = list[tuple[float, str]]
Quarantine = list[tuple[int, int, str]]
"""A heap of crashes, sequence number and job id."""

SPARE_ENTRIES = 1000
"""Outdated entries that a heap may have, beyond two for each stored job."""


class MemoryJobStore:
    """A `JobStore` of up to `max_jobs` jobs in memory. Closing it keeps them: it can be opened again."""

    durable = False

    def __init__(self, *, max_jobs: int = 1_000_000) -> None:
        self._max_jobs = max_jobs
        self._is_open = False
        # All mutable state: the jobs, in the order of their addition, with their sequence numbers, and the job of each
        # idempotency key; heaps of job ids, whose entries may be outdated: queued jobs by model and priority, the
        # quarantined, those that wait for a retry, those that expire, due deliveries by queue, and what may be removed;
        # the claimed deliveries, and the quarantined ones; the counts.
        self._jobs: dict[str, Job] = {}
        self._sequence: dict[str, int] = {}
        self._next_sequence = 0
        self._by_key: dict[str, str] = {}
        self._queued: defaultdict[tuple[str, Priority], Heap] = defaultdict(list)
        self._quarantined: defaultdict[str, Quarantine] = defaultdict(list)
        self._retries: defaultdict[str, Heap] = defaultdict(list)
        self._expiring: Heap = []
        self._due: dict[str, Heap] = {}
        self._removable: Heap = []
        self._claimed_deliveries: set[str] = set()
        self._quarantined_deliveries: Quarantine = []
        self._statuses = dict.fromkeys(JobStatus, 0)
        self._deliveries = dict.fromkeys(DeliveryStatus, 0)

    async def __aenter__(self) -> Self:
        self._is_open = True
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._is_open = False

    async def add(self, jobs: Sequence[Job]) -> list[str | IdempotencyKeyReusedError]:
        """Store queued jobs: all, or none when it raises."""
        self._ensure_open()
        ids, keys = set[str](), set[str]()
        for job in jobs:
            key = job.idempotency_key
            if key is not None:
                if key in self._by_key or key in keys:
                    continue  # not added
                keys.add(key)
            if job.job_id in self._jobs or job.job_id in ids:
                raise DuplicateJobError(job.job_id)
            ids.add(job.job_id)
        if len(self._jobs) + len(ids) > self._max_jobs:
            raise JobStoreFullError(len(self._jobs), len(ids), self._max_jobs)
        return [self._add(job) for job in jobs]

    def _add(self, job: Job) -> str | IdempotencyKeyReusedError:
        key = job.idempotency_key
        if key is not None:
            if key in self._by_key:
                earlier = self._jobs[self._by_key[key]]
                same = life.is_same_request(job, earlier)
                return earlier.job_id if same else IdempotencyKeyReusedError(key, earlier.job_id)
            self._by_key[key] = job.job_id
        self._jobs[job.job_id] = job
        self._sequence[job.job_id] = self._next_sequence
        self._next_sequence += 1
        self._statuses[job.status] += 1
        self._deliveries[job.delivery] += 1
        self._enqueue(job)
        self._watch_expiry(job)
        return job.job_id

    async def get(self, job_id: str) -> Job | None:
        """The job of this id."""
        self._ensure_open()
        return self._jobs.get(job_id)

    async def page(self, limit: int, which: JobFilter, cursor: int | None = None) -> JobPage:
        """Some of the jobs that match, the newest first."""
        self._ensure_open()
        return cut_page(self._newest_first(which, cursor), limit)

    def _newest_first(self, which: JobFilter, cursor: int | None) -> Iterator[tuple[int, Job]]:
        for job_id in reversed(self._jobs):
            sequence = self._sequence[job_id]
            if (cursor is None or sequence < cursor) and which.covers(self._jobs[job_id]):
                yield sequence, self._jobs[job_id]

    async def claim(self, model_name: str, limit: int, now: float, *, bulk_limit: int = 0) -> list[Job]:
        """Make queued jobs running, interactive ones first."""
        self._ensure_open()
        claimed = self._claim(model_name, Priority.BULK, min(bulk_limit, limit), now)
        for priority in (Priority.INTERACTIVE, Priority.BULK):
            claimed += self._claim(model_name, priority, limit - len(claimed), now)
        return claimed

    def _claim(self, model_name: str, priority: Priority, limit: int, now: float) -> list[Job]:
        queued, claimed = self._queued[model_name, priority], list[Job]()
        while queued and len(claimed) < limit:
            _, job_id = heapq.heappop(queued)
            job = self._jobs.get(job_id)
            # The entry is outdated if the job was cancelled, has expired or was removed meanwhile.
            if job is not None and job.status is JobStatus.QUEUED and not job.crashes and job.retry_at is None:
                claimed.append(self._change(life.start_job(job, now)))
        return claimed

    async def claim_quarantined(self, model_name: str, limit: int, now: float) -> list[Job]:
        """Make a group of quarantined jobs running."""
        self._ensure_open()
        quarantined, claimed = self._quarantined[model_name], list[Job]()
        while quarantined and _belongs_to(claimed, quarantined[0][0], claimed[0].crashes if claimed else 0, limit):
            _, _, job_id = heapq.heappop(quarantined)
            job = self._jobs.get(job_id)
            if job is not None and job.status is JobStatus.QUEUED:
                claimed.append(self._change(life.start_job(job, now)))
        return claimed

    async def requeue(self, retries: Sequence[JobRetry]) -> None:
        """Queue running jobs again, for later."""
        self._ensure_open()
        for retry in retries:
            job = self._jobs.get(retry.job_id)
            requeued = None if job is None else life.requeue_job(job, retry)
            if requeued is not None:
                self._change(requeued)
                heapq.heappush(self._retries[requeued.model_name], (retry.retry_at, retry.job_id))
                self._watch_expiry(requeued)

    async def release_retries(self, model_name: str, now: float) -> float | None:
        """Make jobs claimable whose `retry_at` has come; returns the next `retry_at`."""
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

    async def finish(self, ends: Sequence[JobEnd]) -> list[str]:
        """End jobs, and make their deliveries due; returns the ids of those that ended."""
        self._ensure_open()
        return [end.job_id for end in ends if self._finish(end)]

    def _finish(self, end: JobEnd) -> bool:
        job = self._jobs.get(end.job_id)
        ended = None if job is None else life.end_job(job, end)
        if ended is None:
            return False
        self._put_due(self._change(ended), end.finished_at)
        return True

    async def cancel(self, job_id: str, now: float) -> Job | None:
        """Cancel a job that has not ended; returns it as it then is."""
        self._ensure_open()
        job = self._jobs.get(job_id)
        cancelled = None if job is None else life.cancel_job(job, now)
        return job if cancelled is None else self._change(cancelled)

    async def expire(self, limit: int, now: float) -> list[str]:
        """End queued jobs whose `expires_at` has come; returns their ids."""
        self._ensure_open()
        ids = list[str]()
        while self._expiring and self._expiring[0][0] <= now and len(ids) < limit:
            _, job_id = heapq.heappop(self._expiring)
            job = self._jobs.get(job_id)
            expired = None if job is None else life.expire_job(job, now)
            if expired is not None:
                self._put_due(self._change(expired), now)
                ids.append(job_id)
        return ids

    async def claim_deliveries(
        self, limit: int, now: float, *, queue_limits: Mapping[str, int], queue_limit: int
    ) -> Sequence[Job]:
        """Claim due deliveries, queue by queue."""
        self._ensure_open()
        claimed = list[Job]()
        for queue, due in list(self._due.items()):
            room = min(queue_limits.get(queue, queue_limit), limit - len(claimed))
            if due[0][0] > now or room <= 0:
                continue
            while due and due[0][0] <= now and room > 0:
                _, job_id = heapq.heappop(due)
                self._claimed_deliveries.add(job_id)
                claimed.append(self._jobs[job_id])
                room -= 1
            del self._due[queue]
            if due:
                self._due[queue] = due  # at the end, so that queues come in turns
        return claimed

    async def claim_quarantined_deliveries(self, limit: int) -> Sequence[Job]:
        """Claim a group of quarantined deliveries."""
        self._ensure_open()
        quarantined, claimed, crashes = self._quarantined_deliveries, list[Job](), 0
        while quarantined and _belongs_to(claimed, quarantined[0][0], crashes, limit):
            crashes, _, job_id = heapq.heappop(quarantined)
            self._claimed_deliveries.add(job_id)
            claimed.append(self._jobs[job_id])
        return claimed

    async def record_deliveries(self, records: Sequence[DeliveryRecord]) -> None:
        """Record the results of attempts to deliver."""
        self._ensure_open()
        for record in records:
            job = self._jobs.get(record.job_id)
            recorded = None if job is None else life.record_delivery(job, record)
            if recorded is not None:
                self._claimed_deliveries.discard(recorded.job_id)
                self._put_due(self._change(recorded), record.due_at)

    async def replay(self, job_ids: Sequence[str] | None, now: float) -> int:
        """Make undelivered ones of these jobs, or of all, due again; returns how many."""
        self._ensure_open()
        ids = list(self._jobs) if job_ids is None else [job_id for job_id in job_ids if job_id in self._jobs]
        replayed = 0
        for job_id in ids:
            job = life.replay_delivery(self._jobs[job_id])
            if job is not None:
                self._put_due(self._change(job), now)
                replayed += 1
        return replayed

    async def recover(self, now: float) -> Recovery:
        """Recover what was running or claimed."""
        self._ensure_open()
        undelivered = self._recover_deliveries()
        requeued, failed = 0, list[str]()
        for job in list(self._jobs.values()):
            recovered = life.recover_job(job, now)
            if recovered is None:
                continue
            self._change(recovered)
            if recovered.status is JobStatus.FAILED:
                failed.append(job.job_id)
                self._put_due(recovered, now)
            else:
                requeued += 1
                self._enqueue(recovered)
                self._watch_expiry(recovered)
        return Recovery(requeued, failed, undelivered)

    def _recover_deliveries(self) -> list[str]:
        """Quarantine what was claimed; returns the ids of what is undelivered."""
        undelivered = list[str]()
        for job_id in sorted(self._claimed_deliveries):
            recovered = life.recover_delivery(self._jobs[job_id])
            if recovered is None:
                continue
            self._change(recovered)
            if recovered.delivery is DeliveryStatus.UNDELIVERED:
                undelivered.append(job_id)
            else:
                entry = (recovered.delivery_crashes, self._sequence[job_id], job_id)
                heapq.heappush(self._quarantined_deliveries, entry)
        self._claimed_deliveries.clear()
        return undelivered

    async def remove_finished(self, before: float) -> int:
        """Remove jobs that ended before that time and have nothing left to deliver."""
        self._ensure_open()
        self._drop_outdated_entries()
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
        """Remove ended jobs that match, except those whose delivery is pending."""
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
        """How many jobs there are of each kind."""
        self._ensure_open()
        return JobCounts(dict(self._statuses), dict(self._deliveries))

    def _drop_outdated_entries(self) -> None:
        """Keep heaps from growing with entries of jobs that were cancelled, have run, or are gone."""
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
        sequence = self._sequence[job.job_id]
        if job.crashes:
            heapq.heappush(self._quarantined[job.model_name], (job.crashes, sequence, job.job_id))
        else:
            heapq.heappush(self._queued[job.model_name, job.priority], (sequence, job.job_id))

    def _watch_expiry(self, job: Job) -> None:
        """Let a queued job expire at its time; `expire` drops the entries of jobs that are running then."""
        if job.expires_at is not None:
            heapq.heappush(self._expiring, (job.expires_at, job.job_id))

    def _put_due(self, job: Job, due_at: float) -> None:
        """Make the delivery of a job due, if it is pending."""
        if job.delivery is DeliveryStatus.PENDING:
            heapq.heappush(self._due.setdefault(job.delivery_queue or "", []), (due_at, job.job_id))

    def _change(self, job: Job) -> Job:
        """Replace a job by its new state."""
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
        del self._jobs[job.job_id], self._sequence[job.job_id]
        self._statuses[job.status] -= 1
        self._deliveries[job.delivery] -= 1
        if job.idempotency_key is not None:
            del self._by_key[job.idempotency_key]


def _belongs_to(group: Sequence[Job], crashes: int, group_crashes: int, limit: int) -> bool:
    """Whether a quarantined job with so many crashes is to join a group, whose jobs have `group_crashes`."""
    return not group or (crashes == group_crashes and len(group) < life.quarantine_group_size(crashes, limit))
