"""Decides which requests run together and when: pure functions of the queue, the predicted costs and the time."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Generic

from batching.cost import CostModel
from batching.queue import RequestQueue, RequestT, size_bucket
from batching.request import Priority


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchPolicy:
    """The limits that every batch and the queue keep. Times are in seconds.

    `max_batch_tokens` counts a batch as it is padded: the number of requests times the largest size. `max_batch_s` is
    the predicted time of a batch; a single request may exceed it, because it has to run some time. `max_wait_s` is how
    long an idle worker may hold a request back to fill its batch. A request older than `max_age_s` is overdue: no later
    one of its class runs before it except in its own batch. `bulk_share` is the part of the running time that bulk
    requests get while interactive ones wait as well.

    Raises `ValueError` for a limit out of range.
    """

    max_batch_size: int = 32
    max_batch_tokens: int | None = None
    max_batch_s: float | None = None
    max_wait_s: float = 0.0
    max_queue_items: int = 10_000
    max_age_s: float = 2.0
    bulk_share: float = 0.1

    def __post_init__(self) -> None:
        self._require("max_batch_size", self.max_batch_size >= 1, "at least 1")
        self._require("max_batch_tokens", self.max_batch_tokens is None or self.max_batch_tokens >= 1, "at least 1")
        self._require("max_batch_s", self.max_batch_s is None or self.max_batch_s > 0, "positive")
        self._require("max_wait_s", 0 <= self.max_wait_s < math.inf, "a finite time, 0 or more")
        self._require("max_queue_items", self.max_queue_items >= 1, "at least 1")
        self._require("max_age_s", self.max_age_s >= 0, "0 or more")
        self._require("bulk_share", 0 <= self.bulk_share < 1, "from 0 to below 1")

    def _require(self, name: str, holds: bool, expectation: str) -> None:
        if not holds:
            raise ValueError(f"{name} must be {expectation}, got {getattr(self, name)!r}")

    def allows(self, count: int, longest: int, predicted_s: float) -> bool:
        """Whether a batch of `count` requests, the largest of size `longest`, keeps the limits."""
        return (
            count <= self.max_batch_size
            and (self.max_batch_tokens is None or count * longest <= self.max_batch_tokens)
            and (self.max_batch_s is None or predicted_s <= self.max_batch_s)
        )


@dataclass(frozen=True, slots=True)
class Batch(Generic[RequestT]):
    """Requests of one class that run together, the oldest first."""

    requests: list[RequestT]
    priority: Priority
    contended: bool
    """Whether requests of the other class waited when it was formed."""


@dataclass(frozen=True, slots=True)
class Decision(Generic[RequestT]):
    """What to do now: run `batch`, or ask again at `wake_s` (or when something arrives).

    `expired` are requests whose deadline passed in the queue; they have left it and must be told so.
    """

    batch: Batch[RequestT] | None = None
    wake_s: float = math.inf
    expired: list[RequestT] = field(default_factory=list)


class BatchPlanner(Generic[RequestT]):
    """Forms batches out of a queue, under a policy, by predicted cost.

    A batch is formed around the oldest request of its class, which keeps more than `max_age_s` asks for. Companions
    are taken from the nearest sizes, as long as each raises the requests' total size that the batch does per predicted
    second: where a batch's fixed cost is small, padding soon costs more than a companion saves and batches stay small
    and even; where it is large, they grow to the limits.

    Sans-I/O: `now` is an argument, nothing waits, and a decision takes effect at once.
    """

    def __init__(self, policy: BatchPolicy, cost_model: CostModel) -> None:
        self.policy = policy
        self.cost_model = cost_model
        self.queue: RequestQueue[RequestT] = RequestQueue(policy.max_queue_items)
        # While both classes wait, bulk is owed `bulk_share` of the running time. What it is owed in seconds, negative
        # when it has had more; kept only until the bulk queue is empty, so that nothing is hoarded.
        self._owed_to_bulk_s = 0.0
        self._bulk_in_flight = 0

    def decide(self, now: float, *, draining: bool = False) -> Decision[RequestT]:
        """Take the next batch out of the queue, or say when to ask again; a worker must be free to run the batch.

        While `draining`, nothing more is expected to arrive, so nothing is waited for.
        """
        expired = self.queue.pop_expired(now)
        wake_s = math.inf
        for priority in self._priorities_in_order():
            anchor = self.queue.oldest(priority)
            if anchor is None:
                continue
            wait_until_s = anchor.arrival_s + min(self.policy.max_wait_s, self.policy.max_age_s)
            if draining or now >= wait_until_s or self._can_fill_a_batch(priority):
                return Decision(self._take_batch(anchor), expired=expired)
            wake_s = min(wake_s, wait_until_s)
        return Decision(wake_s=wake_s, expired=expired)

    def batch_finished(self, batch: Batch[RequestT], elapsed_s: float) -> None:
        """Account for a batch that `decide` gave out and that ran for `elapsed_s` seconds, successfully or not."""
        is_bulk = batch.priority is Priority.BULK
        self._bulk_in_flight -= is_bulk
        if batch.contended:
            self._owed_to_bulk_s += elapsed_s * (self.policy.bulk_share - is_bulk)

    def _priorities_in_order(self) -> tuple[Priority, Priority]:
        if not self.queue.waiting(Priority.BULK):
            self._owed_to_bulk_s = 0.0
        if self._owed_to_bulk_s > 0 and not self._bulk_in_flight:
            return Priority.BULK, Priority.INTERACTIVE
        return Priority.INTERACTIVE, Priority.BULK

    def _can_fill_a_batch(self, priority: Priority) -> bool:
        tokens = self.policy.max_batch_tokens
        return self.queue.waiting(priority) >= self.policy.max_batch_size or (
            tokens is not None and self.queue.waiting_size(priority) >= tokens
        )

    def _take_batch(self, anchor: RequestT) -> Batch[RequestT]:
        requests = self._with_companions(anchor)
        for request in requests:
            self.queue.discard(request)
        is_bulk = anchor.priority is Priority.BULK
        self._bulk_in_flight += is_bulk
        other = Priority.INTERACTIVE if is_bulk else Priority.BULK
        return Batch(requests, anchor.priority, contended=self.queue.waiting(other) > 0)

    def _with_companions(self, anchor: RequestT) -> list[RequestT]:
        """Grow a batch around `anchor`, one request at a time, from whichever side of its sizes serves better."""
        requests, longest, total = [anchor], anchor.size, anchor.size
        best_s_per_size = self.cost_model.predict_s(1, longest, total) / total
        smaller, larger = self._neighbours(anchor)
        candidates = [next(smaller, None), next(larger, None)]
        while True:
            chosen = None
            for side, candidate in enumerate(candidates):
                if candidate is None:
                    continue
                new_longest = max(longest, candidate.size)
                new_total = total + candidate.size
                predicted_s = self.cost_model.predict_s(len(requests) + 1, new_longest, new_total)
                if predicted_s / new_total <= best_s_per_size and self.policy.allows(
                    len(requests) + 1, new_longest, predicted_s
                ):
                    best_s_per_size = predicted_s / new_total
                    chosen = side, candidate
            if chosen is None:
                return requests
            side, candidate = chosen
            requests.append(candidate)
            longest = max(longest, candidate.size)
            total += candidate.size
            candidates[side] = next((smaller, larger)[side], None)

    def _neighbours(self, anchor: RequestT) -> tuple[Iterator[RequestT], Iterator[RequestT]]:
        """The other requests of the anchor's class from its own size downwards, and from the next size upwards."""
        priority, middle = anchor.priority, size_bucket(anchor.size)
        indices = self.queue.bucket_indices(priority)
        own_and_smaller = [index for index in reversed(indices) if index <= middle]
        larger = [index for index in indices if index > middle]
        return (
            (r for index in own_and_smaller for r in self.queue.bucket(priority, index) if r is not anchor),
            (r for index in larger for r in self.queue.bucket(priority, index)),
        )
