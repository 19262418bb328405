"""Asynchronous jobs: what a job is, and the stores that keep jobs."""

from modalkit.service.jobs.errors import (
    DuplicateJobError,
    IdempotencyKeyReusedError,
    JobStoreBusyError,
    JobStoreClosedError,
    JobStoreError,
    JobStoreFullError,
    JobStoreLockedError,
    JobStoreSchemaError,
    JobStoreUnavailableError,
)
from modalkit.service.jobs.memory import MemoryJobStore
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
from modalkit.service.jobs.sqlite import SqliteJobStore
from modalkit.service.jobs.store import JobCounts, JobStore

__all__ = [
    "DeliveryRecord",
    "DeliveryStatus",
    "DuplicateJobError",
    "FinishedJob",
    "IdempotencyKeyReusedError",
    "Job",
    "JobCounts",
    "JobFilter",
    "JobPage",
    "JobRetry",
    "JobStatus",
    "JobStore",
    "JobStoreBusyError",
    "JobStoreClosedError",
    "JobStoreError",
    "JobStoreFullError",
    "JobStoreLockedError",
    "JobStoreSchemaError",
    "JobStoreUnavailableError",
    "MemoryJobStore",
    "NewJob",
    "Recovery",
    "SqliteJobStore",
]
