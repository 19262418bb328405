"""The figures of a run: rates, shares and quantiles."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from modalkit.batching import Priority
from modalkit.benchmarks.simulate.engine import Run

WARM_UP_SHARE = 0.1


@dataclass(frozen=True, slots=True)
class Latencies:
    """Quantiles of the seconds from arrival to answer; NaN if no request was answered."""

    count: int
    mean_s: float
    p50_s: float
    p99_s: float
    p999_s: float


@dataclass(frozen=True, slots=True)
class Summary:
    """A run in figures.

    Rates and shares are over the time from the end of the warm-up (the first tenth of the requests) to the last
    arrival. A request that is answered later counts in the latencies, but not in the throughput.
    """

    requests: int
    virtual_s: float
    throughput: float
    """Requests answered per second."""
    utilisation: float
    """The share of the time in which the worker was busy."""
    padding: float
    """The share of the tokens, after padding, that is padding."""
    mean_batch_size: float
    turned_away: float
    """The share of all requests that were refused or dropped."""
    longest_s: float
    """The longest latency, warm-up included; it shows starvation."""
    all: Latencies
    by_lane: dict[str, Latencies]
    """The latencies of each lane; empty if all requests are in one lane."""


def latencies(seconds: NDArray[np.float64]) -> Latencies:
    """The quantiles of these seconds; NaN (a request without an answer) is ignored."""
    answered = seconds[~np.isnan(seconds)]
    if not len(answered):
        return Latencies(0, *[float("nan")] * 4)
    p50, p99, p999 = np.quantile(answered, [0.5, 0.99, 0.999])
    return Latencies(len(answered), float(answered.mean()), float(p50), float(p99), float(p999))


def summarize(run: Run) -> Summary:
    """The figures of a run."""
    total = len(run.arrivals_s)
    first = int(total * WARM_UP_SHARE)
    start_s, end_s = float(run.arrivals_s[first]), float(np.nanmax(run.arrivals_s))
    if end_s <= start_s:  # all arrived at once: the backlog ends with its last answer
        end_s = float(np.nanmax(run.finished_s))
    window_s = end_s - start_s
    batches = np.array([(b.started_s, b.elapsed_s, b.count, b.longest, b.total) for b in run.batches])
    starts, ends = batches[:, 0], batches[:, 0] + batches[:, 1]
    counted = batches[starts >= start_s]
    answered = np.count_nonzero((run.finished_s > start_s) & (run.finished_s <= end_s))
    seconds = (run.finished_s - run.arrivals_s)[first:]
    is_bulk = run.is_bulk[first:]
    return Summary(
        requests=total,
        virtual_s=end_s,
        throughput=answered / window_s,
        utilisation=float(np.clip(np.minimum(ends, end_s) - np.maximum(starts, start_s), 0, None).sum() / window_s),
        padding=1 - float(counted[:, 4].sum() / (counted[:, 2] * counted[:, 3]).sum()),
        mean_batch_size=float(counted[:, 2].mean()),
        turned_away=(run.refused + run.dropped) / total,
        longest_s=float(np.nanmax(run.finished_s - run.arrivals_s)),
        all=latencies(seconds),
        by_lane={}
        if is_bulk.all() or not is_bulk.any()
        else {Priority.INTERACTIVE: latencies(seconds[~is_bulk]), Priority.BULK: latencies(seconds[is_bulk])},
    )
