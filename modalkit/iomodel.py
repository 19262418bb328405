"""The input and output models that users build on."""

from modalkit.pipelines.iomodel import (
    AsyncInputModel,
    AsyncOutputModel,
    DelayedFailureOutputModel,
    InferenceOutputModel,
    SyncInputModel,
)

__all__ = [
    "AsyncInputModel",
    "AsyncOutputModel",
    "DelayedFailureOutputModel",
    "InferenceOutputModel",
    "SyncInputModel",
]
