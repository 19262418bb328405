"""What the batches that were measured at one size show about larger and smaller ones."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

ENOUGH = 0.98  # of the best throughput: what larger batches add to it is within the noise of measuring
UNSEEN = 0.95  # of what a count between two measured ones might reach


@dataclass(frozen=True, slots=True)
class Bounds:
    """The limits that a batch keeps; a single request may take longer than `longest_s`."""

    max_count: int
    longest_s: float = math.inf
    most_tokens: float = math.inf

    def largest_count(self, size: int) -> int:
        """The most requests of `size` in a batch, whatever it takes."""
        return int(min(self.max_count, max(1, self.most_tokens / size)))


@dataclass(frozen=True, slots=True)
class SizeEvidence:
    """Batches of requests of `size`: `shapes` holds counts, ascending, and the seconds that they took."""

    size: int
    shapes: Sequence[tuple[int, float]]

    def enough(self, longest_s: float) -> int:
        """The smallest measured count that reaches 98 % of the best throughput of batches within `longest_s`."""
        allowed = [(count, seconds) for count, seconds in self.shapes if count == 1 or seconds <= longest_s]
        best = max(count / seconds for count, seconds in allowed)
        return next(count for count, seconds in allowed if count / seconds >= ENOUGH * best)

    def is_enough(self, limit: int, bounds: Bounds) -> bool:
        """Whether what was measured shows that counts above `limit`, within `bounds`, add next to nothing.

        From a measured count to the next one, time is taken to grow at least as it grew up to there. Where it was flat
        and then steep (the tiles of a GPU), a count between the two may be far better than both.
        """
        top = bounds.largest_count(self.size)
        best = max(count / seconds for count, seconds in self.shapes if count <= limit)
        before: tuple[int, float] | None = None
        for (count, seconds), (next_count, _) in zip(self.shapes, [*self.shapes[1:], (math.inf, 0.0)], strict=True):
            if count >= top or (count > 1 and seconds > bounds.longest_s):
                return True
            if next_count > limit:
                growth_s = max(0.0, (seconds - before[1]) / (count - before[0])) if before else 0.0
                most = min(next_count - 1, top)
                if growth_s:
                    most = min(most, count + (bounds.longest_s - seconds) / growth_s)
                if next_count == math.inf or UNSEEN * most / (seconds + growth_s * (most - count)) > best:
                    return False
            before = count, seconds
        return True

    def why_not_lower(self, configured: int) -> str:
        """Why a limit of `configured` stays, in one line, where less is not known to be enough."""
        largest = self.shapes[-1][0]
        if largest < configured:
            return f"as configured: more than {largest} of size {self.size} were not measured, which lowers no limit"
        return f"as configured: between the counts measured at size {self.size}, a better one may lie"

    def best(self, bounds: Bounds) -> float:
        """The most requests a second within `bounds`."""
        return max(count / seconds for count, seconds in self._runnable(bounds))

    def seconds_at(self, items_per_s: float, bounds: Bounds) -> float:
        """How long a batch takes when so many requests come, no more than the best within `bounds`."""
        return next(seconds for count, seconds in self._runnable(bounds) if count / seconds >= items_per_s)

    def _runnable(self, bounds: Bounds) -> list[tuple[int, float]]:
        """Counts and seconds within `bounds`: what was measured, and the largest count, if no later than the next."""
        top = bounds.largest_count(self.size)
        shapes = [shape for shape in self.shapes if shape[0] == 1 or shape[1] <= bounds.longest_s]
        above = [(top, seconds) for count, seconds in shapes if count > top]
        return [shape for shape in shapes if shape[0] <= top] + above[:1]
