"""The errors of `pipelines`."""


class PipelineError(Exception):
    """The root of the errors of `pipelines`."""


class ModelLoadError(PipelineError):
    """Raised when a pipeline cannot be built: a wrong setting, unusable model files, or a missing device."""


class BatchTooLargeError(PipelineError):
    """Raised by a pipeline when a batch does not fit into memory, but smaller batches of its items may."""


class EngineError(ModelLoadError):
    """Raised when the engine that was asked for cannot run a model: a missing package, or a format it cannot use."""
