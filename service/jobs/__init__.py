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
from modalkit.service.jobs.model import (
    DeliveryRecord,
    DeliveryStatus,
    Job,
    JobCounts,
    JobEnd,
    JobFilter,
    JobPage,
    JobPiece,
    JobRetry,
    JobStatus,
    Recovery,
)
from modalkit.service.jobs.sqlite import MemoryJobStore, SqliteJobStore
from modalkit.service.jobs.store import JobStore

__all__ = [
    "DeliveryRecord",
    "DeliveryStatus",
    "DuplicateJobError",
    "IdempotencyKeyReusedError",
    "Job",
    "JobCounts",
    "JobEnd",
    "JobFilter",
    "JobPage",
    "JobPiece",
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
    "Recovery",
    "SqliteJobStore",
]
