"""A cost model that is fitted to measured batches, and corrected by every batch that runs."""

import math
from collections.abc import Mapping
from enum import StrEnum
from statistics import median
from typing import Any

from modalkit.batching.cost import PaddedCostModel
from modalkit.batching.deviations import Deviations
from modalkit.batching.least_squares import NormalEquations
from modalkit.batching.queue import size_bucket

STATE_VERSION = 2

# Where more tokens may begin to cost more each: caches overflow, or an accelerator is fully used.
KNEES = (64, 512, 4_096, 32_768)
# The same for requests, where no size tells of what they cost.
COUNT_KNEES = (4, 8, 16, 32, 64)
NAMES = (
    *("batch", "request", "token", "token x longest", "token of the other sum", "request x requests"),
    *(f"token beyond {knee}" for knee in KNEES),
    *(f"request beyond {knee}" for knee in COUNT_KNEES),
)
FEATURES = len(NAMES)
# What makes a large batch dearer than its parts is taken for the cause only where nothing simpler explains the times,
# and so is the sum of sizes that the pipeline did not declare.
RELUCTANCE = (1.0, 1.0, 1.0, 100.0, 30.0, 300.0, *(1000.0 for _ in KNEES), *(1000.0 for _ in COUNT_KNEES))

SHORTEST_S = 1e-9
HEAVIEST = 1e6

MEMORY_BATCHES = 250  # an old batch counts 1/e as much as a new one after so many
ANCHOR_WEIGHT = 0.1  # of a calibrated shape once real batches outnumber it: it never fades out entirely
REFIT_EVERY = 32  # batches, once as many have been seen; a fit takes a fifth of a millisecond
CHANGE_AFTER = 4  # batches in a row that are off so far on the same side
OUTLIER_LOG_RATIO = 0.4  # a batch that took over e^0.4 = 1.5 times what was predicted, or less than 1/1.5, counts less
SETTLED_AFTER = 6  # batches: before, a deviation from the fit says more of the fit than of the batch

LEARNING_S = 25e-6  # what learning from a batch takes
LEARNING_SHARE = 0.05  # of the time of batches, at most

ERROR_SMOOTHING = 1 / 8
LARGEST_ERROR = 1.0  # that counts, so that one outlier does not take the trust away for long
ERROR_ALLOWED = 0.45  # of the mean |log(measured / predicted)|; noise of 30 % alone makes 0.25
TRUSTED_FROM = 2  # batches

ASSUMED = PaddedCostModel()  # before anything is measured


class CostFeature(StrEnum):
    """What a pipeline's time follows: the sizes after padding to the longest, or their plain sum."""

    PADDED = "padded"
    TOTAL = "total"


