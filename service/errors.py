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


class OutputNotJsonError(ServiceError):
    """Raised for an item whose output holds what JSON cannot: a NumPy number, bytes, half of a surrogate pair."""

    def __init__(self, reason: Exception) -> None:
        super().__init__(
            f"the pipeline's output is no JSON ({describe_error(reason)}); postprocess must return plain values, such "
            "as float(score) for a NumPy number"
        )


def describe_error(error: Exception) -> str:
    """One line for whoever gets the error as text: ours speak for themselves, others need the name of their class.

    Never raises, whatever the error is, and what it returns can be written as UTF-8.
    """
    try:
        text = str(error)
    except Exception:  # noqa: BLE001  # the error of a user's own class, whose __str__ may do anything
        text = "(its message cannot be shown: __str__ raises)"
    if not isinstance(error, ServiceError | BatchingError | PipelineError):
        text = f"{type(error).__name__}: {text}"
    return text.encode(errors="backslashreplace").decode()
