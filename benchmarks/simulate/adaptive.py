"""Rules of other servers that adapt to the measured times of batches, reimplemented from their sources."""

import math
from collections import deque
from dataclasses import replace

import numpy as np

from modalkit.batching import Batch, Decision
from modalkit.benchmarks.simulate.rules import Fifo, as_batch
from modalkit.benchmarks.simulate.workload import IndexedRequest


class BentoRule:
    """BentoML's adaptive rule: `CorkDispatcher` and `Optimizer` in `bentoml/_internal/marshal/dispatcher.py`.

    (https://github.com/bentoml/BentoML, as of commit 0053fc4.) The rule predicts ``a * n + b`` seconds for a batch,
    fitted by least squares to the last 50 batches and refreshed every 5 seconds. If n requests wait, the newest for
    `wn`, the rule waits another tick of 1 ms while ``n * (wn + tick + a) <= 0.95 * wait``. `wait` is the mean time that
    the oldest requests of those batches had waited. Then it runs up to `max_batch_size` of the *newest* requests: the
    source appends to its queue and pops from the same end. While more than one request waits, and the oldest one would
    be answered later than `max_latency_s` after its arrival if all ran in one batch, the oldest is dropped. The source
    checks this at each tick; here it is checked when the worker is free.

    The source's training on the first requests becomes batches of up to one, two and three requests, which do not wait
    and drop no request. Its limit of a batch, which is exclusive by mistake in that commit, is inclusive here. The
    defaults are BentoML's, except the batch size, which is the same for all rules.
    """

    KEPT_SAMPLES = 50
    SKIPPED_SAMPLES = 2
    TRAINING_BATCHES = 3
    REFRESH_S = 5.0
    TICK_S = 0.001
    DECAY = 0.95

    def __init__(self, max_batch_size: int = 32, max_latency_s: float = 60.0) -> None:
        self.max_batch_size = max_batch_size
        self.max_latency_s = max_latency_s
        self.request_s = min(2.0, max_latency_s * 2 / 30)
        self.batch_s = min(1.0, max_latency_s / 30)
        self.wait_s = 0.01
        self.queue: deque[IndexedRequest] = deque()
        self._samples: deque[tuple[int, float, float]] = deque(maxlen=self.KEPT_SAMPLES)
        self._batches = 0
        self._next_refresh_s = -math.inf
        self._started_s = 0.0

    def push(self, request: IndexedRequest) -> None:
        """Put a request at the end of the queue."""
        self.queue.append(request)

    def decide(self, now: float) -> Decision[IndexedRequest]:
        """Drop requests that are too late; run the newest ones, or wait another tick for more."""
        if not self.queue:
            return Decision()
        trained_with = self._batches - self.SKIPPED_SAMPLES
        if trained_with < self.TRAINING_BATCHES:
            return self._take(min(self.max_batch_size, max(1, trained_with + 1)), now)
        queue, expired = self.queue, []
        while (count := len(queue)) > 1 and (
            now - queue[0].arrival_s + self.request_s * count + self.batch_s >= self.max_latency_s
        ):
            expired.append(queue.popleft())
        max_wait_s = self.DECAY * self.wait_s
        if count < self.max_batch_size and (
            count * (now - queue[-1].arrival_s + self.TICK_S + self.request_s) <= max_wait_s
        ):
            return Decision(wake_s=now + self.TICK_S, expired=expired)
        return replace(self._take(self.max_batch_size, now), expired=expired)

    def _take(self, limit: int, now: float) -> Decision[IndexedRequest]:
        self._started_s = now
        return Decision(as_batch([self.queue.pop() for _ in range(min(len(self.queue), limit))]))

    def end_batch(self, batch: Batch[IndexedRequest], elapsed_s: float) -> None:
        """Learn the seconds of a batch and the waiting time of requests."""
        self._batches += 1
        if self._batches <= self.SKIPPED_SAMPLES:
            return
        self._samples.append((len(batch.requests), elapsed_s, self._started_s - batch.requests[-1].arrival_s))
        now = self._started_s + elapsed_s
        if self._batches <= self.SKIPPED_SAMPLES + self.TRAINING_BATCHES or now >= self._next_refresh_s:
            self._next_refresh_s = now + self.REFRESH_S
            self._refresh()

    def _refresh(self) -> None:
        samples = np.array(self._samples)
        (request_s, batch_s), *_ = np.linalg.lstsq(
            np.column_stack([samples[:, 0], np.ones(len(samples))]), samples[:, 1], rcond=None
        )
        self.request_s, self.batch_s = max(1e-6, float(request_s)), max(0.0, float(batch_s))
        self.wait_s = max(0.0, float(samples[:, 2].mean()))


class ClipperRule(Fifo):
    """Clipper's adaptive batch size: additive increase, multiplicative decrease; oldest first, without waiting.

    D. Crankshaw and others, "Clipper: A Low-Latency Online Prediction Serving System", NSDI 2017, section 4.3.1: the
    batch size limit grows by a fixed amount until a batch takes longer than the objective, and is then reduced by a
    tenth. (The paper does not give the amount; here it is one request, added after a full batch.) The optional delay of
    batches, section 4.3.2, is left out.
    """

    INCREASE = 1.0
    BACKOFF = 0.9

    def __init__(self, objective_s: float, max_batch_size: int = 32) -> None:
        super().__init__()
        self.objective_s = objective_s
        self.max_batch_size = max_batch_size
        self.limit = 1.0

    def decide(self, now: float) -> Decision[IndexedRequest]:  # noqa: ARG002  # this rule needs no clock
        """Run as many of the oldest requests as the limit allows."""
        return self.take(min(len(self.queue), int(self.limit))) if self.queue else Decision()

    def end_batch(self, batch: Batch[IndexedRequest], elapsed_s: float) -> None:
        """Adapt the limit."""
        if elapsed_s > self.objective_s:
            self.limit = max(1.0, self.limit * self.BACKOFF)
        elif len(batch.requests) >= int(self.limit):
            self.limit = min(self.limit + self.INCREASE, self.max_batch_size)
