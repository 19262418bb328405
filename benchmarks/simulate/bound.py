"""A lower bound for the 99th percentile of the latencies of any batching rule."""

from heapq import heappop, heappush

import numpy as np
from numpy.typing import NDArray

from modalkit.benchmarks.simulate.tables import CostTable
from modalkit.benchmarks.simulate.workload import OpenLoop

STEPS_IN_A_BATCH = 20
TOLERANCE = 0.002


def least_p99_s(table: CostTable, source: OpenLoop, max_batch_size: int, late_share: float = 0.01) -> float:
    """A lower bound, for batches with the times of `table`, that holds even for a rule that knows all arrivals.

    It is the shortest latency that all but `late_share` of the requests can keep in both of two easier problems:

    - *Batches of any number of requests.* A batch takes as long as the shortest possible batch, and each request in it
      as long as it takes alone. Batches start one after the other, so a request that arrives just after a start has to
      wait. A request is in time if a batch starts in its window. Dynamic programming over time, in steps of a twentieth
      of a batch, finds the largest number of requests in time; rounding can only make the bound lower.
    - *Work that can be divided freely.* Each request takes its share of the best batch of its size. In each busy period
      the requests run in order of arrival. If one is late, the request with the most work so far is dropped; this drops
      the fewest requests (Moore, 1968).
    """
    arrivals_s, sizes = source.arrivals_s, source.sizes
    unique, indices = np.unique(sizes, return_inverse=True)
    alone_s = np.array([table.seconds(1, size) for size in unique.tolist()])[indices]
    work_s = np.array(
        [min(table.seconds(count, size) / count for count in range(1, max_batch_size + 1)) for size in unique.tolist()]
    )[indices]
    allowed = late_share * len(sizes)

    def is_possible(latency_s: float) -> bool:
        return (
            _late_for_starts(arrivals_s, alone_s, latency_s) <= allowed
            and _late_for_work(arrivals_s, work_s, alone_s, latency_s) <= allowed
        )

    low_s = float(np.quantile(alone_s, 1 - late_share, method="lower"))
    high_s = low_s
    while not is_possible(high_s):
        low_s, high_s = high_s, 2 * high_s
    while high_s - low_s > TOLERANCE * high_s:
        middle_s = (low_s + high_s) / 2
        if is_possible(middle_s):
            high_s = middle_s
        else:
            low_s = middle_s
    return low_s


def _late_for_starts(arrivals_s: NDArray[np.float64], alone_s: NDArray[np.float64], latency_s: float) -> int:
    """How many requests are late at least where a batch holds any number, but batches start one after the other."""
    batch_s = float(alone_s.min())
    window_s = latency_s - alone_s
    if window_s.max() >= batch_s:  # one start after the other meets every window that is as long as a batch
        return int((window_s < 0).sum())
    step_s = batch_s / STEPS_IN_A_BATCH
    in_time = window_s >= 0
    first = np.floor(arrivals_s[in_time] / step_s).astype(np.int64)
    last = np.floor((arrivals_s + window_s)[in_time] / step_s).astype(np.int64)
    changes = np.zeros(int(last.max()) + 2, dtype=np.int64)
    np.add.at(changes, first, 1)
    np.add.at(changes, last + 1, -1)
    best = [0] * STEPS_IN_A_BATCH
    for served in np.cumsum(changes).tolist():
        # The most that batches can serve which start by now: the last one starts now, or earlier.
        best.append(max(best[-1], best[-STEPS_IN_A_BATCH] + served))
    return len(arrivals_s) - min(best[-1], int(in_time.sum()))


def _late_for_work(
    arrivals_s: NDArray[np.float64], work_s: NDArray[np.float64], alone_s: NDArray[np.float64], latency_s: float
) -> int:
    """How many requests are late at least where work can be cut up at will."""
    late, free_s = 0, 0.0
    waiting: list[float] = []  # what is to be done since the worker was last idle, as a heap of the largest
    for arrival_s, seconds, is_hopeless in zip(
        arrivals_s.tolist(), work_s.tolist(), (alone_s > latency_s).tolist(), strict=True
    ):
        if is_hopeless:
            late += 1
            continue
        if free_s <= arrival_s:
            waiting.clear()
            free_s = arrival_s
        heappush(waiting, -seconds)
        free_s += seconds
        if free_s > arrival_s + latency_s:
            free_s += heappop(waiting)
            late += 1
    return late
