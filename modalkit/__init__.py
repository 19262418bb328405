"""What users of modalkit import.

Everything here is defined in `modalkit.batching`, `modalkit.pipelines` and `modalkit.service`, and is imported from
there when it is first used: ``import modalkit`` itself loads neither a model library nor a web framework.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modalkit.batching import (
        BatchingError,
        BatchPolicy,
        BatchRecord,
        BatchScheduler,
        BatchTimeoutError,
        DeadlineExceededError,
        DeadlineUnreachableError,
        Failure,
        InputsMovedError,
        Outcome,
        OutputCountError,
        Priority,
        QueueFullError,
        RequestTooLargeError,
        SchedulerClosedError,
        Stages,
        Success,
    )
    from modalkit.pipelines import (
        AsyncInputModel,
        AsyncOutputModel,
        BatchTooLargeError,
        DelayedFailureOutputModel,
        InferenceOutputModel,
        InferencePipeline,
        ModelLoadError,
        PipelineError,
        RejectItem,
        SyncInputModel,
    )
    from modalkit.service.errors import InvalidItemError, NotReadyError, ReloadError, ServiceError, UnknownModelError
    from modalkit.service.jobs import (
        DeliveryStatus,
        IdempotencyKeyReusedError,
        Job,
        JobStatus,
        JobStoreBusyError,
        JobStoreError,
        JobStoreFullError,
    )
    from modalkit.service.jobs.queue_rules import QueueNotAllowedError
    from modalkit.service.loading import LoadError
    from modalkit.service.local_gateway import LocalGateway
    from modalkit.service.queue_backends import InMemoryBackend, QueueBackend
    from modalkit.service.settings import Settings, SettingsError
    from modalkit.service.tracing import enable_tracing
    from modalkit.service.web import create_app, lifespan_of
    from modalkit.service.worker import InferenceWorker

__all__ = [
    "AsyncInputModel",
    "AsyncOutputModel",
    "BatchPolicy",
    "BatchRecord",
    "BatchScheduler",
    "BatchTimeoutError",
    "BatchTooLargeError",
    "BatchingError",
    "DeadlineExceededError",
    "DeadlineUnreachableError",
    "DelayedFailureOutputModel",
    "DeliveryStatus",
    "Failure",
    "IdempotencyKeyReusedError",
    "InMemoryBackend",
    "InferenceOutputModel",
    "InferencePipeline",
    "InferenceWorker",
    "InputsMovedError",
    "InvalidItemError",
    "Job",
    "JobStatus",
    "JobStoreBusyError",
    "JobStoreError",
    "JobStoreFullError",
    "LoadError",
    "LocalGateway",
    "ModelLoadError",
    "NotReadyError",
    "Outcome",
    "OutputCountError",
    "PipelineError",
    "Priority",
    "QueueBackend",
    "QueueFullError",
    "QueueNotAllowedError",
    "RejectItem",
    "ReloadError",
    "RequestTooLargeError",
    "SchedulerClosedError",
    "ServiceError",
    "Settings",
    "SettingsError",
    "Stages",
    "Success",
    "SyncInputModel",
    "UnknownModelError",
    "create_app",
    "enable_tracing",
    "lifespan_of",
]

_DEFINED_IN = {
    **dict.fromkeys(
        (
            "AsyncInputModel",
            "AsyncOutputModel",
            "BatchTooLargeError",
            "DelayedFailureOutputModel",
            "InferenceOutputModel",
            "InferencePipeline",
            "ModelLoadError",
            "PipelineError",
            "RejectItem",
            "SyncInputModel",
        ),
        "pipelines",
    ),
    **dict.fromkeys(
        ("InvalidItemError", "NotReadyError", "ReloadError", "ServiceError", "UnknownModelError"), "service.errors"
    ),
    **dict.fromkeys(
        (
            "DeliveryStatus",
            "IdempotencyKeyReusedError",
            "Job",
            "JobStatus",
            "JobStoreBusyError",
            "JobStoreError",
            "JobStoreFullError",
        ),
        "service.jobs",
    ),
    "QueueNotAllowedError": "service.jobs.queue_rules",
    "LoadError": "service.loading",
    "LocalGateway": "service.local_gateway",
    **dict.fromkeys(("InMemoryBackend", "QueueBackend"), "service.queue_backends"),
    **dict.fromkeys(("Settings", "SettingsError"), "service.settings"),
    "enable_tracing": "service.tracing",
    **dict.fromkeys(("create_app", "lifespan_of"), "service.web"),
    "InferenceWorker": "service.worker",
}
"""The module of each name below `modalkit`; names that are not here are in ``batching``."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_DEFINED_IN.get(name, 'batching')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
