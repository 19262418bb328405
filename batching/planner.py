"""Decides which requests run together and when: pure functions of the queue, the predicted costs and the time."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Generic

from modalkit.batching.arrivals import Arrivals
from modalkit.batching.bulk_length import BulkLength
from modalkit.batching.ceiling import Ceiling
from modalkit.batching.cost import CostModel
from modalkit.batching.exploration import Exploration
from modalkit.batching.forming import BatchFormer
from modalkit.batching.policy import Batch, BatchPolicy, Decision, DispatchReason
from modalkit.batching.queue import RequestQueue, RequestT
from modalkit.batching.request import Priority

COMPANIONS_SHARE = 0.8  # bulk companions may make an interactive batch this share of the longest bulk batch
NEARLY_FREE_FACTOR = 1.1  # or, if that is longer, this many times what the batch takes without them
INTERACTIVE = Priority.INTERACTIVE  # looked up for each request: once is quicker
INTERACTIVE_RECENT_S = 2.0  # bulk batches stay short for this time after an interactive request


class BatchPlanner(Generic[RequestT]):
    """Forms batches out of a queue, under a policy, by predicted cost; see `BatchFormer` for how.

    A batch is formed around the oldest request of its class, which keeps more than `max_age_s` asks for. Interactive
    requests go before bulk ones, which keep `bulk_share` of the running time and come along in interactive batches
    where they are nearly free. While interactive requests arrive, bulk batches are as short as they can be at hardly
    more cost, because the next interactive request waits for the one that runs.

    Sans-I/O: `now` is an argument, nothing waits, and a decision takes effect at once.
    """

    def __init__(self, policy: BatchPolicy, cost_model: CostModel) -> None:
        self.policy = policy
        self.cost_model = cost_model
        self.queue: RequestQueue[RequestT] = RequestQueue(policy.max_queue_items)
        self.ceiling = Ceiling()
        self.former = BatchFormer(policy, cost_model, self.queue, self.ceiling)
        self._exploration = Exploration()
        self._bulk_length = BulkLength(policy.max_bulk_batch_s)
        self._last_interactive_s = -math.inf
        self._arrivals = {priority: Arrivals() for priority in Priority}
        # While both classes wait, bulk is owed `bulk_share` of the running time. What it is owed in seconds, negative
        # when it has had more. What it is owed is forgotten once its queue is empty, so that nothing is hoarded.
        self._owed_to_bulk_s = 0.0
        self._bulk_in_flight = 0

    @property
    def largest_count(self) -> int:
        """The number of requests that makes a batch full for now."""
        return self.former.most

    def push(self, request: RequestT) -> None:
        """Add a request that does not wait yet; raises `QueueFullError` when there is no room."""
        self.push_all((request,))

    def push_all(self, requests: Sequence[RequestT]) -> None:
        """Add requests that do not wait yet, all or, with `QueueFullError`, none of them."""
        self.queue.push_all(requests)
        if requests and requests[-1].priority is INTERACTIVE:
            self._last_interactive_s = requests[-1].arrival_s
        if self.policy.max_wait_s:
            for request in requests:
                self._arrivals[request.priority].add(request.size, request.arrival_s)

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
            batch = self._form_batch(anchor, now)
            if batch.reason is DispatchReason.IDLE:
                reason, batch_wake_s = self._whether_to_go(batch, now)
                # With both classes waiting the worker is not idle: nothing is held back.
                if reason is None and not draining and len(self.queue) == self.queue.waiting(priority):
                    wake_s = min(wake_s, batch_wake_s)
                    continue
                batch = replace(batch, reason=reason or DispatchReason.IDLE)
            return Decision(self._take(batch), expired=expired)
        return Decision(wake_s=wake_s, expired=expired)

    def batch_finished(self, batch: Batch[RequestT], elapsed_s: float, *, succeeded: bool = True) -> None:
        """Account for a batch that `decide` gave out and that ran for `elapsed_s` seconds.

        What one costs is learnt from a batch that `succeeded` as a whole, in one run.
        """
        is_bulk = batch.priority is Priority.BULK
        self._bulk_in_flight -= is_bulk
        if batch.contended:
            owed_s = self._owed_to_bulk_s + elapsed_s * (self.policy.bulk_share - _bulk_part(batch))
            # What interactive batches take along pays what bulk is owed, and is no loan: bulk would wait for hours.
            self._owed_to_bulk_s = owed_s if is_bulk else max(owed_s, min(0.0, self._owed_to_bulk_s))
        if batch.otherwise_s is None:
            self._exploration.batch_finished(elapsed_s)
        else:
            self._exploration.try_finished(elapsed_s - batch.otherwise_s)
        if succeeded:
            self.run_succeeded([request.size for request in batch.requests], elapsed_s)

    def run_succeeded(self, sizes: Sequence[int], elapsed_s: float) -> None:
        """Learn that requests of these `sizes` ran together, without an error, for `elapsed_s` seconds."""
        count, longest = len(sizes), max(sizes)
        self.cost_model.observe(count, longest, sum(sizes), elapsed_s)
        self.ceiling.fitted(count * longest)

    def put_back(self, requests: Sequence[RequestT]) -> None:
        """Let requests of a batch that `decide` gave out wait again, in their old places in the order of arrival."""
        self.queue.put_back(requests)

    def batch_yielded(self, batch: Batch[RequestT], requests: Sequence[RequestT]) -> None:
        """Account for a batch that did not run; these `requests` of it wait again."""
        self._bulk_in_flight -= batch.priority is Priority.BULK
        self.put_back(requests)

    def prefers_interactive_to(self, batch: Batch[RequestT]) -> bool:
        """Whether a batch that has only been prepared should wait again: interactive requests came meanwhile."""
        return (
            batch.priority is Priority.BULK
            and self.queue.waiting(Priority.INTERACTIVE) > 0
            and self._owed_to_bulk_s <= 0
        )

    def too_large(self, sizes: list[int]) -> None:
        """Account for requests of these `sizes` that were too large together for the device."""
        self.ceiling.too_large(len(sizes) * max(sizes))

    # Which class is next.

    def _priorities_in_order(self) -> tuple[Priority, Priority]:
        if not self.queue.waiting(Priority.BULK):
            self._owed_to_bulk_s = min(0.0, self._owed_to_bulk_s)
        if self._owed_to_bulk_s > 0 and not self._bulk_in_flight:
            return Priority.BULK, Priority.INTERACTIVE
        return Priority.INTERACTIVE, Priority.BULK

    # Whether it goes now.

    def _whether_to_go(self, batch: Batch[RequestT], now: float) -> tuple[DispatchReason | None, float]:
        """The reason to send off a batch that has room, or None and the time to ask again.

        Waiting costs each request of the batch the time until the next arrival, and what that one adds to the batch;
        it saves the next one a batch of its own. So it pays, in the sum of all latencies, while the expected gap is
        shorter than ``seconds of a lone request / (requests + 1) - seconds that one more adds``.
        """
        policy, oldest_s = self.policy, batch.requests[0].arrival_s
        if now >= oldest_s + policy.max_age_s:
            return DispatchReason.AGE, now
        if not policy.max_wait_s:
            return DispatchReason.IDLE, now
        if now >= oldest_s + policy.max_wait_s:
            return DispatchReason.AGE, now
        if self.queue.waiting(batch.priority) > len(batch.requests):
            return DispatchReason.IDLE, now  # there is more to do
        arrivals = self._arrivals[batch.priority]
        count, size = len(batch.requests) + 1, max(1, arrivals.mean_size)
        longest, total = max(batch.longest, size), batch.total + size
        with_one_more_s = self.cost_model.predict_s(count, longest, total)
        if count > self.largest_count:
            return DispatchReason.FULL, now
        if not self.former.is_allowed(count, longest, with_one_more_s):
            return DispatchReason.BUDGET, now
        added_s = with_one_more_s - batch.predicted_s
        worth_waiting_s = self.cost_model.predict_s(1, size, size) / count - added_s
        given_up_s = arrivals.last_s + worth_waiting_s
        if arrivals.gap_s >= worth_waiting_s or now >= given_up_s:
            return DispatchReason.IDLE, now
        latest_s = min(request.deadline_s for request in batch.requests) - batch.predicted_s
        if now >= latest_s:
            return DispatchReason.DEADLINE, now
        return None, min(oldest_s + policy.max_wait_s, oldest_s + policy.max_age_s, given_up_s, latest_s)

    # What goes.

    def _form_batch(self, anchor: RequestT, now: float) -> Batch[RequestT]:
        is_bulk = anchor.priority is Priority.BULK
        batch = self.former.form(anchor)
        if not self.former.is_trusted:
            return batch  # by what is not trusted, no batch is shortened, lengthened or tried
        if is_bulk and now <= self._last_interactive_s + INTERACTIVE_RECENT_S:
            return self._shortened(batch)
        if is_bulk or not (self.policy.mixes_classes and self.queue.waiting(Priority.BULK)):
            return self._full_batch_if_due(batch)
        self._measure_bulk()
        left = self.queue.waiting(Priority.INTERACTIVE) - len(batch.requests)
        longest_s = max(
            COMPANIONS_SHARE * self._bulk_length.seconds / math.sqrt(1 + left), NEARLY_FREE_FACTOR * batch.predicted_s
        )
        return self.former.with_companions(batch, Priority.BULK, longest_s)

    def _measure_bulk(self) -> None:
        """Keep to the length of bulk batches while none of them runs, because interactive ones take them along."""
        oldest = self.queue.oldest(Priority.BULK)
        if oldest is not None and self._bulk_length.should_measure():
            self._shortened(self.former.form(oldest))

    def _shortened(self, batch: Batch[RequestT]) -> Batch[RequestT]:
        short = self.former.shorten(batch, self._bulk_length.seconds)
        self._bulk_length.add(batch, short)
        return short

    def _full_batch_if_due(self, batch: Batch[RequestT]) -> Batch[RequestT]:
        """In place of the batch now and then a full one, to see whether that is as bad as it is predicted to be."""
        most = self.former.most
        if 2 * len(batch.requests) > most or self.queue.waiting(batch.priority) < most:
            return batch
        full = self.former.fill(batch.requests[0])
        otherwise_s = batch.predicted_s / batch.total * full.total
        loss_s = full.predicted_s - otherwise_s
        is_bearable = batch.priority is Priority.BULK or loss_s <= batch.predicted_s
        if 2 * len(full.requests) > most and is_bearable and self._exploration.is_due(loss_s):
            return replace(full, otherwise_s=otherwise_s)
        return batch

    def _take(self, batch: Batch[RequestT]) -> Batch[RequestT]:
        self.queue.take(batch.requests)
        is_bulk = batch.priority is Priority.BULK
        self._bulk_in_flight += is_bulk
        other = Priority.INTERACTIVE if is_bulk else Priority.BULK
        return replace(batch, contended=True) if self.queue.waiting(other) else batch


def _bulk_part(batch: Batch[RequestT]) -> float:
    """The part of a batch, by size, that is of the bulk class."""
    return sum(request.size for request in batch.requests if request.priority is Priority.BULK) / batch.total
