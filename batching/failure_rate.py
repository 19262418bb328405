"""Estimates which share of the items makes a batch fail, from which batches and parts of batches did."""

import math
from collections.abc import Callable

SHARES = tuple(math.exp(math.log(0.95 * 4096) * step / 15) / 4096 for step in range(16))
FORGETTING = 0.001  # the weight of the prior that each run mixes in: some ten successes in a row outweigh any past
ENOUGH = 0.5  # the probability to succeed of the largest group that is worth a run: then a run tells the most


def _normalized(weights: list[float]) -> tuple[float, ...]:
    total = sum(weights)
    return tuple(weight / total for weight in weights)


def _mean(weights: tuple[float, ...]) -> float:
    return math.fsum(weight * share for weight, share in zip(weights, SHARES, strict=True))


_PRIOR = _normalized([1 / math.sqrt(share) for share in SHARES])
REST_AT = _mean(_PRIOR) / 4  # the expected share below which the belief returns to the prior


class FailureRate:
    """A Bayesian estimate of the share of guilty items, as if each were guilty independently of the others.

    The belief is a weight for each of 16 shares from 1/4096 to 0.95. At first, and again once failures are rare, it is
    at rest: small shares are likely, groups may be of any size, and a success costs no computation.
    """

    def __init__(self) -> None:
        self._weights = _PRIOR

    @property
    def is_at_rest(self) -> bool:
        """Whether nothing speaks against full batches."""
        return self._weights is _PRIOR

    @property
    def share(self) -> float:
        """The expected share of guilty items."""
        return _mean(self._weights)

    @property
    def belief(self) -> tuple[float, ...]:
        """What is known now; give it to `restore` to forget what came later."""
        return self._weights

    def restore(self, belief: tuple[float, ...]) -> None:
        """Go back to an earlier `belief`."""
        self._weights = belief

    def passed(self, count: int, suspects: int = 0) -> None:
        """Learn that `count` items ran without an error; of so many `suspects`, one at least of which was guilty."""
        if self._weights is _PRIOR and not suspects:
            return
        if suspects:
            self._learn(lambda q: (math.pow(q, count) - math.pow(q, suspects)) / (1 - math.pow(q, suspects)))
        else:
            self._learn(lambda q: math.pow(q, count))
        if self.share <= REST_AT:
            self._weights = _PRIOR

    def failed(self, count: int, suspects: int = 0) -> None:
        """Learn that a run of `count` items failed; of so many `suspects`, one at least of which was guilty."""
        if suspects:
            self._learn(lambda q: (1 - math.pow(q, count)) / (1 - math.pow(q, suspects)))
        else:
            self._learn(lambda q: 1 - math.pow(q, count))

    def group_size(self, most: int) -> int:
        """The largest number of items, up to `most`, that are as likely as not to run without an error; at least 1."""
        low, high = 1, most
        while low < high:
            middle = (low + high + 1) // 2
            if self._success_probability(middle) >= ENOUGH:
                low = middle
            else:
                high = middle - 1
        return low

    def _success_probability(self, count: int) -> float:
        return math.fsum(
            weight * math.pow(1 - share, count) for weight, share in zip(self._weights, SHARES, strict=True)
        )

    def _learn(self, likelihood: Callable[[float], float]) -> None:
        """Weigh each share by how likely it made what happened, and forget a little."""
        weights = [weight * likelihood(1 - share) for weight, share in zip(self._weights, SHARES, strict=True)]
        total = sum(weights)
        if total > 0:  # else it was impossible at any share: something other than the items decides what fails
            self._weights = tuple(
                (1 - FORGETTING) * weight / total + FORGETTING * prior
                for weight, prior in zip(weights, _PRIOR, strict=True)
            )
