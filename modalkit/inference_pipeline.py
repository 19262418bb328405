"""The class that every model is a subclass of, and how it refuses an item."""

from modalkit.pipelines.errors import RejectItem
from modalkit.pipelines.inference_pipeline import InferencePipeline

__all__ = ["InferencePipeline", "RejectItem"]
