"""Pipelines, which run models, with their input and output models, and a sentiment pipeline.

`modalkit.pipelines.sentiment` is not imported here, because it imports torch and transformers.
"""

from modalkit.pipelines.engines import Engine, EngineChoice, EngineSettings, load_engine
from modalkit.pipelines.errors import BatchTooLargeError, EngineError, ModelLoadError, PipelineError
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
    "Engine",
    "EngineChoice",
    "EngineError",
    "EngineSettings",
    "InferenceOutputModel",
    "InferencePipeline",
    "ModelLoadError",
    "PipelineError",
    "SyncInputModel",
    "load_engine",
]
