"""Estimators that the planner uses: when the next request comes, and how large and how long batches may be."""

import math
from typing import Any

from modalkit.batching.policy import Batch

ARRIVAL_SMOOTHING = 1 / 16  # weight of the newest request in the averages

MIN_RETRY_BATCHES = 16  # batches near the token limit before a larger one is tried
MAX_RETRY_BATCHES = 1024
NEAR_LIMIT_SHARE = 0.8  # a batch of at least this share of the token limit is near it

MAX_EXPLORATION_SHARE = 0.02  # of the running time that trials may lose
MAX_CREDIT_BATCHES = 1024  # the credit for trials is limited to that of so many batches, or to the cost of a trial
MIN_TRIAL_INTERVAL = 8  # batches between two trials
MAX_TRIAL_INTERVAL = 1024
TRIAL_FACTORS = (2.0, 1.5, math.inf)  # of the usual number of requests, in turn
MIN_TRIAL_FACTOR = 1.25  # a smaller batch is no trial

MAX_BULK_COST = 0.03  # of the bulk throughput that short batches may cost
BULK_SMOOTHING = 1 / 32
SETTLED_AFTER = 64  # measured batches
MEASURE_INTERVAL = 8  # calls of `should_measure` for one measurement, once settled
LONGER_FACTOR, SHORTER_FACTOR = 1.02, 0.98  # a step for each measured batch

DRAIN_SMOOTHING = 1 / 4  # weight of the last batch in the measured drain rate
REFRESH_INTERVAL = 32  # batches after which what waits is predicted anew; before, after each batch


