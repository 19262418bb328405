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
        Failure,
        Outcome,
        Priority,
        QueueFullError,
        RequestTooLargeError,
        Stages,
        Success,
    )
    from modalkit.pipelines import (
        AsyncInputModel,
        AsyncOutputModel,
        DelayedFailureOutputModel,
        InferenceOutputModel,
        InferencePipeline,
        PipelineError,
        RejectItem,
        SyncInputModel,
    )
    from modalkit.service.errors import InvalidItemError, NotReadyError, ServiceError
    from modalkit.service.local_gateway import LocalGateway
    from modalkit.service.queue_backends import InMemoryBackend, QueueBackend
    from modalkit.service.settings import Settings
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
    "BatchingError",
    "DeadlineExceededError",
    "DelayedFailureOutputModel",
    "Failure",
    "InMemoryBackend",
    "InferenceOutputModel",
    "InferencePipeline",
    "InferenceWorker",
    "InvalidItemError",
    "LocalGateway",
    "NotReadyError",
    "Outcome",
    "PipelineError",
    "Priority",
    "QueueBackend",
    "QueueFullError",
    "RejectItem",
    "RequestTooLargeError",
    "ServiceError",
    "Settings",
    "Stages",
    "Success",
    "SyncInputModel",
    "create_app",
    "enable_tracing",
    "lifespan_of",
]

_DEFINED_IN = {
    "InferenceWorker": "service.worker",
    "LocalGateway": "service.local_gateway",
    "InvalidItemError": "service.errors",
    "NotReadyError": "service.errors",
    "ServiceError": "service.errors",
    "Settings": "service.settings",
    "create_app": "service.web",
    "enable_tracing": "service.tracing",
    "lifespan_of": "service.web",
    **dict.fromkeys(("InMemoryBackend", "QueueBackend"), "service.queue_backends"),
    **dict.fromkeys(
        (
            "AsyncInputModel",
            "AsyncOutputModel",
            "DelayedFailureOutputModel",
            "InferenceOutputModel",
            "InferencePipeline",
            "PipelineError",
            "RejectItem",
            "SyncInputModel",
        ),
        "pipelines",
    ),
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
