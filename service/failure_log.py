"""Logs what pipelines raise: a traceback for each distinct error, with the number of items that it failed."""

import logging
import time
from collections import Counter
from collections.abc import Callable
from traceback import TracebackException, walk_tb

from modalkit.batching import BatchingError, BatchRecord
from modalkit.pipelines import RejectItem
from modalkit.service import pipeline_batches
from modalkit.service.errors import MAX_ERROR_BYTES, ServiceError, cut_text, describe_error

logger = logging.getLogger(__name__)

PERIOD_S = 60.0
"""Seconds in which an error that was logged is not logged again."""
MAX_ERRORS_PER_PERIOD = 10
MAX_FRAMES = 30
"""Frames of one traceback, the innermost."""


class FailureLog:
    """A sink for the batch records of one model: logs the errors of items, except a `RejectItem`.

    Errors of one class, message and line count as the same. In each period of `PERIOD_S` seconds an error is logged
    once, and `MAX_ERRORS_PER_PERIOD` errors in all; the items that other errors failed are counted, and their number is
    logged with the first error of the next period. Keeps no error, because its frames may hold tensors. `clock` gives
    seconds.
    """

    def __init__(self, model_name: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._model_name = model_name
        self._clock = clock
        self._period_ends_s = float("-inf")
        self._logged: set[str] = set()
        self._skipped = 0

    def __call__(self, record: BatchRecord) -> None:
        """Log the errors of a batch."""
        errors = {_key(error): error for error in record.errors if not isinstance(error, RejectItem)}
        if not errors:
            return
        if self._clock() >= self._period_ends_s:
            self._start_period()
        items = Counter(map(_key, record.errors))
        for key, error in errors.items():
            if key in self._logged or len(self._logged) >= MAX_ERRORS_PER_PERIOD:
                self._skipped += items[key]
            else:
                self._logged.add(key)
                logger.error("%s: %s failed: %s", self._model_name, _items(items[key]), _text(error))

    def _start_period(self) -> None:
        if self._skipped:
            logger.error("%s: %s more failed since the errors logged before", self._model_name, _items(self._skipped))
        self._period_ends_s = self._clock() + PERIOD_S
        self._logged.clear()
        self._skipped = 0


def _items(count: int) -> str:
    return "1 item" if count == 1 else f"{count} items"


def _key(error: Exception) -> str:
    """The same for errors that are the same."""
    lines = [f"{frame.f_code.co_filename}:{line}" for frame, line in walk_tb(error.__traceback__)]
    return f"{describe_error(error)} {lines[-1:]}"


def _text(error: Exception) -> str:
    """The traceback from the call of the pipeline on; of an error of ours the message, which says everything."""
    if isinstance(error, ServiceError | BatchingError):
        return describe_error(error)
    described = TracebackException.from_exception(error)
    _cut_frames(described)
    text = "".join(described.format()).rstrip()
    if len(text) > MAX_ERROR_BYTES:  # its end, which says what the error is, will be cut
        text = f"{describe_error(error)}\n{text}"
    return cut_text(text)


def _cut_frames(described: TracebackException) -> None:
    """Cut the frames of an error and of those that caused it; a loop, because there may be thousands."""
    chain = [described]
    while chain:
        error = chain.pop()
        calls = [i for i, frame in enumerate(error.stack, start=1) if frame.filename == pipeline_batches.__file__]
        del error.stack[: max(0, len(error.stack) - MAX_FRAMES, *calls[-1:])]
        chain += filter(None, (error.__cause__, error.__context__))
