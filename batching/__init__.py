"""Dynamic batching: a bounded queue, a policy that forms batches by predicted cost, a shell that runs them (anyio)."""

from batching.bisection import Bisection
from batching.cost import CostModel, PaddedCostModel
from batching.errors import (
    BatchingError,
    BatchTimeoutError,
    DeadlineExceededError,
    OutputCountError,
    QueueFullError,
    RequestTooLargeError,
    SchedulerClosedError,
)
from batching.policy import Batch, BatchPlanner, BatchPolicy, Decision
from batching.queue import RequestQueue
from batching.request import Failure, Outcome, Priority, Request, Success
from batching.scheduler import BatchScheduler, RunBatch
from batching.statistics import SchedulerStatistics

__all__ = [
    "Batch",
    "BatchPlanner",
    "BatchPolicy",
    "BatchScheduler",
    "BatchTimeoutError",
    "BatchingError",
    "Bisection",
    "CostModel",
    "DeadlineExceededError",
    "Decision",
    "Failure",
    "Outcome",
    "OutputCountError",
    "PaddedCostModel",
    "Priority",
    "QueueFullError",
    "Request",
    "RequestQueue",
    "RequestTooLargeError",
    "RunBatch",
    "SchedulerClosedError",
    "SchedulerStatistics",
    "Success",
]
