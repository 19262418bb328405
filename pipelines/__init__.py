"""The model side of modalkit: what a pipeline is, its input and output models, and a sentiment pipeline.

`modalkit.pipelines.sentiment` is not imported here, because it brings in torch and transformers.
"""

from modalkit.pipelines.errors import BatchTooLargeError, ModelLoadError, PipelineError
from modalkit.pipelines.inference_pipeline import InferencePipeline
from modalkit.pipelines.iomodel import (
    AnyInput,
    AsyncInputModel,
    AsyncOutputModel,
    DelayedFailureOutputModel,
    InferenceOutputModel,
    SyncInputModel,
)

__all__ = [
    "AnyInput",
    "AsyncInputModel",
    "AsyncOutputModel",
    "BatchTooLargeError",
    "DelayedFailureOutputModel",
    "InferenceOutputModel",
    "InferencePipeline",
    "ModelLoadError",
    "PipelineError",
    "SyncInputModel",
]
