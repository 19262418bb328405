"""Measures what batches of a few shapes cost, in bounded time, to know before the first request comes."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median_low
from time import perf_counter
from typing import Generic, TypeVar

from batching.request import LARGEST_SIZE

T = TypeVar("T")

SMALLEST_SIZE = 8
LARGEST_ASKED_FOR = 2**16


@dataclass(frozen=True, slots=True)
class Measurement:
    """One measured shape: `count` requests, the largest of size `longest`, their sizes summing to `total`."""

    count: int
    longest: int
    total: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration(Generic[T]):
    """How to measure a pipeline.

    `run` runs a batch and `sample_items(n, size)` makes up one; `item_size` says how large an item really became.
    Shapes keep `max_count` and `max_tokens` (count times largest size); neighbouring ones differ by the factor `step`.
    Each is run `rounds` times, and the lower median counts, so that with two rounds the first is but a warm-up. No
    shape is begun that is expected to end more than `max_s` seconds after the start. `clock` returns seconds.
    """

    run: Callable[[list[T]], object]
    sample_items: Callable[[int, int], list[T]]
    item_size: Callable[[T], int]
    max_count: int
    max_tokens: int | None = None
    max_s: float = 3.0
    step: int = 4
    rounds: int = 2
    clock: Callable[[], float] = perf_counter

    def measure(self) -> Iterator[Measurement]:
        """Run the shapes, small ones first; nothing where the pipeline cannot make up items.

        Raises whatever `run`, `sample_items` and `item_size` raise, and `ValueError` for another number of items than
        were asked for, or a size out of range.
        """
        deadline_s = self.clock() + self.max_s
        expected_s_per_token, fastest_s = 0.0, 0.0
        for count, size, tokens in self._shapes():
            expected_s = max(fastest_s, expected_s_per_token * tokens)
            if self.clock() + self.rounds * expected_s > deadline_s:
                return
            items = self._samples(count, size)
            sizes = [self._size(item) for item in items]
            seconds = median_low(self._timed(items) for _ in range(self.rounds))
            expected_s_per_token, fastest_s = seconds / tokens, min(fastest_s or seconds, seconds)
            yield Measurement(count, max(sizes), sum(sizes), seconds)

    def _shapes(self) -> list[tuple[int, int, int]]:
        """Counts, asked-for sizes and tokens, fewest tokens first."""
        sizes = self._sizes()
        counts = [*_powers(1, self.step, self.max_count - 1), self.max_count]
        shapes = [(count, size, count * actual) for count in counts for size, actual in sizes]
        limit = float("inf") if self.max_tokens is None else self.max_tokens
        return sorted((shape for shape in shapes if shape[2] <= limit), key=lambda shape: shape[2])

    def _sizes(self) -> list[tuple[int, int]]:
        """Sizes to ask for, each with what comes of it, up to where asking for more does not make items larger."""
        sizes: list[tuple[int, int]] = []
        for size in _powers(SMALLEST_SIZE, self.step, LARGEST_ASKED_FOR):
            items = self.sample_items(1, size)
            if not items:
                break
            actual = self._size(items[0])
            if sizes and actual <= sizes[-1][1]:
                break
            sizes.append((size, actual))
            if self.max_tokens is not None and actual > self.max_tokens:
                break
        return sizes

    def _size(self, item: T) -> int:
        size = math.ceil(self.item_size(item))
        if not 1 <= size <= LARGEST_SIZE:
            told = size if size.bit_length() <= 64 else f"a number of {size.bit_length()} bits"
            raise ValueError(f"item_size returned {told}, which must be from 1 to {LARGEST_SIZE}")
        return size

    def _samples(self, count: int, size: int) -> list[T]:
        items = self.sample_items(count, size)
        if len(items) != count:
            raise ValueError(f"sample_items({count}, {size}) returned {len(items)} items")
        return items

    def _timed(self, items: list[T]) -> float:
        started_s = self.clock()
        self.run(items)
        return self.clock() - started_s


def _powers(first: int, step: int, last: int) -> Iterator[int]:
    while first <= last:
        yield first
        first *= step
