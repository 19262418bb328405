"""The errors of `pipelines`."""


class PipelineError(Exception):
    """The root of the errors that `pipelines` raises by itself."""


class ModelLoadError(PipelineError):
    """Raised when a pipeline cannot be built: a wrong setting, unusable model files, or a device that is not there."""


class BatchTooLargeError(PipelineError):
    """Raised by a pipeline when a batch does not fit its memory, but smaller batches of the same items may."""
