"""Estimates which share of the items is failing, from the batches and parts of batches that failed or succeeded."""

import math
from bisect import bisect_right

SHARES = tuple(math.exp(math.log(0.95 * 4096) * step / 15) / 4096 for step in range(16))
PRIOR_WEIGHT = 0.001  # of the prior, mixed in at each run: about ten successes in a row outweigh any past
MIN_SUCCESS_PROBABILITY = 0.5  # of the largest group that is worth a run: a run then gives the most information


def _mean(weights: tuple[float, ...]) -> float:
    return math.fsum(weight * share for weight, share in zip(weights, SHARES, strict=True))


_PRIOR_SCALE = sum(1 / math.sqrt(share) for share in SHARES)
_PRIOR = tuple(1 / math.sqrt(share) / _PRIOR_SCALE for share in SHARES)
REST_SHARE = _mean(_PRIOR) / 4  # the expected share below which the belief returns to the prior


class FailureRate:
    """A Bayesian estimate of the share of failing items, as if items failed independently of each other.

    The belief is a weight for each of 16 shares from 1/4096 to 0.95. At first, and again once failures are rare, it is
    at rest: then small shares are likely, groups may have any size, and a success costs no computation.

    A *failing group* is a group of items of which at least one is failing. `group_count` is the number of items in the
    failing group that a run took its items from, 0 if they came from none.
    """

    def __init__(self) -> None:
        self.belief = _PRIOR
        """The present belief; set it to an earlier one to forget what was learnt since then."""

    @property
    def is_at_rest(self) -> bool:
        """Whether nothing suggests smaller batches."""
        return self.belief is _PRIOR

    @property
    def share(self) -> float:
        """The expected share of failing items."""
        return _mean(self.belief)

    def record_success(self, count: int, group_count: int = 0) -> None:
        """Learn that `count` items ran without an error."""
        if self.is_at_rest and not group_count:
            return
        self._learn(count, group_count, succeeded=True)
        if self.share <= REST_SHARE:
            self.belief = _PRIOR

    def record_failure(self, count: int, group_count: int = 0) -> None:
        """Learn that a run of `count` items failed."""
        self._learn(count, group_count, succeeded=False)

    def group_size(self, limit: int) -> int:
        """The largest number of items, from 1 to `limit`, that succeeds together with a probability of a half."""

        def minus_success_probability(count: int) -> float:
            weighted = zip(self.belief, SHARES, strict=True)
            return -math.fsum(weight * math.pow(1 - share, count) for weight, share in weighted)

        return max(1, bisect_right(range(1, limit + 1), -MIN_SUCCESS_PROBABILITY, key=minus_success_probability))

    def _learn(self, count: int, group_count: int, *, succeeded: bool) -> None:
        """Multiply each weight by the likelihood of how the run ended."""
        weights = []
        for weight, share in zip(self.belief, SHARES, strict=True):
            success = math.pow(1 - share, count)
            group_success = math.pow(1 - share, group_count) if group_count else 0.0
            likelihood = (success - group_success if succeeded else 1 - success) / (1 - group_success)
            weights.append(weight * likelihood)
        total = sum(weights)
        if total > 0:  # else it is impossible at every share: something other than the items makes runs fail
            self.belief = tuple(
                (1 - PRIOR_WEIGHT) * weight / total + PRIOR_WEIGHT * prior
                for weight, prior in zip(weights, _PRIOR, strict=True)
            )
