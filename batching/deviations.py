"""By how much batches of a kind deviate from a fitted sum of costs: steps and cliffs, which no such sum has."""

import math
from collections.abc import Iterable
from typing import Any, Self

REMEMBERED = 8  # batches of a kind: an older one counts less and less
NOISE_FLOOR = 0.02  # of a logarithm: a smaller deviation changes no decision


class Deviations:
    """Factors by the kind of a batch: the mean logarithm of measured over predicted, where it is more than noise.

    A kind is an integer. A batch is of two kinds, as a rule, of which each explains half of what it deviates by.
    """

    def __init__(self) -> None:
        self.factors: dict[int, float] = {}
        """What a prediction is multiplied by for each kind whose deviation is more than noise."""
        self._means: dict[int, tuple[float, int]] = {}

    def factor(self, *kinds: int) -> float:
        """What to multiply the prediction for a batch of these kinds by."""
        factor = 1.0
        for kind in kinds:
            factor *= self.factors.get(kind, 1.0)
        return factor

    def add(self, kinds: tuple[int, ...], surprise: float, noise: float) -> None:
        """Learn from a batch of these kinds: the logarithm of measured over predicted, and its usual absolute value."""
        for kind in kinds:
            mean, seen = self._means.get(kind, (0.0, 0))
            seen = min(seen + 1, REMEMBERED)
            mean += (surprise / len(kinds) + math.log(self.factors.get(kind, 1.0)) - mean) / seen
            self._means[kind] = mean, seen
            certain = abs(mean) - (NOISE_FLOOR + noise) / math.sqrt(seen)
            if certain > 0 and seen > 1:
                self.factors[kind] = math.exp(math.copysign(certain, mean))
            else:
                self.factors.pop(kind, None)

    def state(self) -> list[list[float]]:
        """All that is known, as JSON can hold it."""
        return [[kind, mean, seen, self.factors.get(kind, 1.0)] for kind, (mean, seen) in self._means.items()]

    @classmethod
    def from_state(cls, state: Iterable[Iterable[Any]]) -> Self:
        """The same again; raises `ValueError` or `TypeError` for what `state` never returned."""
        deviations = cls()
        for kind, mean, seen, factor in state:
            if not (math.isfinite(mean) and 1 <= seen <= REMEMBERED and 0 < factor < math.inf):
                raise ValueError(f"no deviation: {kind!r}, {mean!r}, {seen!r}, {factor!r}")
            deviations._means[int(kind)] = float(mean), int(seen)
            if factor != 1.0:
                deviations.factors[int(kind)] = float(factor)
        return deviations
