"""What users of modalkit import; everything here is defined in `modalkit.batching` and `modalkit.service`."""

from modalkit.batching import BatchPolicy, BatchRecord, BatchScheduler, Failure, Stages, Success
from modalkit.service.worker import InferenceWorker

__all__ = ["BatchPolicy", "BatchRecord", "BatchScheduler", "Failure", "InferenceWorker", "Stages", "Success"]
