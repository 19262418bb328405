"""The model side of modalkit: what a pipeline is, its input and output models, and a sentiment pipeline.

`pipelines.sentiment` is not imported here, because it brings in torch and transformers.
"""

from pipelines.errors import BatchTooLargeError, ModelLoadError, PipelineError
from pipelines.inference_pipeline import InferencePipeline
from pipelines.iomodel import (
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
