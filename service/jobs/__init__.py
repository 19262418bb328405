"""Asynchronous jobs: what a job is, and the stores that keep jobs."""

from service.jobs.errors import (
    DuplicateJobError,
    JobStoreBusyError,
    JobStoreClosedError,
    JobStoreError,
    JobStoreFullError,
    JobStoreLockedError,
    JobStoreSchemaError,
    JobStoreUnavailableError,
)
from service.jobs.memory import MemoryJobStore
from service.jobs.model import DeliveryRecord, DeliveryStatus, FinishedJob, Job, JobStatus, NewJob
from service.jobs.sqlite import SqliteJobStore
from service.jobs.store import JobStore

__all__ = [
    "DeliveryRecord",
    "DeliveryStatus",
    "DuplicateJobError",
    "FinishedJob",
    "Job",
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
    "SqliteJobStore",
]
