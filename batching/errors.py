"""The errors that the scheduler raises, all from the root `BatchingError`, and the rule for those of users' code."""

import asyncio
import sys
from typing import NoReturn


class BatchingError(Exception):
    """The root of all errors of this package."""


class QueueFullError(BatchingError):
    """Raised when a request is refused because the queue has no room for it. The caller may try again later.

    `retry_after_s` is the predicted time until there is room for it; 0 where that is not known.
    """

    retry_after_s = 0.0

    def __init__(self, depth: int, limit: int, added: int = 1) -> None:
        remedy = "send fewer at once" if added > limit else "retry later"
        super().__init__(
            f"the queue holds {depth} of at most {limit} requests and has no room for {added} more; {remedy}, "
            "or raise its limit (max_queue_items of BatchPolicy, batch_config.max_queue_size in a configuration)"
        )
        self.depth = depth
        self.limit = limit
        self.added = added

    @property
    def is_permanent(self) -> bool:
        """Whether even an empty queue has no room for so many requests at once."""
        return self.added > self.limit


class QueueSlowError(QueueFullError):
    """Raised by `check_room` when what waits before a request is predicted to take longer than `max_queue_s`."""

    def __init__(self, depth: int, limit: int, wait_s: float, max_wait_s: float) -> None:
        super().__init__(depth, limit)
        text = (
            f"the {depth} requests in the queue are predicted to take {wait_s:.3g} s, and more are refused from "
            f"{max_wait_s:g} s on; retry later, or raise the limit (max_queue_s of BatchPolicy, "
            "batch_config.max_queue_seconds in a configuration)"
        )
        self.args = (text,)
        self.retry_after_s = wait_s - max_wait_s


class RequestTooLargeError(BatchingError):
    """Raised when a request alone exceeds `max_batch_tokens`, so that it could never run."""

    def __init__(self, size: int, limit: int) -> None:
        super().__init__(
            f"a request of size {size} can never run: max_batch_tokens is {limit}; shorten it, or raise the limit"
        )
        self.size = size
        self.limit = limit


class DeadlineExceededError(BatchingError):
    """Raised when a request's deadline passed before it had a result."""

    def __init__(self, timeout_s: float) -> None:
        super().__init__(f"no result within {timeout_s:g} s; allow more time, or send less at once")
        self.timeout_s = timeout_s


class DeadlineUnreachableError(DeadlineExceededError):
    """Raised by `check_room` for a request that would still wait at its deadline, by the predictions."""

    def __init__(self, timeout_s: float, wait_s: float) -> None:
        super().__init__(timeout_s)
        text = (
            f"no result is possible within {timeout_s:g} s: what waits before it is predicted to take {wait_s:.3g} s; "
            "allow more time, or retry later"
        )
        self.args = (text,)
        self.retry_after_s = wait_s - timeout_s


class SchedulerClosedError(BatchingError):
    """Raised for a request that arrives after the scheduler began to close, or has not finished when it is aborted."""


class BatchTimeoutError(BatchingError):
    """Raised for a request that took longer than the batch timeout alone, or was given up after others that did."""

    def __init__(self, timeout_s: float, count: int) -> None:
        super().__init__(f"a batch of {count} did not finish within the batch timeout of {timeout_s:g} s")
        self.timeout_s = timeout_s
        self.count = count


class OutputCountError(BatchingError):
    """Raised when a batch does not return exactly one output for each of its inputs."""

    def __init__(self, expected: int, returned: str) -> None:
        super().__init__(f"a list with one output for each of {expected} inputs must be returned, not {returned}")


class InputsMovedError(BatchingError):
    """Raised when a batch, or a stage of it, removes inputs from its list, or changes their order."""

    def __init__(self) -> None:
        super().__init__(
            "a batch removed inputs from its list or changed their order, so that its outputs may be those of other "
            "inputs; let it work on a copy of the list, and return one output for each input, in their order"
        )


def users_error(error: BaseException) -> Exception:
    """The rule for what users' code raises: the error `as_exception`, for the item or whatever the code was called for.

    Nothing else ends by it, be it `SystemExit` or the panic of a library written in Rust, which is no `Exception`. Only
    `KeyboardInterrupt` and the cancellation of this task, also in groups, must go on: those are raised. A cancellation
    that is not that of this task, as of a future that other code cancelled, is an error.
    """
    if isinstance(error, Exception):
        return error
    going_on: tuple[type[BaseException], ...] = (KeyboardInterrupt,)
    if (trio := sys.modules.get("trio")) is not None:
        going_on += (trio.Cancelled,)
    if _is_being_cancelled():
        going_on += (asyncio.CancelledError,)
    in_group = isinstance(error, BaseExceptionGroup) and error.subgroup(going_on) is not None
    if in_group or isinstance(error, going_on):
        raise error
    return as_exception(error)


def _is_being_cancelled() -> bool:
    """Whether the current task is one of asyncio, and is cancelled."""
    try:
        task = asyncio.current_task()
    except RuntimeError:  # there is none in this thread, or on trio
        return False
    return task is not None and task.cancelling() > 0


def as_exception(error: BaseException) -> Exception:
    """The error itself; in place of one that is no `Exception`, another one with that as its cause."""
    if isinstance(error, Exception):
        return error
    if isinstance(error, asyncio.CancelledError):
        replacement: Exception = BatchingError("it was cancelled by something inside it")
    else:
        replacement = RuntimeError(f"users' code raised {text_of(error)}")
    replacement.__cause__ = error
    return replacement


def text_of(error: BaseException) -> str:
    """The class and the message of an error. It never raises, even if the error's ``__str__`` does."""
    try:
        text = str(error)
    except BaseException:  # noqa: BLE001  # __str__ of a user's class may raise anything
        text = "(its message cannot be shown: __str__ raises)"
    return f"{type(error).__name__}: {text}"


def raise_anew(error: Exception) -> NoReturn:
    """Raise an error without what earlier raises by this function have added to its traceback.

    A pipeline may return one error for many items: it would come to hold the frames of all their callers.
    """
    first = entry = error.__traceback__
    while entry is not None:
        if entry.tb_frame.f_code is raise_anew.__code__:
            first = entry.tb_next
        entry = entry.tb_next
    try:
        raise error.with_traceback(first)
    finally:
        del error, first  # else the error and this frame refer to each other until garbage collection


def number_text(number: int) -> str:
    """A number for a message; if it is very long, only how many bits it has."""
    return f"{number}" if number.bit_length() <= 64 else f"a number of {number.bit_length()} bits"
