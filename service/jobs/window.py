"""The jobs of one model that a runner has claimed and that have not ended."""

import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass

from modalkit.batching import Priority
from modalkit.batching.pending import Withdraw
from modalkit.service.jobs.model import Job

SPARE_DEADLINES = 10_000
"""Outdated entries that the heap of deadlines may have, beyond two for each job in the window."""


@dataclass(slots=True)
class _Entry:
    job: Job
    size_bytes: int
    deadline: float
    withdraw: Withdraw | None = None
    """Withdraws it from the scheduler, once it was given to it."""


class Window:
    """Claimed jobs by their ids, with their deadlines, in wall-clock Unix seconds."""

    def __init__(self) -> None:
        self._entries: dict[str, _Entry] = {}
        self._deadlines: list[tuple[float, str]] = []
        self.bulk = 0
        """How many of the jobs are bulk."""
        self.size_bytes = 0
        """The bytes of the jobs."""

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, job: Job) -> bool:
        return job.job_id in self._entries

    def add(self, job: Job, deadline: float) -> None:
        """Add a claimed job."""
        entry = self._entries[job.job_id] = _Entry(job, job.size_bytes, deadline)
        self.bulk += job.priority is Priority.BULK
        self.size_bytes += entry.size_bytes
        heapq.heappush(self._deadlines, (deadline, job.job_id))

    def start(self, job: Job, withdraw: Withdraw) -> None:
        """Note that a job was given to the scheduler, and how it is withdrawn there."""
        self._entries[job.job_id].withdraw = withdraw

    def remove(self, job_id: str) -> Job | None:
        """Remove a job, from the scheduler too, and return it; None if it is not there."""
        entry = self._entries.pop(job_id, None)
        if entry is None:
            return None
        if entry.withdraw is not None:
            entry.withdraw()
        self.bulk -= entry.job.priority is Priority.BULK
        self.size_bytes -= entry.size_bytes
        return entry.job

    def remove_unstarted(self) -> Iterator[Job]:
        """Remove the jobs of which no batch has begun."""
        for job_id, entry in list(self._entries.items()):
            if entry.withdraw is None or entry.withdraw(only_waiting=True):
                entry.withdraw = None
                self.remove(job_id)
                yield entry.job

    def remove_overdue(self, now: float) -> Iterator[Job]:
        """Remove the jobs whose deadlines have come."""
        if len(self._deadlines) > 2 * len(self) + SPARE_DEADLINES:
            # Entries of jobs that have ended stay behind that of a job which takes long.
            self._deadlines = [entry for entry in self._deadlines if entry[1] in self._entries]
            heapq.heapify(self._deadlines)
        while self._deadlines and (self._deadlines[0][0] <= now or self._deadlines[0][1] not in self._entries):
            deadline, job_id = heapq.heappop(self._deadlines)
            entry = self._entries.get(job_id)
            if entry is not None and entry.deadline == deadline:  # else it was an earlier run's
                self.remove(job_id)
                yield entry.job

    @property
    def next_deadline(self) -> float:
        """The earliest deadline, or an earlier one of a job that has ended."""
        return self._deadlines[0][0] if self._deadlines else math.inf

    def withdraw_all(self) -> None:
        """Withdraw all jobs from the scheduler."""
        for entry in self._entries.values():
            if entry.withdraw is not None:
                entry.withdraw()