class DrainRate:
    """How fast the queue drains: what recent batches took, beside what the costs predict for them.

    The costs alone are not enough: those of a cost model that learns nothing may be in any unit.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._batches = 0
        self._measured_s = self._predicted_s = 0.0  # weighted sums over recent batches

    def record(self, elapsed_s: float, predicted_s: float) -> None:
        """Take a batch into account that took `elapsed_s`; the costs, which have learnt from it, say `predicted_s`."""
        self._batches += 1
        self._measured_s += DRAIN_SMOOTHING * (elapsed_s - self._measured_s)
        self._predicted_s += DRAIN_SMOOTHING * (predicted_s - self._predicted_s)

    def is_refresh_due(self) -> bool:
        """Whether the costs may have changed much since requests were last predicted."""
        return self._batches < REFRESH_INTERVAL or self._batches % REFRESH_INTERVAL == 0

    def wait_s(self, predicted_s: float) -> float:
        """Seconds until what is predicted to take `predicted_s` has run; 0 before the first batch."""
        if not self._predicted_s:
            return 0.0
        return predicted_s * self._measured_s / self._predicted_s / self.workers


class Arrivals:
    """The mean gap between requests and their mean size, as exponential averages over the last few dozen requests.

    Before the second request nothing is known, and the gap is infinite.
    """

    def __init__(self) -> None:
        self.last_s = -math.inf
        """When the last request came."""
        self.gap_s = math.inf
        """The mean time between two requests."""
        self.mean_size = 0.0
        """The mean size of a request; 0 before the first."""

    def add(self, size: int, now: float) -> None:
        """Take a request of `size` into account, which came at `now`."""
        gap_s = now - self.last_s
        if math.isinf(self.gap_s):
            self.gap_s = gap_s
        else:
            self.gap_s += ARRIVAL_SMOOTHING * (gap_s - self.gap_s)
        self.mean_size += ARRIVAL_SMOOTHING * (size - self.mean_size) if self.mean_size else size
        self.last_s = now


class TokenLimit:
    """The most padded tokens that a batch may have on this device: infinite until a batch was too large.

    A batch that did not fit lowers the limit to half its size, or to the largest size that did fit, if that is more.
    After some batches near the limit it is raised by an eighth, because the device may have more free memory by then.
    Each time that fails, twice as many batches pass before the next attempt. (Clipper, NSDI 2017, finds its batch sizes
    by additive increase and multiplicative decrease; here both steps are bounded by the sizes that are known to fit.)
    """

    def __init__(self) -> None:
        self.tokens: float = math.inf
        self._largest_fit = 0  # tokens of the largest batch that fitted since a smaller one did not
        self._is_raised = False  # whether the limit is above all sizes that are known to fit
        self._interval = MIN_RETRY_BATCHES
        self._batches_to_retry = MIN_RETRY_BATCHES

    def record_too_large(self, tokens: int) -> None:
        """Take into account that a batch of `tokens` did not fit."""
        if tokens <= self._largest_fit:
            self._largest_fit = 0
        if self._is_raised and tokens <= self.tokens:
            self._interval = min(2 * self._interval, MAX_RETRY_BATCHES)
        self._is_raised = False
        self.tokens = min(self.tokens, max(1, tokens // 2, self._largest_fit))
        self._batches_to_retry = self._interval

    def record_fit(self, tokens: int) -> None:
        """Take into account that a batch of `tokens` ran."""
        if tokens > self._largest_fit:
            self._largest_fit = tokens
        if tokens < NEAR_LIMIT_SHARE * self.tokens or math.isinf(self.tokens):
            return
        self._batches_to_retry -= 1
        if self._batches_to_retry <= 0:
            self.tokens += self.tokens // 8 + 1
            self._is_raised = True
            self._batches_to_retry = self._interval


class Exploration:
    """Decides when a larger batch is tried although smaller ones are predicted to be cheaper: costs may be wrong.

    Twice as many requests as usual, half as many more, and a full batch are tried in turn. Costs may have a cliff
    anywhere between the usual number and the next larger one that ever ran; in between they are only interpolated.

    Every batch adds a share of its time to a credit. A trial is allowed once the credit covers its predicted loss, and
    its real loss is subtracted. After a trial that lost time, twice as many batches pass before the next one. So trials
    lose at most `MAX_EXPLORATION_SHARE` of the running time, plus what one trial lost more than predicted.
    """

    def __init__(self) -> None:
        self._credit_s = 0.0
        self._refused_s = 0.0  # the predicted loss of the trial that was refused last
        self._interval = MIN_TRIAL_INTERVAL
        self._batches_to_trial = MIN_TRIAL_INTERVAL
        self._turn = 0

    def count(self, usual: int, limit: int) -> int:
        """The requests of the next trial in place of a batch of `usual`, if batches may hold `limit`."""
        return int(min(limit, usual * TRIAL_FACTORS[self._turn % len(TRIAL_FACTORS)]))

    def skip(self) -> None:
        """Go on to the next number of requests, because no such batch may be tried now."""
        self._turn += 1

    @property
    def is_due(self) -> bool:
        """Whether enough batches have passed since the last trial."""
        return self._batches_to_trial <= 0

    def allow(self, predicted_loss_s: float) -> bool:
        """Allow or refuse a trial with this predicted loss. After a refusal, the credit may grow up to that loss."""
        if not self.is_due:
            return False
        if predicted_loss_s > self._credit_s:
            self._refused_s = predicted_loss_s
            return False
        return True

    def record_batch(self, elapsed_s: float) -> None:
        """Take a batch into account that was no trial."""
        self._batches_to_trial -= 1
        share_s = MAX_EXPLORATION_SHARE * elapsed_s
        self._credit_s = min(self._credit_s + share_s, max(MAX_CREDIT_BATCHES * share_s, self._refused_s))

    def record_trial(self, loss_s: float) -> None:
        """Take a trial into account that lost `loss_s` seconds; a negative loss is a gain."""
        self._turn += loss_s > 0
        self._credit_s -= max(0.0, loss_s)
        self._refused_s = 0.0
        self._interval = min(2 * self._interval, MAX_TRIAL_INTERVAL) if loss_s > 0 else MIN_TRIAL_INTERVAL
        self._batches_to_trial = self._interval


class BulkTimeLimit:
    """The most seconds that a bulk batch may be predicted to take while interactive requests arrive.

    An interactive request waits for the batch that runs, so bulk batches are short then. Short batches may cost 3 % of
    the bulk throughput as a whole, not 3 % of each batch: to halve a long batch gains more, and costs less, than to
    halve a short one. The limit is raised in small steps while short batches have cost more, and lowered while they
    have cost less. It never exceeds `max_s`.
    """

    def __init__(self, max_s: float | None = None) -> None:
        self.seconds = math.inf
        self.set_maximum(max_s)
        self._cost = 0.0
        self._measured = self._calls = 0

    def set_maximum(self, max_s: float | None) -> None:
        """Never exceed `max_s` from now on."""
        self._max_s = math.inf if max_s is None else max_s
        self.seconds = min(self.seconds, self._max_s)

    def should_measure(self) -> bool:
        """Whether to form a bulk batch only to measure what a short one costs: always at first, later each 8th time."""
        self._calls += 1
        return self._measured < SETTLED_AFTER or not self._calls % MEASURE_INTERVAL

    def add(self, batch: Batch[Any], short: Batch[Any]) -> None:
        """Take a batch into account, and `short`, the part of it that runs in its place."""
        if math.isinf(self.seconds):
            self.seconds = batch.predicted_s
        if len(batch.requests) == 1 or not batch.predicted_s:
            return  # it cannot be shortened, or not be quicker, so it says nothing
        self._measured += 1
        cost = (short.predicted_s / short.total) / (batch.predicted_s / batch.total) - 1
        self._cost += BULK_SMOOTHING * (cost - self._cost)
        if self._cost > MAX_BULK_COST:
            self.seconds *= LONGER_FACTOR
        elif len(short.requests) > 1:  # a batch of one request cannot become shorter
            self.seconds *= SHORTER_FACTOR
        self.seconds = min(self._max_s, self.seconds)
