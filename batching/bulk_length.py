"""How long bulk batches may be while interactive requests arrive, each of which waits for the one that runs."""

import math
from typing import Any

from modalkit.batching.policy import Batch

COST_ALLOWED = 0.03  # of the bulk throughput
SMOOTHING = 1 / 32
SETTLED_AFTER = 64
ASK_EVERY = 8
LONGER, SHORTER = 1.02, 0.98  # a step for each batch


class BulkLength:
    """The longest that a bulk batch may be predicted to take, such that short batches cost 3 % on the whole.

    Not 3 % of each batch: to halve one that takes long gains more than to halve a short one, and costs less. The length
    is found by steps: longer while short batches have cost more than that, shorter while they have cost less.
    `longest_s` bounds it in any case.
    """

    def __init__(self, longest_s: float | None = None) -> None:
        self._longest_s = math.inf if longest_s is None else longest_s
        self.seconds = self._longest_s
        """The longest that a bulk batch may be predicted to take."""
        self._cost = 0.0
        self._added = self._asked = 0

    def should_measure(self) -> bool:
        """Whether to form another bulk batch just to see: always at first, then for each eighth time of asking."""
        self._asked += 1
        return self._added < SETTLED_AFTER or not self._asked % ASK_EVERY

    def add(self, batch: Batch[Any], short: Batch[Any]) -> None:
        """Account for a batch in place of which `short`, a part of it, runs."""
        if math.isinf(self.seconds):
            self.seconds = batch.predicted_s
        if len(batch.requests) == 1:
            return  # there is nothing to shorten, so nothing to learn
        self._added += 1
        cost = (short.predicted_s / short.total) / (batch.predicted_s / batch.total) - 1
        self._cost += SMOOTHING * (cost - self._cost)
        if self._cost > COST_ALLOWED:
            self.seconds *= LONGER
        elif len(short.requests) > 1:  # nothing is shorter than one request
            self.seconds *= SHORTER
        self.seconds = min(self._longest_s, self.seconds)
