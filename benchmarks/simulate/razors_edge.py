"""The rule of the package razors-edge-batching-scheduler, called as its own task calls it."""

import numpy as np
from razors_edge.optimal_batching import get_batch_start_end_idx_and_duration

from modalkit.batching import Batch, Decision
from modalkit.benchmarks.simulate.rules import as_batch
from modalkit.benchmarks.simulate.tables import CostTable
from modalkit.benchmarks.simulate.workload import IndexedRequest, corpus_sizes

STRATEGIES = ("MINMAX", "FIFO", "GUARDED_BATCH_SIZE")
NANOSECONDS = 1e9


class RazorsEdge:
    """Partitions all waiting requests by dynamic programming, and runs the part that its strategy prefers.

    It is given the exact seconds of each batch, which the package measures at its start, and forms each batch when the
    worker is free, where the package forms one ahead: both are to its advantage.
    """

    def __init__(self, table: CostTable, strategy: str, max_batch_size: int = 32) -> None:
        self.strategy = strategy
        sizes = range(int(corpus_sizes().max()) + 1)
        self._costs_ns = np.array(
            [
                [round(table.seconds(count, max(size, 1)) * NANOSECONDS) for size in sizes]
                for count in range(1, max_batch_size + 1)
            ],
            np.int64,
        )
        self._queue: list[IndexedRequest] = []
        self._expected_ns = 0

    def push(self, request: IndexedRequest) -> None:
        """Add a request."""
        self._queue.append(request)

    def decide(self, now: float) -> Decision[IndexedRequest]:
        """Run the batch that the package chooses."""
        if not self._queue:
            return Decision()
        self._queue.sort(key=lambda request: (request.size, request.payload))
        self._expected_ns = max(self._expected_ns, round(now * NANOSECONDS))
        first, last, duration_ns = get_batch_start_end_idx_and_duration(
            np.array([request.size for request in self._queue]),
            self._costs_ns,
            np.array([round(request.arrival_s * NANOSECONDS) for request in self._queue]),
            self._expected_ns,
            self.strategy,
        )
        self._expected_ns += int(duration_ns)
        chosen = self._queue[first:last]
        del self._queue[first:last]
        return Decision(as_batch(chosen))

    def end_batch(self, batch: Batch[IndexedRequest], elapsed_s: float) -> None:
        """Do nothing: the package learns nothing from batches that ran."""
