"""What the measured batches of one size show about larger and smaller batches."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

ENOUGH = 0.98  # of the best throughput; the rest is within the noise of measuring
UNSEEN = 0.95  # of the throughput that a count between two measured ones may reach


@dataclass(frozen=True, slots=True)
class Bounds:
    """The limits of a batch; a single request may exceed `max_s`."""

    max_count: int
    max_s: float = math.inf
    max_tokens: float = math.inf

    def largest_count(self, size: int) -> int:
        """The maximum requests of `size` in a batch, without regard to `max_s`."""
        return int(min(self.max_count, max(1, self.max_tokens / size)))


@dataclass(frozen=True, slots=True)
class SizeEvidence:
    """Measured batches of requests of `size`: `shapes` holds counts, ascending, with the seconds of each batch."""

    size: int
    shapes: Sequence[tuple[int, float]]

    def enough(self, max_s: float) -> int:
        """The smallest measured count that reaches 98 % of the best throughput of batches within `max_s`."""
        allowed = [(count, seconds) for count, seconds in self.shapes if count == 1 or seconds <= max_s]
        best = max(count / seconds for count, seconds in allowed)
        return next(count for count, seconds in allowed if count / seconds >= ENOUGH * best)

    def is_enough(self, limit: int, bounds: Bounds) -> bool:
        """Whether the measurements show that counts above `limit`, within `bounds`, add nearly no throughput.

        After a measured count, the time is assumed to grow at least as fast as before it. If it was constant and then
        rose (as with the tiles of a GPU), a count between the two may be much better than both.
        """
        top = bounds.largest_count(self.size)
        best = max(count / seconds for count, seconds in self.shapes if count <= limit)
        before: tuple[int, float] | None = None
        for (count, seconds), (next_count, _) in zip(self.shapes, [*self.shapes[1:], (math.inf, 0.0)], strict=True):
            if count >= top or (count > 1 and seconds > bounds.max_s):
                return True
            if next_count > limit:
                growth_s = max(0.0, (seconds - before[1]) / (count - before[0])) if before else 0.0
                largest = min(next_count - 1, top)
                if growth_s:
                    largest = min(largest, count + (bounds.max_s - seconds) / growth_s)
                if next_count == math.inf or UNSEEN * largest / (seconds + growth_s * (largest - count)) > best:
                    return False
            before = count, seconds
        return True

    def why_not_lower(self, configured: int) -> str:
        """One line: why the limit stays at `configured`, because less is not known to be enough."""
        largest = self.shapes[-1][0]
        if largest < configured:
            return f"as configured: more than {largest} of size {self.size} were not measured, which lowers no limit"
        return f"as configured: between the counts measured at size {self.size}, a better one may lie"

    def best(self, bounds: Bounds) -> float:
        """The highest requests per second within `bounds`."""
        return max(count / seconds for count, seconds in self._runnable(bounds))

    def seconds_at(self, items_per_s: float, bounds: Bounds) -> float:
        """The seconds of a batch when `items_per_s` requests arrive, which is at most the best within `bounds`."""
        return next(seconds for count, seconds in self._runnable(bounds) if count / seconds >= items_per_s)

    def _runnable(self, bounds: Bounds) -> list[tuple[int, float]]:
        """Counts and seconds within `bounds`: measured ones, and the largest count with the seconds of the next one."""
        top = bounds.largest_count(self.size)
        shapes = [shape for shape in self.shapes if shape[0] == 1 or shape[1] <= bounds.max_s]
        above = [(top, seconds) for count, seconds in shapes if count > top]
        return [shape for shape in shapes if shape[0] <= top] + above[:1]
