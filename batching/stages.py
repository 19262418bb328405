"""What runs a batch: one function, or three stages that may overlap those of the next batch."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

T = TypeVar("T")
R = TypeVar("R")

SMOOTHING = 1 / 16


@dataclass(frozen=True, slots=True)
class Stages(Generic[T, R]):
    """A batch in three steps, each a synchronous function of the payloads and of what the step before returned.

    While one batch is in `predict`, the next may be in `preprocess` and the one before in `postprocess`, on another
    thread; no two batches are ever in the same step, nor in `preprocess` and `postprocess`, at once.
    """

    preprocess: Callable[[list[T]], Any]
    predict: Callable[[list[T], Any], Any]
    postprocess: Callable[[list[T], Any], Sequence[R | Exception]]


RunBatch = (
    Stages[T, R]
    | Callable[[list[T]], Sequence[R | Exception]]
    | Callable[[list[T]], Awaitable[Sequence[R | Exception]]]
)
"""Runs one batch: a list of payloads in, a sequence with one output for each out, in the same order.

An output that is an `Exception` is that item's error. A raised exception fails the batch, which is then split.
"""


class StageSeconds(NamedTuple):
    """How long each stage of a batch ran; what has no stages is all `predict_s`."""

    preprocess_s: float
    predict_s: float
    postprocess_s: float

    @property
    def total_s(self) -> float:
        """All three, without what lay between them."""
        return self.preprocess_s + self.predict_s + self.postprocess_s


class StageShares:
    """What the stages of a batch take of its time: exponential averages, at first those of the first batch."""

    def __init__(self) -> None:
        self.preprocess = 0.0
        """The share of the first stage."""
        self.outside = 0.0
        """The share of the first and the last stage together: what overlapping them with others saves at most."""
        self.outside_s = 0.0
        """The same in seconds."""
        self._smoothing = 1.0

    def add(self, seconds: StageSeconds) -> None:
        """Take a batch into account."""
        if seconds.total_s > 0:
            outside_s = seconds.preprocess_s + seconds.postprocess_s
            self.preprocess += self._smoothing * (seconds.preprocess_s / seconds.total_s - self.preprocess)
            self.outside += self._smoothing * (outside_s / seconds.total_s - self.outside)
            self.outside_s += self._smoothing * (outside_s - self.outside_s)
            self._smoothing = SMOOTHING
