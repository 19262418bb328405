"""Asynchronous jobs: what a job is, and the stores that keep jobs."""

from service.jobs.errors import (
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
from service.jobs.memory import MemoryJobStore
from service.jobs.model import (
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
from service.jobs.sqlite import SqliteJobStore
from service.jobs.store import JobCounts, JobStore

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
