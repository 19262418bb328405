"""Dynamic batching: a bounded queue, a policy that forms batches by predicted cost, a shell that runs them (anyio)."""

from batching.cost import CostModel, PaddedCostModel
from batching.errors import (
    BatchingError,
    BatchTimeoutError,
    DeadlineExceededError,
    InputsMovedError,
    OutputCountError,
    QueueFullError,
    RequestTooLargeError,
    SchedulerClosedError,
)
from batching.measured_cost import CostFeature, MeasuredCostModel
from batching.planner import BatchPlanner
from batching.policy import Batch, BatchPolicy, Decision, DispatchReason
from batching.queue import RequestQueue
from batching.records import BatchRecord
from batching.request import Failure, Outcome, Priority, Request, Success
from batching.scheduler import BatchScheduler
from batching.stages import RunBatch, Stages, StageSeconds
from batching.statistics import SchedulerStatistics

__all__ = [
    "Batch",
    "BatchPlanner",
    "BatchPolicy",
    "BatchRecord",
    "BatchScheduler",
    "BatchTimeoutError",
    "BatchingError",
    "CostFeature",
    "CostModel",
    "DeadlineExceededError",
    "Decision",
    "DispatchReason",
    "Failure",
    "InputsMovedError",
    "MeasuredCostModel",
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
    "StageSeconds",
    "Stages",
    "Success",
]
