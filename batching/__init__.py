"""Dynamic batching: a bounded queue, a policy that forms batches by predicted cost, a shell that runs them (anyio)."""

from modalkit.batching.cost import CostModel, PaddedCostModel
from modalkit.batching.errors import (
    BatchingError,
    BatchTimeoutError,
    DeadlineExceededError,
    DeadlineUnreachableError,
    InputsMovedError,
    OutputCountError,
    QueueFullError,
    QueueSlowError,
    RequestTooLargeError,
    SchedulerClosedError,
)
from modalkit.batching.execution import Preparation
from modalkit.batching.measured_cost import CostFeature, MeasuredCostModel
from modalkit.batching.planner import BatchPlanner
from modalkit.batching.policy import Batch, BatchPolicy, Decision, DispatchReason
from modalkit.batching.queue import RequestQueue
from modalkit.batching.request import Failure, Outcome, Priority, QueueOptions, Request, RequestOptions, Success
from modalkit.batching.scheduler import BatchScheduler
from modalkit.batching.stages import RunBatch, Stages, StageSeconds
from modalkit.batching.statistics import BatchRecord, SchedulerStatistics

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
    "DeadlineUnreachableError",
    "Decision",
    "DispatchReason",
    "Failure",
    "InputsMovedError",
    "MeasuredCostModel",
    "Outcome",
    "OutputCountError",
    "PaddedCostModel",
    "Preparation",
    "Priority",
    "QueueFullError",
    "QueueOptions",
    "QueueSlowError",
    "Request",
    "RequestOptions",
    "RequestQueue",
    "RequestTooLargeError",
    "RunBatch",
    "SchedulerClosedError",
    "SchedulerStatistics",
    "StageSeconds",
    "Stages",
    "Success",
]