class MeasuredCostModel:
    """Seconds of a batch as a sum of costs that are never negative: fixed, per request, per token, and more.

    With x tokens in the batch (after padding, or without, as `feature` says) the prediction is linear in 1, the number
    of requests n, x, x times the longest request (attention), the sum of tokens that `feature` does not name (it may be
    the true one), n squared, and x and n beyond each of a few knees, where caches overflow or a GPU that was partly
    idle is full: flat at first and then steep, or straight, or bent, as measured. What no such sum can be, steps and
    cliffs, is corrected by factors for each number of requests and of tokens; see `Deviations`.

    The costs minimise the squared *relative* errors, so that a short batch counts as much as a long one. A batch far
    from its prediction counts less (Huber's weights, on the logarithm), unless several in a row are off on the same
    side: then the device has become slower or faster, and all costs with it. Older batches fade exponentially, and
    calibrated shapes keep a small weight for the sizes that no batch has lately had. Until something is observed, the
    predictions are those of `PaddedCostModel`, of which nothing is left afterwards. Sans-I/O, and not thread-safe.
    """

    def __init__(self, feature: CostFeature = CostFeature.PADDED) -> None:
        self.feature = CostFeature(feature)
        self._is_padded = self.feature is CostFeature.PADDED
        self.observed = 0
        """Batches observed, calibrated shapes included."""
        self.largest_count = 0
        """Most requests in a batch that was observed."""
        # All mutable state: the normal equations of what stays and of what fades, the costs that solve their sum, what
        # is known of deviations from these, and how wrong predictions have been.
        self._kept = NormalEquations(FEATURES)
        self._recent = NormalEquations(FEATURES)
        self._newest_weight = 1.0
        self._since_fit = 0
        self._surprises: list[float] = []
        self._error = self._time_to_learn_s = 0.0
        self._deviations = Deviations()
        self._use(self._assumed_costs())

    def predict_s(self, count: int, longest: int, total: int) -> float:
        """Seconds for a batch of `count` requests whose largest has size `longest` and whose sizes sum to `total`."""
        padded = count * longest
        tokens, other = (padded, total) if self._is_padded else (total, padded)
        seconds = (
            self._batch_s
            + count * (self._request_s + self._square_s * count)
            + tokens * (self._token_s + self._attention_s * longest)
            + other * self._other_token_s
        )
        for knee, cost_s in self._beyond_s:
            if tokens > knee:
                seconds += cost_s * (tokens - knee)
        for knee, cost_s in self._beyond_count_s:
            if count > knee:
                seconds += cost_s * (count - knee)
        if self._deviations.factors:
            seconds *= self._deviations.factor(count, _tokens_key(tokens))
        return max(seconds, SHORTEST_S)

    def observe(self, count: int, longest: int, total: int, elapsed_s: float) -> None:
        """Learn that such a batch took `elapsed_s` seconds; what is not a positive time is left out."""
        if not 0 < elapsed_s < math.inf or not self._is_worth_learning(elapsed_s):
            return
        surprise = math.log(elapsed_s / self.predict_s(count, longest, total)) if self.observed else 0.0
        self._error += ERROR_SMOOTHING * (min(abs(surprise), LARGEST_ERROR) - self._error)
        if self.observed >= SETTLED_AFTER:
            tokens = count * longest if self._is_padded else total
            self._deviations.add((count, _tokens_key(tokens)), surprise, self._error)
        self._notice_change(surprise)
        weight = 1.0 if self.observed < REFIT_EVERY else min(1.0, OUTLIER_LOG_RATIO / max(abs(surprise), 1e-9))
        # Instead of the old ones losing weight with every batch, the new ones gain it, which is less to compute.
        self._newest_weight *= 1 + 1 / MEMORY_BATCHES
        self._recent.add(self._features(count, longest, total), elapsed_s, weight * self._newest_weight)
        self.observed += 1
        self.largest_count = max(self.largest_count, count)
        self._since_fit += 1
        if self.observed <= REFIT_EVERY or self._since_fit >= REFIT_EVERY:
            self._fit()

    def _is_worth_learning(self, elapsed_s: float) -> bool:
        """Whether enough time has passed in batches to spend some on learning: of the shortest, one in many teaches."""
        if self.observed < REFIT_EVERY:
            return True
        self._time_to_learn_s = min(self._time_to_learn_s, LEARNING_S) + LEARNING_SHARE * elapsed_s
        if self._time_to_learn_s < LEARNING_S:
            return False
        self._time_to_learn_s -= LEARNING_S
        return True

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
        self.largest_count = max(self.largest_count, count)
        self._fit()

    @property
    def is_trusted(self) -> bool:
        """Whether its predictions have been right of late; not before the second batch."""
        return self.observed >= TRUSTED_FROM and self._error <= ERROR_ALLOWED

    @property
    def costs(self) -> Mapping[str, float]:
        """The fitted costs in seconds, by what each is paid for; those beyond knees only where there are any."""
        return {name: cost for i, (name, cost) in enumerate(zip(NAMES, self._costs, strict=True)) if i < 4 or cost}

    def state(self) -> dict[str, Any]:
        """All that was learnt, as JSON can hold it; see `restore`."""
        if self._since_fit:
            self._fit()
        return {
            "version": STATE_VERSION,
            "feature": self.feature.value,
            "observed": self.observed,
            "largest_count": self.largest_count,
            "kept": self._kept.state(),
            "recent": self._recent.state(),
            "newest_weight": self._newest_weight,
            "error": self._error,
            "deviations": self._deviations.state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Know what the model knew that `state` is of, and nothing else.

        Raises `ValueError`, and changes nothing, for what `state` never returned, or for a model of another feature.
        """
        try:
            if (state["version"], state["feature"]) != (STATE_VERSION, self.feature.value):
                raise ValueError(f"of version {state['version']!r} and feature {state['feature']!r}")
            observed, newest_weight = int(state["observed"]), float(state["newest_weight"])
            largest_count, wrong_by = int(state["largest_count"]), float(state["error"])
            kept = NormalEquations.from_state(state["kept"], FEATURES)
            recent = NormalEquations.from_state(state["recent"], FEATURES)
            deviations = Deviations.from_state(state["deviations"])
        except (KeyError, TypeError, OverflowError) as error:
            raise ValueError(f"not the state of a cost model: {type(error).__name__}: {error}") from error
        if observed < 0 or largest_count < 0:
            raise ValueError(f"counts must not be negative, got {observed!r} and {largest_count!r}")
        if observed and not any(kept.solve_with(recent, 1.0)):
            raise ValueError("not the state of a cost model: a batch would cost nothing")
        if not 0 <= wrong_by <= LARGEST_ERROR:
            raise ValueError(f"error must be from 0 to {LARGEST_ERROR}, got {wrong_by!r}")
        if not 1 <= newest_weight < math.inf:
            raise ValueError(f"newest_weight must be a finite number, 1 or more, got {newest_weight!r}")
        self.observed, self._newest_weight, self._kept, self._recent = observed, newest_weight, kept, recent
        self.largest_count, self._error, self._deviations = largest_count, wrong_by, deviations
        self._surprises, self._time_to_learn_s = [], 0.0
        if observed:
            self._fit()
        else:
            self._use(self._assumed_costs())

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
            self._deviations = Deviations()
            self._fit()

    def _features(self, count: int, longest: int, total: int) -> list[float]:
        padded = count * longest
        tokens, other = (padded, total) if self._is_padded else (total, padded)
        return [
            *(1, count, tokens, tokens * longest, other, count * count),
            *(max(0, tokens - knee) for knee in KNEES),
            *(max(0, count - knee) for knee in COUNT_KNEES),
        ]

    def _fit(self) -> None:
        self._use(self._kept.solve_with(self._recent, 1 / self._newest_weight, RELUCTANCE))
        self._since_fit = 0
        if self._newest_weight > HEAVIEST:
            self._recent.scale(1 / self._newest_weight)
            self._newest_weight = 1.0

    def _assumed_costs(self) -> list[float]:
        """The costs before anything is measured: those of `PaddedCostModel`."""
        costs = dict.fromkeys(NAMES, 0.0)
        costs["batch"] = ASSUMED.fixed_s
        costs["token" if self._is_padded else "token of the other sum"] = ASSUMED.token_s
        return list(costs.values())

    def _use(self, costs: list[float]) -> None:
        """Predict by these costs from now on."""
        self._costs = costs
        self._batch_s, self._request_s, self._token_s, self._attention_s, self._other_token_s, self._square_s = costs[
            :6
        ]
        by_tokens, by_count = costs[6 : 6 + len(KNEES)], costs[6 + len(KNEES) :]
        self._beyond_s = [(knee, cost) for knee, cost in zip(KNEES, by_tokens, strict=True) if cost]
        self._beyond_count_s = [(knee, cost) for knee, cost in zip(COUNT_KNEES, by_count, strict=True) if cost]


def _tokens_key(tokens: int) -> int:
    """Batches of about as many tokens, a quarter of an octave, have the same key, which no number of requests has."""
    return -1 - size_bucket(tokens) // 4
