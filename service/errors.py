"""Errors that several parts of `service` use, their root, and errors as text."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from sysconfig import get_path
from traceback import extract_tb
from typing import Any, TypeVar, cast

from modalkit.batching import BatchingError
from modalkit.pipelines import InferenceOutputModel, PipelineError

MAX_ERROR_BYTES = 8 * 1024
"""Limit of the bytes of UTF-8 of an error as text: in the store, in messages and in HTTP answers."""
MAX_NOTE_BYTES = 64
"""Limit of the bytes of what follows a text that was cut."""
MAX_CODE_CHARACTERS = 200
"""Limit of the characters of a line of code beside an error."""

_INSTALLED = frozenset({"site-packages", "dist-packages"})
_FOLDERS_OF_OTHERS = (f"{Path(__file__).parents[1]}/", f"{get_path('stdlib')}/")

ErrorT = TypeVar("ErrorT", bound=BaseException)


class ServiceError(Exception):
    """The root of all errors of this package. It can be pickled: it may travel from a container to its caller."""

    def __reduce__(self) -> tuple[Any, ...]:
        # By default, unpickling calls the constructor with the message; the constructors here take other arguments.
        return restored, (type(self), self.args, self.__dict__)


def restored(kind: type[ErrorT], args: tuple[Any, ...], state: dict[str, Any]) -> ErrorT:
    """An error without a call of its constructor."""
    error = kind.__new__(kind)
    error.args = args
    error.__dict__.update(state)
    return error


class UsageError(ServiceError):
    """Raised for an option or an input that is wrong, so that the command line ends with the code 2."""


class UnknownModelError(UsageError):
    """Raised when a model is asked for that the configuration does not name."""

    def __init__(self, model_name: str, known: list[str]) -> None:
        super().__init__(f"there is no model {model_name!r}; configured are: {', '.join(known)}")
        self.model_name = model_name
        self.known = known


class UnknownJobError(ServiceError):
    """Raised when a job is asked for that is not stored."""

    def __init__(self, job_id: str) -> None:
        super().__init__(f"there is no job {job_id!r}: the id is wrong, or the job was removed after its result_ttl")
        self.job_id = job_id


class UnknownBatchError(ServiceError):
    """Raised when a batch is asked for of which no job is stored."""

    def __init__(self, batch_id: str) -> None:
        super().__init__(
            f"there is no batch {batch_id!r}: the id is wrong, no job was submitted with it, or all were removed after "
            "their result_ttl"
        )
        self.batch_id = batch_id


class Readiness(StrEnum):
    """Whether a model takes requests, and if not, why."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    RESTARTING = "restarting"
    """It hangs, and is loaded anew; what does not hang may still be answered."""
    BROKEN = "broken"
    FAILED = "failed"


class NotReadyError(ServiceError):
    """Raised when a request comes for a model that is still loading, could not be loaded, or is shutting down.

    `reason` says why it could not be loaded, for callers: without lines of code.
    """

    def __init__(self, model_name: str, readiness: Readiness, reason: str | None = None) -> None:
        why = "; see /health/ready" if reason is None else f" ({reason})"
        super().__init__(f"model {model_name!r} takes no requests now: it is {readiness}{why}")
        self.model_name = model_name
        self.readiness = readiness


class ReloadError(ServiceError):
    """Raised when a model is not reloaded, or its limits are not changed: it goes on as it was."""

    def __init__(self, model_name: str, reason: str) -> None:
        super().__init__(f"model {model_name!r} goes on as it was: {reason}")
        self.model_name = model_name


class InvalidItemError(ServiceError, ValueError):
    """Raised for an item or a request that its model refuses; `errors` has the fields, as HTTP answers do."""

    def __init__(self, message: str, errors: Sequence[Mapping[str, Any]]) -> None:
        super().__init__(message)
        self.errors = errors


class PipelineOutputError(ServiceError):
    """Raised for an item whose output is not of the model's `output_model`."""

    def __init__(self, output: object, output_model: type[InferenceOutputModel], reason: str = "") -> None:
        super().__init__(
            f"the pipeline returned {describe_value(output)} for an item, where its output_model is "
            f"{output_model.__name__}{f' ({reason})' if reason else ''}; return an instance of it for each item"
        )


class NotAwaitedError(ServiceError):
    """Raised when a method of a pipeline returns a coroutine, or another awaitable, in place of a value."""

    def __init__(self, source: str, awaitable: object) -> None:
        name = getattr(awaitable, "__qualname__", "")
        super().__init__(
            f"{source} returned a {_class_name(type(awaitable))}{f' of {name}' if name else ''} that was not awaited; "
            "write 'await' before the call that makes it, in an 'async def'"
        )


class RetryableError(ServiceError):
    """Raised in place of an error that the pipeline declares transient (`retryable_errors`), which is its cause.

    A job runs again later; another caller may send its item again.
    """

    def __init__(self, cause: Exception) -> None:
        super().__init__(describe_error(cause))


