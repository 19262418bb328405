"""The root of the errors that `service` raises; each part derives its own from it."""

from typing import Any

from batching import BatchingError
from pipelines import PipelineError


class ServiceError(Exception):
    """The root of all errors of this package. One can be pickled: it may travel from a container to its caller."""

    def __reduce__(self) -> tuple[Any, ...]:
        # Python's own way calls the constructor with the message, which ours do not take.
        return _restored, (type(self), self.args, self.__dict__)


def _restored(kind: type[ServiceError], args: tuple[Any, ...], state: dict[str, Any]) -> ServiceError:
    error = kind.__new__(kind)
    error.args = args
    error.__dict__.update(state)
    return error


class ItemRejectedError(ServiceError):
    """Raised for an item that the pipeline answered with an output whose status is ``error``."""


class PipelineOutputError(ServiceError):
    """Raised for an item whose output is no `InferenceOutputModel`."""

    def __init__(self, output: object) -> None:
        super().__init__(
            f"the pipeline returned {output!r:.100} for an item; postprocess must return an InferenceOutputModel"
        )


class RemoteItemError(ServiceError):
    """Raised here for an item that failed in another process; `error_type` is the class of its error there."""

    def __init__(self, message: str, error_type: str) -> None:
        super().__init__(message)
        self.error_type = error_type


class RemoteCallError(ServiceError):
    """Raised when a call of another process did not come back with a result, however often it was tried."""


class RemoteTimeoutError(RemoteCallError):
    """Raised when a call of another process took longer than it may."""


class ContainerFaultError(ServiceError):
    """Raised by a call that this container cannot answer, for it to be run again in another one."""


class DeviceFaultError(ContainerFaultError):
    """Raised by a call whose items ran into a fault of the container's device."""

    def __init__(self, fault: str) -> None:
        super().__init__(f"the device of this container is broken: {fault}")
        self.fault = fault


class NotAvailableError(ServiceError):
    """Raised for what cannot be done with the engine that jobs run in."""


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
