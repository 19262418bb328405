"""The histograms and counters of this process for Prometheus, and what fills them.

`service/web/metrics.py` adds what is read at each scrape. No label has more values than there are models, routes or
members of an enumeration: none is the name of a queue, a job or a caller.
"""

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from functools import cache, partial
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from modalkit.batching import BatchRecord, DispatchReason, Priority

REGISTRY = CollectorRegistry()
"""What is counted here: of all models, applications and job stores of the process."""

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_AGES_S = (0.01, 0.1, 0.5, 1, 5, 15, 60, 300, 900, 3600, 6 * 3600, 24 * 3600)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)


class LoopHistogram(Collector):
    """A histogram for Prometheus that is filled in the event loop: `prometheus_client`'s own one, which threads may
    fill, takes several times as long for an observation.
    """

    def __init__(
        self,
        name: str,
        description: str,
        labels: Sequence[str],
        buckets: Sequence[float],
        registry: CollectorRegistry = REGISTRY,
    ) -> None:
        self._describe = partial(HistogramMetricFamily, name, description, labels=labels)
        self._bounds = [*buckets, math.inf]
        self._observed: dict[tuple[str, ...], Observations] = {}
        registry.register(self)

    def of(self, *values: str) -> "Observations":
        """The observations with these values of the labels."""
        observed = self._observed.get(values)
        if observed is None:
            observed = self._observed[values] = Observations(self._bounds)
        return observed

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """What was observed."""
        family = self._describe()
        for values, observed in self._observed.items():
            counts = zip(map(floatToGoString, self._bounds), accumulate(observed.counts), strict=True)
            family.add_metric(values, list(counts), observed.sum)
        yield family


class Observations:
    """What a histogram has counted for one value of each label."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self.counts = [0] * len(bounds)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """Count a value."""
        self.sum += value
        self.counts[bisect_left(self._bounds, value)] += 1

    def observe_all(self, values: Sequence[float]) -> None:
        """Count several values, at least one; those of a batch are mostly between the same bounds."""
        self.sum += sum(values)
        place = bisect_left(self._bounds, min(values))
        if place == bisect_left(self._bounds, max(values)):
            self.counts[place] += len(values)
            return
        for value in values:
            self.counts[bisect_left(self._bounds, value)] += 1


def _counter(name: str, description: str, *labels: str) -> Counter:
    return Counter(name, description, labels, registry=REGISTRY)


_REQUEST = LoopHistogram(
    "modalkit_request_seconds",
    "Seconds from the headers of an HTTP request to the end of its answer.",
    ("route", "outcome"),
    _SECONDS,
)
_WAIT = LoopHistogram(
    "modalkit_queue_wait_seconds", "Seconds that a request waited for its batch.", ("model", "priority"), _SECONDS
)
_STAGE = LoopHistogram("modalkit_stage_seconds", "Seconds of a batch in a stage.", ("model", "stage"), _SECONDS)
_SIZE = LoopHistogram("modalkit_batch_size", "Requests in a batch.", ("model",), _SIZES)
_PADDING = LoopHistogram("modalkit_padding_share", "Share of a batch that is padding.", ("model",), _SHARES)
_BATCHES = _counter("modalkit_batches", "Batches that ran, by why they were dispatched.", "model", "reason")
_PREDICTED = _counter("modalkit_predicted_seconds", "Predicted seconds of batches that succeeded.", "model")
_MEASURED = _counter("modalkit_measured_seconds", "Measured seconds of the same batches.", "model")
_JOB_AGE = LoopHistogram(
    "modalkit_job_age_seconds", "Seconds from a job's acceptance to its end.", ("model", "status"), _AGES_S
)
_DELIVERY = LoopHistogram(
    "modalkit_delivery_seconds",
    "Seconds from a job's end until its result was delivered, or given up.",
    ("model", "outcome"),
    _AGES_S,
)
_ATTEMPTS = _counter("modalkit_delivery_attempts", "Attempts to deliver a result.", "outcome")

request_seconds = _REQUEST.of
"""The histogram of a route and an outcome."""
job_age_seconds = _JOB_AGE.of
"""The histogram of a model and a status."""
delivery_seconds = _DELIVERY.of
"""The histogram of a model and an outcome: `delivered`, `memory` or `undelivered`."""
delivery_attempts = cache(_ATTEMPTS.labels)  # to find a counter by its labels takes longer than to add to it
"""The counter of an outcome: `delivered`, `memory`, `undelivered`, or `pending` for an attempt that is repeated."""


class BatchMetrics:
    """A sink for the batch records of one model."""

    def __init__(self, model: str) -> None:
        self._waits = {priority: _WAIT.of(model, priority) for priority in Priority}
        self._stages = {name: _STAGE.of(model, name) for name in ("preprocess", "predict", "postprocess")}
        self._reasons = {reason: _BATCHES.labels(model, reason) for reason in DispatchReason}
        self._size, self._padding = _SIZE.of(model), _PADDING.of(model)
        self._predicted, self._measured = _PREDICTED.labels(model), _MEASURED.labels(model)

    def __call__(self, record: BatchRecord) -> None:
        """Count a batch; that it took, only if it succeeded in one run."""
        self._reasons[record.reason].inc()
        self._size.observe(record.count)
        self._padding.observe(record.padding_share)
        for priority, waits_s in record.waits_s.items():
            if waits_s:
                self._waits[priority].observe_all(waits_s)
        if record.measured_s:
            self._predicted.inc(record.predicted_s)
            self._measured.inc(record.measured_s)
            for name, stage in self._stages.items():
                if seconds := getattr(record, f"{name}_s"):
                    stage.observe(seconds)