class RemoteItemError(ServiceError):
    """Raised for an item that failed in another process; `error_type` is the class of the error that it had there."""

    def __init__(self, message: str, error_type: str) -> None:
        super().__init__(message)
        self.error_type = error_type


class RemoteCallError(ServiceError):
    """Raised when a call of another process had no result after all its attempts."""


class RemoteTimeoutError(RemoteCallError):
    """Raised when a call of another process exceeded its time limit."""


class ContainerFaultError(ServiceError):
    """Raised by a call that this container cannot run, so that it is run again in another container."""


class DeviceFaultError(ContainerFaultError):
    """Raised by a call whose items failed by a fault of the container's device."""

    def __init__(self, fault: str) -> None:
        super().__init__(f"the device of this container is broken: {fault}")
        self.fault = fault


class NotAvailableError(ServiceError):
    """Raised for what cannot be done with the engine that jobs run in."""


class OutputNotJsonError(ServiceError):
    """Raised for an output that JSON cannot hold: with bytes, an object of any class, or half of a surrogate pair."""

    def __init__(self, reason: Exception, fields: Sequence[str] = ()) -> None:
        where = f"{', '.join(fields)}: " if fields else ""
        super().__init__(
            f"the pipeline's output is no JSON ({where}{describe_error(reason)}); return values that JSON has: texts, "
            "numbers, lists and dictionaries; bytes as base64"
        )


def lone_error(error: BaseException) -> BaseException:
    """The only error in a group, as of a task group of which one task failed; any other error itself."""
    while issubclass(type(error), BaseExceptionGroup):  # as `isinstance`, but no code of the error's own runs
        errors = cast("BaseExceptionGroup[BaseException]", error).exceptions
        if len(errors) > 1:
            break
        error = errors[0]
    return error


def describe_error(error: BaseException) -> str:
    """The error as text for callers: its message, after the name of its class unless it is an error of modalkit.

    Of a group with one error, it is that one. Never raises, whatever the error is. The text can be written as UTF-8, in
    at most `MAX_ERROR_BYTES`.
    """
    error = lone_error(error)
    kind, text = type(error), error_text(error)
    if not issubclass(kind, ServiceError | BatchingError | PipelineError):
        text = f"{_class_name(kind)}: {text}"
    return cut_text(text)


def describe_with_line(error: BaseException) -> str:
    """`describe_error`, and the line of the user's code that raised the error, if one did. Never raises."""
    frames = [frame for frame in extract_tb(error.__traceback__) if _is_users(frame.filename)]
    if not frames:
        return describe_error(error)
    frame = frames[-1]
    file = frame.filename
    with suppress(OSError):  # the working directory may be gone
        file = file.removeprefix(f"{Path.cwd()}/")
    code = (frame.line or "")[:MAX_CODE_CHARACTERS]
    return f"{describe_error(error)} ({file}, line {frame.lineno}, in {frame.name}{f': {code}' if code else ''})"


def _is_users(file: str) -> bool:
    """Whether a file belongs neither to modalkit, nor to Python, nor to an installed package."""
    return not file.startswith(("<", *_FOLDERS_OF_OTHERS)) and _INSTALLED.isdisjoint(Path(file).parts)


def error_text(error: BaseException) -> str:
    """The error's message. Never raises, whatever the error's own class does."""
    try:
        return _plain(str(error))
    except BaseException:  # noqa: BLE001  # the error of a user's own class, whose __str__ may do anything
        return "(its message cannot be shown: __str__ raises)"


def describe_value(value: object) -> str:
    """The beginning of the ``repr`` of a user's value. Never raises."""
    try:
        return _plain(repr(value))[:100]
    except BaseException:  # noqa: BLE001  # a user's own class, whose __repr__ may do anything
        return f"a {_class_name(type(value))} whose __repr__ raises"


def cut_text(text: str) -> str:
    """A text that UTF-8 can hold, in at most `MAX_ERROR_BYTES`; a cut text ends with the number of cut characters."""
    encoded = text[:MAX_ERROR_BYTES].encode(errors="backslashreplace")
    if len(text) <= MAX_ERROR_BYTES and len(encoded) <= MAX_ERROR_BYTES:
        return encoded.decode()
    kept = encoded[: MAX_ERROR_BYTES - MAX_NOTE_BYTES].decode(errors="ignore")
    return f"{kept} … ({max(1, len(text) - len(kept))} more characters)"


def _plain(text: str) -> str:
    """The text as a plain `str`; the methods of a subclass of `str` may do anything."""
    return str.__getitem__(text, slice(None))


def _class_name(kind: type) -> str:
    name: str = type.__dict__["__name__"].__get__(kind)  # the real one: a metaclass may define another
    return name
