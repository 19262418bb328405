"""A cost model that is fitted to measured batches, and corrected by every batch that runs."""

import math
from collections.abc import Mapping
from enum import StrEnum
from statistics import median
from typing import Any

from batching.cost import PaddedCostModel
from batching.least_squares import NormalEquations

STATE_VERSION = 1

# Where more tokens may begin to cost more each: caches overflow, or an accelerator is fully used.
KNEES = (64, 512, 4_096, 32_768)
FEATURES = 4 + len(KNEES)

SHORTEST_S = 1e-9
HEAVIEST = 1e6

MEMORY_BATCHES = 250  # an old batch counts 1/e as much as a new one after so many
SEED_WEIGHT = 0.02  # of what is assumed before anything is measured, beside 1 for a measured batch
ANCHOR_WEIGHT = 0.1  # of a calibrated shape once real batches outnumber it: it never fades out entirely
REFIT_EVERY = 32  # batches, once as many have been seen; a fit takes a fifth of a millisecond
CHANGE_AFTER = 8  # batches in a row that are off so far on the same side
OUTLIER_LOG_RATIO = 0.4  # a batch that took over e^0.4 = 1.5 times what was predicted, or less than 1/1.5, counts less


class CostFeature(StrEnum):
    """What a pipeline's time follows: the sizes after padding to the longest, or their plain sum."""

    PADDED = "padded"
    TOTAL = "total"


