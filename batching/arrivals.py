"""Estimates how soon the next request comes, to tell whether it is worth waiting for."""

import math

SMOOTHING = 1 / 16


class Arrivals:
    """The mean gap between requests, and their mean size: exponential averages over the last few dozen.

    Before the second request nothing is known, and the gap is infinite.
    """

    def __init__(self) -> None:
        self.last_s = -math.inf
        """When the last request came."""
        self.gap_s = math.inf
        """The mean time between two requests."""
        self._size = 0.0

    def add(self, size: int, now: float) -> None:
        """A request of `size` came."""
        gap_s = now - self.last_s
        if math.isinf(self.gap_s):
            self.gap_s = gap_s
        else:
            self.gap_s += SMOOTHING * (gap_s - self.gap_s)
        self._size = self._size + SMOOTHING * (size - self._size) if self._size else size
        self.last_s = now

    @property
    def mean_size(self) -> int:
        """The mean size of a request; 0 before the first."""
        return round(self._size)
