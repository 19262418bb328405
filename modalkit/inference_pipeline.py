"""The class that every model is a subclass of."""

from modalkit.pipelines.inference_pipeline import InferencePipeline

__all__ = ["InferencePipeline"]