class MeasuredCostModel:
    """Seconds of a batch as a sum of costs that are never negative: fixed, per request, per token, and more.

    With x tokens in the batch (after padding, or without, as `feature` says) the prediction is linear in 1, the number
    of requests, x, x times the longest request (attention), and x beyond each of a few knees, where caches overflow or
    a GPU that was partly idle is full: flat at first and then steep, or straight, or bent, as measured.

    The costs minimise the squared *relative* errors, so that a short batch counts as much as a long one. A batch far
    from its prediction counts less (Huber's weights, on the logarithm), unless several in a row are off on the same
    side: then the device has become slower or faster, and all costs with it. Older batches fade exponentially, and
    calibrated shapes keep a small weight for the sizes that no batch has lately had. Until something is observed, the
    predictions are those of `PaddedCostModel`. Sans-I/O, and not thread-safe.
    """

    def __init__(self, feature: CostFeature = CostFeature.PADDED) -> None:
        self.feature = CostFeature(feature)
        self._is_padded = self.feature is CostFeature.PADDED
        self.observed = 0
        """Batches observed, calibrated shapes included."""
        # All mutable state: the normal equations of what stays and of what fades, and the costs that solve their sum.
        self._kept = NormalEquations(FEATURES)
        self._recent = NormalEquations(FEATURES)
        self._newest_weight = 1.0
        self._since_fit = 0
        self._surprises: list[float] = []
        seed = PaddedCostModel()
        for count, size in ((1, 8), (1, 128), (8, 8), (8, 128), (32, 64)):
            self._kept.add(self._features(count, size, count * size), seed.predict_s(count, size, 0), SEED_WEIGHT)
        self._fit()

    def predict_s(self, count: int, longest: int, total: int) -> float:
        """Seconds for a batch of `count` requests whose largest has size `longest` and whose sizes sum to `total`."""
        tokens = count * longest if self._is_padded else total
        seconds = self._batch_s + self._request_s * count + tokens * (self._token_s + self._attention_s * longest)
        for knee, cost_s in self._beyond_s:
            if tokens > knee:
                seconds += cost_s * (tokens - knee)
        return max(seconds, SHORTEST_S)

    def observe(self, count: int, longest: int, total: int, elapsed_s: float) -> None:
        """Learn that such a batch took `elapsed_s` seconds; what is not a positive time is left out."""
        if not 0 < elapsed_s < math.inf:
            return
        surprise = math.log(elapsed_s / self.predict_s(count, longest, total))
        self._notice_change(surprise)
        weight = 1.0 if self.observed < REFIT_EVERY else min(1.0, OUTLIER_LOG_RATIO / max(abs(surprise), 1e-9))
        # Instead of the old ones losing weight with every batch, the new ones gain it, which is less to compute.
        self._newest_weight *= 1 + 1 / MEMORY_BATCHES
        self._recent.add(self._features(count, longest, total), elapsed_s, weight * self._newest_weight)
        self.observed += 1
        self._since_fit += 1
        if self.observed <= REFIT_EVERY or self._since_fit >= REFIT_EVERY:
            self._fit()

    def calibrate(self, count: int, longest: int, total: int, elapsed_s: float) -> None:
        """Learn from a shape that was run for measurement, which has no outliers and does not fade.

        Raises `ValueError` for what is not a positive time.
        """
        if not 0 < elapsed_s < math.inf:
            raise ValueError(f"elapsed_s must be a positive time, got {elapsed_s!r}")
        features = self._features(count, longest, total)
        self._kept.add(features, elapsed_s, ANCHOR_WEIGHT)
        self._recent.add(features, elapsed_s, (1 - ANCHOR_WEIGHT) * self._newest_weight)
        self.observed += 1
        self._fit()

    @property
    def costs(self) -> Mapping[str, float]:
        """The fitted costs in seconds, by what each is paid for; those beyond knees are named after them."""
        return {
            "batch": self._batch_s,
            "request": self._request_s,
            "token": self._token_s,
            "token x longest": self._attention_s,
            **{f"token beyond {knee}": cost_s for knee, cost_s in self._beyond_s},
        }

    def state(self) -> dict[str, Any]:
        """All that was learnt, as JSON can hold it; see `restore`."""
        self._fit()
        return {
            "version": STATE_VERSION,
            "feature": self.feature.value,
            "observed": self.observed,
            "kept": self._kept.state(),
            "recent": self._recent.state(),
            "newest_weight": self._newest_weight,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Know what the model knew that `state` is of, and nothing else.

        Raises `ValueError`, and changes nothing, for what `state` never returned, or for a model of another feature.
        """
        try:
            if (state["version"], state["feature"]) != (STATE_VERSION, self.feature.value):
                raise ValueError(f"of version {state['version']!r} and feature {state['feature']!r}")
            observed, newest_weight = int(state["observed"]), float(state["newest_weight"])
            kept = NormalEquations.from_state(state["kept"], FEATURES)
            recent = NormalEquations.from_state(state["recent"], FEATURES)
        except (KeyError, TypeError, OverflowError) as error:
            raise ValueError(f"not the state of a cost model: {type(error).__name__}: {error}") from error
        if not any(kept.solve_with(recent, 1.0)):
            raise ValueError("not the state of a cost model: a batch would cost nothing")
        if not 1 <= newest_weight < math.inf:
            raise ValueError(f"newest_weight must be a finite number, 1 or more, got {newest_weight!r}")
        self.observed, self._newest_weight, self._kept, self._recent = observed, newest_weight, kept, recent
        self._fit()

    def _notice_change(self, surprise: float) -> None:
        """Where several batches in a row are far off on the same side, they are no outliers: the device has changed."""
        if abs(surprise) < OUTLIER_LOG_RATIO or (self._surprises and self._surprises[-1] * surprise < 0):
            self._surprises.clear()
        if abs(surprise) < OUTLIER_LOG_RATIO:
            return
        self._surprises.append(surprise)
        if len(self._surprises) == CHANGE_AFTER:
            factor = math.exp(median(self._surprises))
            self._kept.slow_down(factor)
            self._recent.slow_down(factor)
            self._surprises.clear()
            self._fit()

    def _features(self, count: int, longest: int, total: int) -> list[float]:
        tokens = count * longest if self._is_padded else total
        return [1, count, tokens, tokens * longest, *(max(0, tokens - knee) for knee in KNEES)]

    def _fit(self) -> None:
        costs = self._kept.solve_with(self._recent, 1 / self._newest_weight)
        self._batch_s, self._request_s, self._token_s, self._attention_s = costs[:4]
        self._beyond_s = [(knee, cost) for knee, cost in zip(KNEES, costs[4:], strict=True) if cost]
        self._since_fit = 0
        if self._newest_weight > HEAVIEST:
            self._recent.scale(1 / self._newest_weight)
            self._newest_weight = 1.0
