"""Rules in order of arrival, as in most servers: baselines for the planner."""

from collections import deque
from collections.abc import Sequence

from modalkit.batching import Batch, Decision, DispatchReason
from modalkit.benchmarks.simulate.workload import IndexedRequest


def as_batch(requests: Sequence[IndexedRequest]) -> Batch[IndexedRequest]:
    """A batch of these requests; none of the rules here predicts its time."""
    sizes = [request.size for request in requests]
    return Batch(
        requests=list(requests),
        priority=requests[0].priority,
        reason=DispatchReason.IDLE,
        longest=max(sizes),
        total=sum(sizes),
        predicted_s=0.0,
    )


class Fifo:
    """A queue in order of arrival, for rules that learn nothing from the batches that ran."""

    def __init__(self) -> None:
        self.queue: deque[IndexedRequest] = deque()

    def push(self, request: IndexedRequest) -> None:
        """Put a request at the end of the queue."""
        self.queue.append(request)

    def end_batch(self, batch: Batch[IndexedRequest], elapsed_s: float) -> None:
        """Do nothing."""

    def take(self, count: int) -> Decision[IndexedRequest]:
        """Run the oldest `count` requests."""
        return Decision(as_batch([self.queue.popleft() for _ in range(count)]))


class FixedWindow(Fifo):
    """Waits until `max_batch_size` requests wait or the oldest has waited for `window_s`; runs the oldest ones.

    The rule of the usual `max_batch_size` and `max_latency_ms` settings.
    """

    def __init__(self, max_batch_size: int = 32, window_s: float = 0.010) -> None:
        super().__init__()
        self.max_batch_size = max_batch_size
        self.window_s = window_s

    def decide(self, now: float) -> Decision[IndexedRequest]:
        """Run a full batch, or all requests once the oldest has waited long enough."""
        if not self.queue:
            return Decision()
        closes_s = self.queue[0].arrival_s + self.window_s
        if len(self.queue) < self.max_batch_size and now < closes_s:
            return Decision(wake_s=closes_s)
        return self.take(min(len(self.queue), self.max_batch_size))


class TokenBudget(Fifo):
    """Runs the oldest requests, as many as fit into `max_tokens` after padding, without waiting.

    As text-embeddings-inference does (`core/src/queue.rs`), with padding counted, as for models that pad.
    """

    def __init__(self, max_tokens: int, max_batch_size: int = 32) -> None:
        super().__init__()
        self.max_tokens = max_tokens
        self.max_batch_size = max_batch_size

    def decide(self, now: float) -> Decision[IndexedRequest]:  # noqa: ARG002  # this rule needs no clock
        """Run the requests that fit; the oldest one runs even if it exceeds the budget alone."""
        count = longest = 0
        for request in self.queue:
            longest = max(longest, request.size)
            if count == self.max_batch_size or (count and (count + 1) * longest > self.max_tokens):
                break
            count += 1
        return self.take(count) if count else Decision()


class SortedFifo(Fifo):
    """Takes the oldest requests, up to `batches` full batches of them, sorts those by size and cuts them into batches.

    Runs these, smallest sizes first, before it looks at the queue again; waits for nothing. With a short queue that is
    one batch in arrival order.
    """

    def __init__(self, max_batch_size: int = 32, batches: int = 8) -> None:
        super().__init__()
        self.batches = batches
        self.max_batch_size = max_batch_size
        self._cut: deque[list[IndexedRequest]] = deque()

    def decide(self, now: float) -> Decision[IndexedRequest]:  # noqa: ARG002  # this rule needs no clock
        """Run the next batch of those that are cut, or cut new ones."""
        if not self._cut and self.queue:
            count = min(len(self.queue), self.batches * self.max_batch_size)
            taken = sorted((self.queue.popleft() for _ in range(count)), key=lambda request: request.size)
            for start in range(0, count, self.max_batch_size):
                self._cut.append(taken[start : start + self.max_batch_size])
        return Decision(as_batch(self._cut.popleft())) if self._cut else Decision()
