"""The optimal partition of the queue by dynamic programming: what more computation could gain."""

from operator import attrgetter

from modalkit.batching import Batch, Decision, DispatchReason, MeasuredCostModel
from modalkit.benchmarks.simulate.workload import IndexedRequest


class OptimalPartition:
    """Cuts the oldest `window` requests, sorted by size, into batches that take the least time in all.

    It runs the batch with the oldest request, and then decides again. It learns costs as the planner does. The
    recursion is that of the batch scheduler of TurboTransformers (Fang et al., PPoPP 2021): the least seconds for the i
    smallest requests are the minimum, over the size n of the last batch, of those for i - n requests plus this batch.
    """

    def __init__(self, cost_model: MeasuredCostModel, max_batch_size: int = 32, window: int = 256) -> None:
        self.cost_model = cost_model
        self.max_batch_size = max_batch_size
        self.window = window
        self.queue: list[IndexedRequest] = []

    def push(self, request: IndexedRequest) -> None:
        """Put a request at the end of the queue."""
        self.queue.append(request)

    def decide(self, now: float) -> Decision[IndexedRequest]:  # noqa: ARG002  # this rule needs no clock
        """Run the batch of the best partition that has the oldest request in it."""
        if not self.queue:
            return Decision()
        by_size = sorted(self.queue[: self.window], key=attrgetter("size"))
        oldest = by_size.index(self.queue[0])
        first, last = next(part for part in self._partition(by_size) if part[0] <= oldest < part[1])
        requests = by_size[first:last]
        taken = set(map(id, requests))
        self.queue = [request for request in self.queue if id(request) not in taken]
        sizes = [request.size for request in requests]
        predicted_s = self.cost_model.predict_s(len(sizes), sizes[-1], sum(sizes))
        return Decision(Batch(requests, requests[0].priority, DispatchReason.IDLE, sizes[-1], sum(sizes), predicted_s))

    def end_batch(self, batch: Batch[IndexedRequest], elapsed_s: float) -> None:
        """Learn what the batch cost."""
        self.cost_model.observe(len(batch.requests), batch.longest, batch.total, elapsed_s)

    def _partition(self, by_size: list[IndexedRequest]) -> list[tuple[int, int]]:
        """The batches of the best partition, each as the positions of its first request and of the one after it."""
        totals = [0]
        for request in by_size:
            totals.append(totals[-1] + request.size)
        least_s = [0.0]
        starts = [0]
        for end, request in enumerate(by_size, start=1):
            candidates = range(max(0, end - self.max_batch_size), end)
            seconds = [
                least_s[start] + self.cost_model.predict_s(end - start, request.size, totals[end] - totals[start])
                for start in candidates
            ]
            best = min(range(len(seconds)), key=seconds.__getitem__)
            least_s.append(seconds[best])
            starts.append(candidates[best])
        parts, end = [], len(by_size)
        while end:
            parts.append((starts[end], end))
            end = starts[end]
        return parts
