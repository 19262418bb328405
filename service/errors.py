"""The root of the errors that `service` raises; each part derives its own from it."""

from batching import BatchingError
from pipelines import PipelineError


class ServiceError(Exception):
    """The root of all errors of this package."""


class ItemRejectedError(ServiceError):
    """Raised for an item that the pipeline answered with an output whose status is ``error``."""


class PipelineOutputError(ServiceError):
    """Raised for an item whose output is no `InferenceOutputModel`."""

    def __init__(self, output: object) -> None:
        super().__init__(
            f"the pipeline returned {output!r:.100} for an item; postprocess must return an InferenceOutputModel"
        )


def describe_error(error: Exception) -> str:
    """One line for whoever gets the error as text: ours speak for themselves, others need the name of their class."""
    if isinstance(error, ServiceError | BatchingError | PipelineError):
        return str(error)
    return f"{type(error).__name__}: {error}"
