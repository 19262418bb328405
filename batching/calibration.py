"""Measures the seconds of a few shapes of batches, in limited time, before the first request comes.

A *shape* is a number of requests and their size.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from statistics import median_low
from time import perf_counter
from typing import Generic, TypeVar

from modalkit.batching.cost import SHORTEST_S
from modalkit.batching.errors import number_text
from modalkit.batching.request import LARGEST_SIZE

T = TypeVar("T")

SMALLEST_SIZE = 8
LARGEST_SAMPLE_SIZE = 2**16
MAX_SIZE_STEP = 16  # times the largest measured size, for the next one: the time may grow faster than the size
EXTREME_SHARE = 0.5  # of the time left, at most, for one of the most informative shapes, which come first
CHEAP_SHARE = 0.25  # of the time left, at most, for one of the others, before those that take longer
SECOND_RUN_SHARE = 0.125  # of the time left, at most, for the second run of a shape
MORE_RUNS_SHARE = 0.02  # of the time left, at most, for all further runs of a shape
TOLERANCE = 0.1  # of `max_s`: predictions are not more precise than that
DISTURBED_FACTOR = 1.5  # a shape that took this many times as long as a larger one was disturbed


@dataclass(frozen=True, slots=True)
class Measurement:
    """One measured shape: `count` requests, the largest of size `longest`, their sizes summing to `total`."""

    count: int
    longest: int
    total: int
    seconds: float
    is_repeated: bool = True
    """Whether it ran more than once; a lone first run may have taken longer, because something was compiled for it."""


def believed_measurements(measurements: Sequence[Measurement]) -> list[Measurement]:
    """The measurements that costs follow from: those that are `credible`, as they are `undisturbed`."""
    return undisturbed(credible(measurements))


def undisturbed(measurements: Sequence[Measurement]) -> list[Measurement]:
    """The measurements in the same order; disturbed ones get the seconds of the fastest shape that is not smaller.

    A batch takes no longer than a batch of at least as many requests of at least this size. If it took more than one
    and a half times as long, it was disturbed: another process used the device, or it was the first run of its kind.
    """

    def corrected(shape: Measurement) -> Measurement:
        longest_s = min(
            other.seconds
            for other in measurements
            if shape.count <= other.count and shape.longest <= other.longest and shape.total <= other.total
        )
        return replace(shape, seconds=longest_s) if shape.seconds > DISTURBED_FACTOR * longest_s else shape

    return [corrected(shape) for shape in measurements]


def credible(measurements: Sequence[Measurement]) -> list[Measurement]:
    """The measurements without those of shapes that ran only once and took longer than the same requests in parts.

    Parts are batches of a smaller measured shape. Such a time, which is probably that of a first run, would keep
    batches small, so that no batch would ever correct it.
    """

    def is_credible(shape: Measurement) -> bool:
        return shape.is_repeated or not any(
            shape.seconds > math.ceil(shape.count / other.count) * other.seconds
            for other in measurements
            if other.count < shape.count and other.longest == shape.longest
        )

    return list(filter(is_credible, measurements))


@dataclass(frozen=True, slots=True)
class SizeFailure:
    """A request of `size` failed though smaller ones ran, so no such size or larger one is measured."""

    size: int
    error: Exception


@dataclass(frozen=True, slots=True)
class _Shape:
    count: int
    asked: int
    """The size that `sample_items` is called with."""
    size: int
    """The size that such an item then has."""

    @property
    def tokens(self) -> int:
        return self.count * self.size

    def is_within(self, other: "_Shape") -> bool:
        return self.count <= other.count and self.size <= other.size


@dataclass(slots=True, kw_only=True)
class Calibration(Generic[T]):
    """How to measure a pipeline.

    `run` runs a batch, `sample_items(n, size)` makes one, and `item_size` gives the size that an item really has.
    Counts grow by the factor `step` up to `max_count`. Sizes are `sizes`, or grow by `step` as long as `sample_items`
    makes larger items. Count times size is at most `max_tokens`. One small request is measured first, then the most
    informative shapes: the largest count of this size, then the largest size alone. The others follow, fewest tokens
    first.

    No shape is started that is expected to end later than `max_s` seconds (and a tenth) after the start. The expected
    time follows from the shapes that ran: in proportion to the tokens, less if a fixed cost was seen, and more if the
    time grew faster than the tokens. A shape runs up to `rounds` times, and the lower median counts; so with two rounds
    the first one is only a warm-up. A shape that takes much of the time left runs once (see `credible`). `clock`
    returns seconds.
    """

    run: Callable[[list[T]], object]
    sample_items: Callable[[int, int], list[T]]
    item_size: Callable[[T], int]
    max_count: int
    max_tokens: int | None = None
    sizes: Sequence[int] | None = None
    max_s: float = 3.0
    step: int = 4
    rounds: int = 2
    is_too_large: Callable[[Exception], bool] = lambda error: isinstance(error, MemoryError)
    clock: Callable[[], float] = perf_counter

    measurements: list[Measurement] = field(default_factory=list, init=False)
    """What was measured so far, in this order."""
    is_complete: bool = field(default=False, init=False)
    """Whether no shape was left out for lack of time; set when `measure` has ended."""
    too_large_tokens: int | None = field(default=None, init=False)
    """Tokens of the smallest batch that did not fit into memory; larger ones are left out."""
    failure: SizeFailure | None = field(default=None, init=False)
    """The smallest size at which a lone request failed; it and larger sizes are left out."""
    _known: "_KnownShapes" = field(init=False, repr=False)
    _deadline_s: float = field(default=0.0, init=False, repr=False)
    _first_run_extras_s: list[float] = field(default_factory=list, init=False, repr=False)

    def measure(self) -> Iterator[Measurement]:
        """Run the shapes and yield each measurement; none if the pipeline makes no sample items.

        Raises what `run`, `sample_items` and `item_size` raise for the smallest request, or for several requests of a
        size of which one ran (except out of memory). Raises `ValueError` for a wrong number of sample items, or a size
        out of range.
        """
        self._deadline_s = self.clock() + (1 + TOLERANCE) * self.max_s
        self._known = _KnownShapes()
        shapes = self._shapes()
        while shapes:
            shape = self._next(shapes)
            if shape is None:
                return
            shapes = [other for other in shapes if other != shape]
            try:
                items = self._samples(shape)
                sizes = [self._size(item) for item in items]
                runs_s = self._runs_s(items)
            except Exception as error:
                if not self._known:
                    raise
                shapes = self._without(shape, error, shapes)
                continue
            seconds = median_low(runs_s)
            self._known.add(shape, seconds)
            self.measurements.append(Measurement(shape.count, max(sizes), sum(sizes), seconds, len(runs_s) > 1))
            yield self.measurements[-1]
        self.is_complete = True

    # Which shape is next.

    def _next(self, shapes: Sequence[_Shape]) -> _Shape | None:
        """The most informative shape that leaves time for others, else any that should end in time, else None."""
        left_s = self._deadline_s - self.clock()
        if left_s < 0:
            return None
        if not self._known:
            return shapes[0]
        known_size = self._known.largest_size
        next_size = min((shape.size for shape in shapes if shape.size > known_size), default=known_size)
        largest_size = max(MAX_SIZE_STEP * known_size, next_size)
        reachable = [shape for shape in shapes if shape.size <= largest_size]
        extremes = self._extremes(reachable)
        if self._known.largest_count == 1 < self.max_count:
            first = self._known.smallest
            # If no larger count fits, two requests show whether most of the time is a fixed cost.
            reachable.append(_Shape(2, first.asked, first.size))
        extra_s = self._first_run_extra_s()
        for candidates, share in ((extremes, EXTREME_SHARE), (reachable, CHEAP_SHARE), ([*extremes, *reachable], 1.0)):
            for shape in candidates:
                if self._is_allowed(shape) and extra_s + self._known.expected_s(shape) <= share * left_s:
                    return shape
        return None

    def _extremes(self, shapes: Sequence[_Shape]) -> list[_Shape]:
        """Counts of the smallest size above those measured, then larger sizes alone; of both, the largest first."""
        smallest = self._known.smallest.size
        counts = [shape for shape in shapes if shape.size == smallest and shape.count > self._known.largest_count]
        sizes = [shape for shape in shapes if shape.count == 1 and shape.size > self._known.largest_size]
        return [*reversed(counts), *reversed(sizes)]

    def _is_allowed(self, shape: _Shape) -> bool:
        return self.max_tokens is None or shape.tokens <= self.max_tokens

    def _without(self, failed: _Shape, error: Exception, shapes: list[_Shape]) -> list[_Shape]:
        """The shapes that are left after `failed` has failed; raises `error` if its size is not the cause."""
        if failed.count > 1 and self.is_too_large(error):
            self.too_large_tokens = failed.tokens
            return [shape for shape in shapes if shape.tokens < failed.tokens]
        if failed.count > 1 and failed.size <= self._known.largest_size:
            raise error
        self.failure = SizeFailure(failed.size, error)
        return [shape for shape in shapes if shape.size < failed.size]

    # Which shapes there are.

    def _shapes(self) -> list[_Shape]:
        """All shapes, fewest tokens first."""
        counts = [*_powers(1, self.step, self.max_count - 1), self.max_count]
        shapes = [_Shape(count, asked, size) for asked, size in self._sizes() for count in counts]
        return sorted(filter(self._is_allowed, shapes), key=lambda shape: shape.tokens)

    def _sizes(self) -> list[tuple[int, int]]:
        """Sizes for `sample_items`, each with the size of the item that it makes, as long as items become larger."""
        sizes: list[tuple[int, int]] = []
        for asked in self.sizes or _powers(SMALLEST_SIZE, self.step, LARGEST_SAMPLE_SIZE):
            try:
                items = self.sample_items(1, asked)
                size = self._size(items[0]) if items else 0
            except Exception as error:
                if not sizes:
                    raise
                self.failure = SizeFailure(asked, error)
                break
            if size <= (sizes[-1][1] if sizes else 0):
                break
            sizes.append((asked, size))
            if self.max_tokens is not None and size > self.max_tokens:
                break
        return sizes

    def _size(self, item: T) -> int:
        size = math.ceil(self.item_size(item))
        if not 1 <= size <= LARGEST_SIZE:
            raise ValueError(f"item_size returned {number_text(size)}, which must be from 1 to {LARGEST_SIZE}")
        return size

    def _samples(self, shape: _Shape) -> list[T]:
        items = self.sample_items(shape.count, shape.asked)
        if len(items) != shape.count:
            raise ValueError(f"sample_items({shape.count}, {shape.asked}) returned {len(items)} items")
        return items

    # How long it takes.

    def _runs_s(self, items: list[T]) -> list[float]:
        runs_s = [self._timed(items)]
        while len(runs_s) < self.rounds:
            is_second = len(runs_s) == 1
            again_s = runs_s[0] - self._first_run_extra_s() if is_second else sum(runs_s[1:]) + min(runs_s)
            share = SECOND_RUN_SHARE if is_second else MORE_RUNS_SHARE
            if again_s > share * (self._deadline_s - self.clock()):
                break
            runs_s.append(self._timed(items))
            if is_second:
                self._first_run_extras_s.append(max(0.0, runs_s[0] - runs_s[1]))
        return runs_s

    def _first_run_extra_s(self) -> float:
        """Seconds that a first run takes more than a second one: many if something is compiled for each shape."""
        return min(self._first_run_extras_s, default=0.0)

    def _timed(self, items: list[T]) -> float:
        given = list(items)  # `run` may change its list
        started_s = self.clock()
        self.run(given)
        return self.clock() - started_s


class _KnownShapes:
    """The seconds of measured shapes, and the expected seconds of others, rather too many than too few."""

    def __init__(self) -> None:
        self._seconds: dict[_Shape, float] = {}
        self.largest_count = 0
        """Of the smallest size."""
        self.largest_size = 0
        """Of a lone request."""
        # The fastest growth of the time with the tokens, between two shapes of which one has at least the count and the
        # size of the other: in seconds per token, and as an exponent.
        self._slope_s: float | None = None
        self._exponent = 1.0

    def __bool__(self) -> bool:
        return bool(self._seconds)

    @property
    def smallest(self) -> _Shape:
        return next(iter(self._seconds))

    def add(self, shape: _Shape, seconds: float) -> None:
        """Record that `shape` took `seconds`."""
        seconds = max(seconds, SHORTEST_S)
        for known, known_s in self._seconds.items():
            if known.is_within(shape):
                self._note_growth(known, known_s, shape, seconds)
            elif shape.is_within(known):
                self._note_growth(shape, seconds, known, known_s)
        self._seconds[shape] = seconds
        if shape.size == self.smallest.size:
            self.largest_count = max(self.largest_count, shape.count)
        if shape.count == 1:
            self.largest_size = max(self.largest_size, shape.size)

    def expected_s(self, shape: _Shape) -> float:
        """Seconds that `shape` is expected to take."""
        smaller = [(known, seconds) for known, seconds in self._seconds.items() if known.is_within(shape)]
        bounds_s: list[float] = [
            seconds * (shape.tokens / known.tokens) ** self._exponent for known, seconds in smaller
        ]
        if self._exponent == 1 and self._slope_s is not None:
            bounds_s += [seconds + self._slope_s * (shape.tokens - known.tokens) for known, seconds in smaller]
        return min(bounds_s + [seconds for known, seconds in self._seconds.items() if shape.is_within(known)])

    def _note_growth(self, small: _Shape, small_s: float, large: _Shape, large_s: float) -> None:
        if large.tokens >= 2 * small.tokens:  # between closer shapes it would be mostly noise
            self._slope_s = max(self._slope_s or 0.0, (large_s - small_s) / (large.tokens - small.tokens))
            exponent = math.log(large_s / small_s) / math.log(large.tokens / small.tokens)
            self._exponent = min(2.0, max(self._exponent, exponent))


def _powers(first: int, step: int, last: int) -> Iterator[int]:
    while first <= last:
        yield first
        first *= step
