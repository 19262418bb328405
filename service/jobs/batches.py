"""Batches of jobs: jobs that were submitted under one id, each with its line; counted, cancelled and read together.

A batch that a model runs is another thing: see the glossary.
"""

from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING

import anyio
from anyio.lowlevel import checkpoint

from modalkit.service.jobs.errors import JobStoreError
from modalkit.service.jobs.model import JobBatch, JobBatchResult, JobFilter

if TYPE_CHECKING:
    from modalkit.service.jobs.manager import JobManager

RESULTS_INTERVAL_S = 0.05
"""Seconds between two reads for a caller that has read all there is."""
MAX_WAIT_S = 5.0
"""Maximum seconds between two lists for a caller that waits."""
MAX_SEQUENCE = 2**63 - 1
"""No job has a larger sequence number, so a read after it begins with the next line."""
OVERLAP_US = 2_000_000
"""Microseconds before the last end that was seen which are read again: ends may be stored in another order."""


class JobBatches:
    """The batches of jobs of a manager. Each has the jobs of one `owner`, or those of all where that is None."""

    def __init__(self, jobs: "JobManager") -> None:
        self._jobs = jobs
        self._store = jobs.store

    async def get(self, batch_id: str, owner: str | None = None) -> JobBatch | None:
        """The jobs of a batch, counted; None where there is none."""
        return await self._store.batch(batch_id, owner, self._jobs.clock())

    async def exists(self, batch_id: str, owner: str | None = None) -> bool:
        """Whether there is a job of a batch; cheaper than to count them."""
        return await self._store.has_batch(batch_id, owner)

    async def cancel(self, batch_id: str, owner: str | None = None) -> int:
        """Cancel all jobs of a batch that have not ended, in several steps; returns how many."""
        cancelled = 0
        while True:
            now = self._jobs.clock()
            with anyio.CancelScope(shield=True):  # as in `JobManager.cancel`
                jobs = await self._store.cancel_some(JobFilter(batch_id=batch_id, owner=owner), now)
            if not jobs:
                return cancelled
            for job in jobs:
                self._jobs.tell_cancelled(job, now)
            cancelled += len(jobs)
            await checkpoint()  # so that other tasks run between two steps of a store in memory

    async def results_by_line(
        self, batch_id: str, owner: str | None = None, *, after: int = 0, wait: bool = True
    ) -> AsyncGenerator[list[JobBatchResult]]:
        """The results of the lines after `after`, in their order; with `wait`, until all jobs of the batch have ended.

        Without `wait`, it ends at the first line whose job has not ended. It ends early when the service stops. While
        there is no result, it yields an empty list every few seconds.
        """
        place = (after, MAX_SEQUENCE)
        while True:
            results, unfinished = await self._store.results_in_order(batch_id, owner, *place)
            if results:
                place = (results[-1].line, results[-1].sequence)
                yield results
            if unfinished is not None:
                if not (wait and self._jobs.may_wait):
                    return
                await self._jobs.get(unfinished, MAX_WAIT_S)
                yield []  # the caller sends a heartbeat
                await anyio.sleep(RESULTS_INTERVAL_S)  # the ends of many are read together
            elif not results:
                return

    async def results_as_they_end(
        self, batch_id: str, owner: str | None = None, *, wait: bool = True
    ) -> AsyncGenerator[list[JobBatchResult]]:
        """All results of a batch, in the order in which its jobs end; `wait` is as for `results_by_line`.

        Raises `JobStoreError` if some ends were stored too late to be found by this order: read the results again.
        """
        place, sent = (0, 0), 0
        seen = dict[int, int]()  # when the jobs that were seen lately ended, by their sequence numbers
        while True:
            batch = await self.get(batch_id, owner)
            is_last = batch is None or not batch.active
            while ends := await self._store.ends_after(batch_id, owner, *place):
                new = [sequence for _, sequence in ends if sequence not in seen]
                place = ends[-1]
                seen = {sequence: at for sequence, at in seen.items() if at >= place[0] - OVERLAP_US}
                seen |= {sequence: at for at, sequence in ends}
                while new and (results := await self._store.results_of(new)):
                    yield results
                    new, sent = new[len(results) :], sent + len(results)
            if is_last or not (wait and self._jobs.may_wait):
                if is_last and batch is not None and sent < batch.jobs:
                    raise JobStoreError(f"some results of batch {batch_id} came late; read them again")
                return
            place = (max(0, place[0] - OVERLAP_US), 0)
            yield []
            await anyio.sleep(RESULTS_INTERVAL_S * 4)
