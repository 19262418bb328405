"""What runs a batch: one function, or three stages that may overlap with those of the next batch."""

import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

T = TypeVar("T")
R = TypeVar("R")

SMOOTHING = 1 / 16


@dataclass(frozen=True, slots=True)
class Stages(Generic[T, R]):
    """A batch in three steps. Each is a function of the payloads and of the result of the step before.

    Synchronous steps run in threads, asynchronous ones in the event loop. While one batch is in `predict`, the next one
    may be in `preprocess` or the one before in `postprocess`, on another thread. With a `max_in_flight` of 1, two
    batches are never in the same step at once, nor one in `preprocess` and one in `postprocess`.
    """

    preprocess: Callable[[list[T]], Any]
    predict: Callable[[list[T], Any], Any]
    postprocess: Callable[[list[T], Any], Sequence[R | Exception] | Awaitable[Sequence[R | Exception]]]


RunBatch = (
    Stages[T, R]
    | Callable[[list[T]], Sequence[R | Exception]]
    | Callable[[list[T]], Awaitable[Sequence[R | Exception]]]
)
"""Runs one batch: takes a list of payloads, and returns a sequence with one output for each, in the same order.

An output that is an `Exception` is the error of that item. A raised exception fails the batch, which is then split.
"""


class StageSeconds(NamedTuple):
    """Seconds of each stage of a batch. For a batch without stages, all of it is `predict_s`."""

    preprocess_s: float
    predict_s: float
    postprocess_s: float

    @property
    def total_s(self) -> float:
        """The sum of the three, without the time between them."""
        return self.preprocess_s + self.predict_s + self.postprocess_s


class StageShares:
    """Shares of a batch's time that its stages take, as exponential averages that start at those of the first batch."""

    def __init__(self) -> None:
        self.preprocess = 0.0
        """The share of the first stage."""
        self.outside = 0.0
        """The share of the first and the last stage together."""
        self.saved_s = 0.0
        """Seconds that overlapping can save at most: those of the second stage, or of the others if these are fewer."""
        self.total_s = math.inf
        """Seconds of all stages; infinite before the first batch."""
        self._smoothing = 1.0

    def add(self, seconds: StageSeconds) -> None:
        """Take a batch into account."""
        if seconds.total_s > 0:
            if math.isinf(self.total_s):
                self.total_s = seconds.total_s
            self.total_s += self._smoothing * (seconds.total_s - self.total_s)
            outside_s = seconds.preprocess_s + seconds.postprocess_s
            self.preprocess += self._smoothing * (seconds.preprocess_s / seconds.total_s - self.preprocess)
            self.outside += self._smoothing * (outside_s / seconds.total_s - self.outside)
            self.saved_s += self._smoothing * (min(outside_s, seconds.predict_s) - self.saved_s)
            self._smoothing = SMOOTHING
