"""A cost model that is fitted to measured batches and corrected by every batch that runs."""

import math
from collections.abc import Iterable, Mapping
from enum import StrEnum
from statistics import median
from typing import Any, Self

from modalkit.batching.cost import SHORTEST_S, PaddedCostModel
from modalkit.batching.least_squares import NormalEquations
from modalkit.batching.queue import size_bucket

STATE_VERSION = 2

# Numbers of tokens beyond which each token may cost more: caches overflow, or an accelerator is fully used.
KNEES = (64, 512, 4_096, 32_768)
# The same for numbers of requests, for pipelines whose sizes do not reflect the costs.
COUNT_KNEES = (4, 8, 16, 32, 64)
NAMES = (
    *("batch", "request", "token", "token x longest", "token of the other sum", "request x requests"),
    *(f"token beyond {knee}" for knee in KNEES),
    *(f"request beyond {knee}" for knee in COUNT_KNEES),
)
FEATURES = len(NAMES)
# Causes that make a large batch more expensive than its parts get a cost only if no simpler cause explains the times.
# The same is true of the sum of sizes that the pipeline did not declare.
RELUCTANCE = (1.0, 1.0, 1.0, 100.0, 30.0, 300.0, *(1000.0 for _ in KNEES), *(1000.0 for _ in COUNT_KNEES))

MAX_WEIGHT = 1e6

MEMORY_BATCHES = 250  # after so many batches, an old one has 1/e of the weight of a new one
KEPT_WEIGHT = 0.1  # of a calibrated shape, which does not fade: a part of each is kept for good
REFIT_EVERY = 32  # batches, once so many have run; before, after each. A fit takes 0.2 ms
CHANGE_AFTER = 4  # outliers in a row on the same side of the prediction
OUTLIER_LOG_RATIO = 0.4  # an outlier took more than e^0.4 = 1.5 times the prediction, or less than 1/1.5
FIRST_RUN_LOG_RATIO = 1.8  # the first batch of its count is ignored if it took e^1.8 = 6 times the prediction
SETTLED_AFTER = 6  # batches; before, a deviation is caused by the fit rather than by the kind of batch
SLOW_STARTS = 3  # batches of all, the first ones, that may be slow for that reason

LEARNING_S = 25e-6  # seconds that it takes to learn from a batch
LEARNING_SHARE = 0.05  # of the time of batches that learning may take

ERROR_SMOOTHING = 1 / 8
MAX_ERROR = 1.0  # a larger error counts as this, so that one outlier does not end the trust for long
MAX_TRUSTED_ERROR = 0.45  # of the mean |log(measured / predicted)|; noise of 30 % alone causes 0.25
TRUSTED_FROM = 2  # batches

ASSUMED = PaddedCostModel()  # before anything is measured


class CostFeature(StrEnum):
    """What the time of a batch grows with: the sizes after padding to the longest, or their plain sum."""

    PADDED = "padded"
    TOTAL = "total"


