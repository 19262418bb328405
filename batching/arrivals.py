"""Estimates how soon the next request comes, to tell whether it is worth waiting for."""

import math

SMOOTHING = 1 / 16


class Arrivals:
    """The mean gap between requests, and their mean size: exponential averages over the last few dozen.

    Before the second request nothing is known, and the gap is infinite.
    """

    def __init__(self) -> None:
        self._last_s = -math.inf
        self._gap_s = math.inf
        self._size = 0.0

    def add(self, size: int, now: float) -> None:
        """A request of `size` came."""
        gap_s = now - self._last_s
        if math.isinf(self._gap_s):
            self._gap_s = gap_s
        else:
            self._gap_s += SMOOTHING * (gap_s - self._gap_s)
        self._size = self._size + SMOOTHING * (size - self._size) if self._size else size
        self._last_s = now

    @property
    def mean_size(self) -> int:
        """The mean size of a request; 0 before the first."""
        return round(self._size)

    def gap_s(self, now: float) -> float:
        """Seconds between two requests; when none has come for longer than usual, that is the estimate instead."""
        return max(self._gap_s, now - self._last_s)

    def gap_reaches_at(self, gap_s: float) -> float:
        """When the estimate will be at least `gap_s` if nothing comes until then."""
        return self._last_s + gap_s