class MeasuredCostModel:
    """Seconds of a batch as a sum of costs that are never negative: fixed, per request, per token, and others.

    Let n be the number of requests and x the number of tokens, padded or not as `feature` says. The prediction is
    linear in 1, n, x, x times the longest request (attention), the number of tokens that `feature` does not name (which
    may be the real cause), n squared, and the part of x and of n beyond each of a few knees. At a knee caches overflow,
    or a GPU that was partly idle is full. Such a sum cannot be a step function; factors for each number of requests and
    of tokens correct it (`Deviations`).

    The costs minimise the squared *relative* errors, so a short batch counts as much as a long one. An outlier counts
    less (Huber's weights, on the logarithm), and a fast one less still. The first batch of a number of requests, in
    each process and after `expect_first_runs`, does not count if it took six times the prediction: something may have
    been compiled for it. Several outliers in a row on the same side mean that the device has become slower or faster,
    and scale all costs; those of a number of requests that never took the predicted time do not count there, because
    only the costs of that number may be wrong. Older batches fade exponentially. Calibrated shapes keep a small weight,
    for sizes that no recent batch had. Before the first observation the predictions are those of `PaddedCostModel`,
    which have no influence later. The model does no I/O and is not thread-safe.
    """

    def __init__(self, feature: CostFeature = CostFeature.PADDED) -> None:
        self.feature = CostFeature(feature)
        self._is_padded = self.feature is CostFeature.PADDED
        self.observed = 0
        """Batches that were observed, calibrated shapes included."""
        self.largest_count = 0
        """The largest number of requests in a batch that was observed."""
        self._first_count = self._first_runs = 0  # requests of the first batch of all, and batches of at least as many
        # All mutable state: the normal equations of observations that are kept and of those that fade, the costs that
        # solve their sum, the deviations from these, and the mean error of recent predictions.
        self._kept = NormalEquations(FEATURES)
        self._recent = NormalEquations(FEATURES)
        self._newest_weight = 1.0
        self._since_fit = 0
        self._outliers: list[float] = []  # the deviations of the last batches, outliers on the same side
        self._counts: set[int] = set()  # numbers of requests that have run
        self._predictable: set[int] = set()  # those of batches that took about as long as predicted
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
        if factors := self._deviations.factors:
            seconds *= factors.get(count, 1.0) * factors.get(_tokens_key(tokens), 1.0)
        return max(seconds, SHORTEST_S)

    def observe(self, count: int, longest: int, total: int, elapsed_s: float) -> None:
        """Learn that such a batch took `elapsed_s` seconds; a time that is not positive is ignored."""
        if not 0 < elapsed_s < math.inf or not self._is_worth_learning(elapsed_s):
            return
        if not self.observed:
            self._first_count = count
        self._first_runs += count >= self._first_count
        deviation = math.log(elapsed_s / self.predict_s(count, longest, total)) if self.observed else 0.0
        is_first = count not in self._counts
        self._counts.add(count)
        if is_first and deviation >= FIRST_RUN_LOG_RATIO:
            return
        self._error += ERROR_SMOOTHING * (min(abs(deviation), MAX_ERROR) - self._error)
        if self.observed >= SETTLED_AFTER:
            tokens = count * longest if self._is_padded else total
            self._deviations.add((count, _tokens_key(tokens)), deviation, self._error)
        self._detect_change(count, deviation)
        weight = 1.0 if self.observed < REFIT_EVERY else _weight_of(deviation)
        # Instead of reducing the weight of all old batches, increase that of the new one: less to compute.
        self._newest_weight *= 1 + 1 / MEMORY_BATCHES
        self._recent.add(self._features(count, longest, total), elapsed_s, weight * self._newest_weight)
        self.observed += 1
        self.largest_count = max(self.largest_count, count)
        self._since_fit += 1
        if self.observed <= REFIT_EVERY or self._since_fit >= REFIT_EVERY:
            self._fit()

    @property
    def unsure_count(self) -> int:
        """The requests of the first batch of all, until it is known whether it was slow for being the first; else 0."""
        return self._first_count if self._first_runs <= SLOW_STARTS else 0

    def expect_first_runs(self) -> None:
        """Let first batches be slow again, because another pipeline runs them, which may compile something for each."""
        self._counts.clear()
        self._outliers.clear()

    def _is_worth_learning(self, elapsed_s: float) -> bool:
        """Whether learning stays within its share of the time. Of very short batches, only some are learnt from."""
        if self.observed < REFIT_EVERY:
            return True
        self._time_to_learn_s = min(self._time_to_learn_s, LEARNING_S) + LEARNING_SHARE * elapsed_s
        if self._time_to_learn_s < LEARNING_S:
            return False
        self._time_to_learn_s -= LEARNING_S
        return True

    def calibrate(self, count: int, longest: int, total: int, elapsed_s: float) -> None:
        """Learn from a shape that ran to be measured: it is no outlier, and a part of its weight does not fade.

        Raises `ValueError` for a time that is not positive.
        """
        if not 0 < elapsed_s < math.inf:
            raise ValueError(f"elapsed_s must be a positive time, got {elapsed_s!r}")
        self._counts.add(count)
        self._predictable.add(count)
        self._first_count = 0
        features = self._features(count, longest, total)
        self._kept.add(features, elapsed_s, KEPT_WEIGHT)
        self._recent.add(features, elapsed_s, (1 - KEPT_WEIGHT) * self._newest_weight)
        self.observed += 1
        self.largest_count = max(self.largest_count, count)
        self._fit()

    @property
    def is_trusted(self) -> bool:
        """Whether recent predictions were good enough to form batches by; false before the second batch."""
        return self.observed >= TRUSTED_FROM and self._error <= MAX_TRUSTED_ERROR

    @property
    def costs(self) -> Mapping[str, float]:
        """The fitted costs in seconds, by feature; those beyond knees only if they are not 0."""
        return {name: cost for i, (name, cost) in enumerate(zip(NAMES, self._costs, strict=True)) if i < 4 or cost}

    def state(self) -> dict[str, Any]:
        """All that was learnt, in JSON types, for `restore`."""
        if self._since_fit:
            self._fit()
        return {
            "version": STATE_VERSION,
            "feature": self.feature.value,
            "observed": self.observed,
            "largest_count": self.largest_count,
            "first": [self._first_count, self._first_runs],
            "kept": self._kept.state(),
            "recent": self._recent.state(),
            "predictable": sorted(self._predictable),
            "newest_weight": self._newest_weight,
            "error": self._error,
            "deviations": self._deviations.state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Replace all that was learnt by a `state`.

        Raises `ValueError` and changes nothing for an invalid state, or for the state of a model of another feature.
        """
        try:
            if (state["version"], state["feature"]) != (STATE_VERSION, self.feature.value):
                raise ValueError(f"of version {state['version']!r} and feature {state['feature']!r}")
            observed, newest_weight = int(state["observed"]), float(state["newest_weight"])
            largest_count, mean_error = int(state["largest_count"]), float(state["error"])
            first_count, first_runs = map(int, state.get("first", (0, 0)))
            predictable = set(map(int, state.get("predictable", ())))
            kept = NormalEquations.from_state(state["kept"], FEATURES)
            recent = NormalEquations.from_state(state["recent"], FEATURES)
            deviations = Deviations.from_state(state["deviations"])
        except (KeyError, TypeError, OverflowError) as error:
            raise ValueError(f"not the state of a cost model: {type(error).__name__}: {error}") from error
        if observed < 0 or largest_count < 0:
            raise ValueError(f"counts must not be negative, got {observed!r} and {largest_count!r}")
        if observed and not any(kept.solve_with(recent, 1.0, RELUCTANCE)):
            raise ValueError("not the state of a cost model: a batch would cost nothing")
        if not 0 <= mean_error <= MAX_ERROR:
            raise ValueError(f"error must be from 0 to {MAX_ERROR}, got {mean_error!r}")
        if not 1 <= newest_weight < math.inf:
            raise ValueError(f"newest_weight must be a finite number, 1 or more, got {newest_weight!r}")
        self.observed, self._newest_weight, self._kept, self._recent = observed, newest_weight, kept, recent
        self.largest_count, self._error, self._deviations = largest_count, mean_error, deviations
        self._first_count, self._first_runs = first_count, first_runs
        self._outliers, self._counts, self._predictable, self._time_to_learn_s = [], set(), predictable, 0.0
        if observed:
            self._fit()
        else:
            self._use(self._assumed_costs())

    def _detect_change(self, count: int, deviation: float) -> None:
        """Scale all costs if `CHANGE_AFTER` batches in a row were outliers on the same side: the device has changed."""
        if abs(deviation) < OUTLIER_LOG_RATIO:
            self._predictable.add(count)
            self._outliers.clear()
            return
        if count not in self._predictable:
            return
        if self._outliers and self._outliers[-1] * deviation < 0:
            self._outliers.clear()
        self._outliers.append(deviation)
        if len(self._outliers) == CHANGE_AFTER:
            factor = math.exp(median(self._outliers))
            self._kept.scale_values(factor)
            self._recent.scale_values(factor)
            self._outliers.clear()
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
        if self._newest_weight > MAX_WEIGHT:
            self._recent.scale_weights(1 / self._newest_weight)
            self._newest_weight = 1.0

    def _assumed_costs(self) -> list[float]:
        """The costs before the first observation: those of `PaddedCostModel`."""
        costs = dict.fromkeys(NAMES, 0.0)
        costs["batch"] = ASSUMED.fixed_s
        costs["token" if self._is_padded else "token of the other sum"] = ASSUMED.token_s
        return list(costs.values())

    def _use(self, costs: list[float]) -> None:
        """Predict by these costs from now on."""
        self._costs = costs
        self._batch_s, self._request_s, self._token_s, self._attention_s, *others = costs
        self._other_token_s, self._square_s, *beyond = others
        by_tokens, by_count = beyond[: len(KNEES)], beyond[len(KNEES) :]
        self._beyond_s = [(knee, cost) for knee, cost in zip(KNEES, by_tokens, strict=True) if cost]
        self._beyond_count_s = [(knee, cost) for knee, cost in zip(COUNT_KNEES, by_count, strict=True) if cost]


def _weight_of(deviation: float) -> float:
    """The weight of a batch in the fit, by ``log(measured / predicted)``."""
    # That of a fast one is lower still: its relative error, by its own short time, may be a thousand.
    return min(1.0, OUTLIER_LOG_RATIO / max(abs(deviation), 1e-9)) * math.exp(2 * min(0.0, deviation))


def _tokens_key(tokens: int) -> int:
    """A key for numbers of tokens within a quarter of an octave. It is negative, unlike a number of requests."""
    return -1 - size_bucket(tokens) // 4


REMEMBERED_BATCHES = 8  # of a kind: the weight of older ones decreases
NOISE_FLOOR = 0.02  # of a logarithm: a smaller deviation changes no decision


class Deviations:
    """Factors by which batches of a kind deviate from the fitted sum of costs, where the deviation is more than noise.

    A kind is an integer. As a rule a batch has two kinds, and each explains half of its deviation. The factors correct
    steps and cliffs, which no sum of costs can have.
    """

    def __init__(self) -> None:
        self.factors: dict[int, float] = {}
        """The factor of each kind whose deviation is more than noise."""
        self._means: dict[int, tuple[float, int]] = {}

    def add(self, kinds: tuple[int, ...], deviation: float, noise: float) -> None:
        """Learn from a batch of these kinds: ``log(measured / predicted)``, and the usual absolute value of that."""
        for kind in kinds:
            mean, seen = self._means.get(kind, (0.0, 0))
            seen = min(seen + 1, REMEMBERED_BATCHES)
            mean += (deviation / len(kinds) + math.log(self.factors.get(kind, 1.0)) - mean) / seen
            self._means[kind] = mean, seen
            certain = abs(mean) - (NOISE_FLOOR + noise) / math.sqrt(seen)
            if certain > 0 and seen > 1:
                self.factors[kind] = math.exp(math.copysign(certain, mean))
            else:
                self.factors.pop(kind, None)

    def state(self) -> list[list[float]]:
        """All that was learnt, in JSON types."""
        return [[kind, mean, seen, self.factors.get(kind, 1.0)] for kind, (mean, seen) in self._means.items()]

    @classmethod
    def from_state(cls, state: Iterable[Iterable[Any]]) -> Self:
        """The deviations of a `state`; raises `ValueError` or `TypeError` if it is invalid."""
        deviations = cls()
        for kind, mean, seen, factor in state:
            if not (math.isfinite(mean) and 1 <= seen <= REMEMBERED_BATCHES and 0 < factor < math.inf):
                raise ValueError(f"no deviation: {kind!r}, {mean!r}, {seen!r}, {factor!r}")
            deviations._means[int(kind)] = float(mean), int(seen)
            if factor != 1.0:
                deviations.factors[int(kind)] = float(factor)
        return deviations
