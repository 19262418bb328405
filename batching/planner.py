"""Decides which requests run together and when: pure functions of the queue, the predicted costs and the time."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate
from operator import attrgetter
from typing import Generic

from batching.arrivals import Arrivals
from batching.ceiling import Ceiling
from batching.cost import CostModel
from batching.policy import Batch, BatchPolicy, Decision, DispatchReason
from batching.queue import RequestQueue, RequestT, size_bucket
from batching.request import Priority

EXACT_UP_TO = 32  # waiting requests, the best of all partitions is found: a tenth of a millisecond for 16, half for 32
EVEN = 1 + 1e-9  # where requests only add up, rounding must not decide whether they may run together


class BatchPlanner(Generic[RequestT]):
    """Forms batches out of a queue, under a policy, by predicted cost.

    A batch is formed around the oldest request of its class, which keeps more than `max_age_s` asks for. While few
    wait, it is the one that the oldest is in when all are cut into the batches that take the least time. Of many,
    companions are taken from the nearest sizes, as long as each lowers (or keeps) the predicted seconds per unit of
    size. Where a batch's fixed cost is small, padding soon costs more than a companion saves and batches stay small and
    even; where it is large, they grow to the limits.

    Sans-I/O: `now` is an argument, nothing waits, and a decision takes effect at once.
    """

    def __init__(self, policy: BatchPolicy, cost_model: CostModel) -> None:
        self.policy = policy
        self.cost_model = cost_model
        self.queue: RequestQueue[RequestT] = RequestQueue(policy.max_queue_items)
        self.ceiling = Ceiling()
        self.count_limit: int | None = None
        """Most requests in a batch for now, beside `max_batch_size`: while many fail, small batches lose less."""
        self._arrivals = {priority: Arrivals() for priority in Priority}
        # While both classes wait, bulk is owed `bulk_share` of the running time. What it is owed in seconds, negative
        # when it has had more. What it is owed is forgotten once its queue is empty, so that nothing is hoarded.
        self._owed_to_bulk_s = 0.0
        self._bulk_in_flight = 0

    @property
    def largest_count(self) -> int:
        """The number of requests that makes a batch full for now."""
        most = self.policy.max_batch_size
        return most if self.count_limit is None else min(most, self.count_limit)

    def push(self, request: RequestT) -> None:
        """Add a request that does not wait yet; raises `QueueFullError` when there is no room."""
        self.push_all((request,))

    def push_all(self, requests: Sequence[RequestT]) -> None:
        """Add requests that do not wait yet, all or, with `QueueFullError`, none of them."""
        self.queue.push_all(requests)
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
            batch = self._with_the_rest(self._form_batch(anchor))
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
            self._owed_to_bulk_s += elapsed_s * (self.policy.bulk_share - is_bulk)
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
        if not self._is_allowed(count, longest, with_one_more_s):
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

    def _take(self, batch: Batch[RequestT]) -> Batch[RequestT]:
        self.queue.take(batch.requests)
        is_bulk = batch.priority is Priority.BULK
        self._bulk_in_flight += is_bulk
        other = Priority.INTERACTIVE if is_bulk else Priority.BULK
        return replace(batch, contended=True) if self.queue.waiting(other) else batch

    def _form_batch(self, anchor: RequestT) -> Batch[RequestT]:
        if 1 < self.queue.waiting(anchor.priority) <= EXACT_UP_TO:
            return self._cut_out_batch(anchor)
        return self._grow_batch(anchor)

    def _cut_out_batch(self, anchor: RequestT) -> Batch[RequestT]:
        """The batch with `anchor` in the partition of all waiting requests that takes the least time altogether.

        Of requests in order of size a batch is always a run: the least time for the first i is, over the number n of
        the last batch, that for the first i - n and this batch.
        """
        # The anchor behind its equals: where they make a full batch and a rest, it is in the full one.
        by_size = sorted([*self.queue.all_but([anchor]), anchor], key=attrgetter("size"))
        totals = list(accumulate((request.size for request in by_size), initial=0))
        least_s, starts, seconds = [0.0], [0], [0.0]
        most = self.largest_count
        for end, largest in enumerate(by_size, start=1):
            best_s, best_start, best_batch_s = math.inf, end - 1, 0.0
            for start in range(end - 1, max(-1, end - most - 1), -1):
                count = end - start
                batch_s = self.cost_model.predict_s(count, largest.size, totals[end] - totals[start])
                if count > 1 and not self._is_allowed(count, largest.size, batch_s):
                    break
                if least_s[start] + batch_s <= best_s * EVEN:
                    best_s, best_start, best_batch_s = least_s[start] + batch_s, start, batch_s
            least_s.append(best_s)
            starts.append(best_start)
            seconds.append(best_batch_s)
        place, end = next(i for i, request in enumerate(by_size) if request is anchor), len(by_size)
        while starts[end] > place:
            end = starts[end]
        start, longest = starts[end], by_size[end - 1].size
        requests = [anchor, *(request for request in by_size[start:end] if request is not anchor)]
        total = totals[end] - totals[start]
        reason = self._reason(len(requests), longest, total, len(by_size))
        return Batch(requests, anchor.priority, reason, longest, total, seconds[end])

    def _reason(self, count: int, longest: int, total: int, waiting: int) -> DispatchReason:
        if count == self.largest_count:
            return DispatchReason.FULL
        one_more_s = self.cost_model.predict_s(count + 1, longest, total + longest)
        has_room = self._is_allowed(count + 1, longest, one_more_s)
        return DispatchReason.IDLE if has_room or count == waiting else DispatchReason.BUDGET

    def _grow_batch(self, anchor: RequestT) -> Batch[RequestT]:
        """Grow a batch around `anchor` by runs of neighbours, from whichever side of its sizes serves better."""
        max_size = self.largest_count
        requests, longest, total = [anchor], anchor.size, anchor.size
        batch_s = self.cost_model.predict_s(1, longest, total)
        sides = self._neighbours(anchor, max_size - 1)
        while len(requests) < max_size:
            grown, over_budget = self._best_growth(sides, len(requests), longest, total, batch_s)
            if grown is None:
                reason = DispatchReason.BUDGET if over_budget else DispatchReason.IDLE
                return Batch(requests, anchor.priority, reason, longest, total, batch_s)
            side, added, longest, total, batch_s = grown
            requests += side.take(added)
        return Batch(requests, anchor.priority, DispatchReason.FULL, longest, total, batch_s)

    def _with_the_rest(self, batch: Batch[RequestT]) -> Batch[RequestT]:
        """Everyone of the class that waits, where the sum of their latencies is shorter like that than in two batches.

        It keeps a few requests of odd sizes from waiting for a batch of their own while the queue is short.
        """
        count, priority = len(batch.requests), batch.priority
        waiting, total = self.queue.waiting(priority), self.queue.waiting_size(priority)
        if batch.reason is not DispatchReason.IDLE or not count < waiting <= self.largest_count:
            return batch
        rest = self.queue.all_but(batch.requests)
        longest_of_rest = max(request.size for request in rest)
        longest = max(batch.longest, longest_of_rest)
        together_s = self.cost_model.predict_s(waiting, longest, total)
        second_s = self.cost_model.predict_s(waiting - count, longest_of_rest, total - batch.total)
        if not self._is_allowed(waiting, longest, together_s):
            return batch
        if waiting * together_s > waiting * batch.predicted_s + (waiting - count) * second_s:
            return batch
        return Batch([*batch.requests, *rest], priority, batch.reason, longest, total, together_s)

    def _is_allowed(self, count: int, longest: int, predicted_s: float) -> bool:
        """Whether a batch of several requests keeps the limits but that of their number."""
        policy, tokens = self.policy, count * longest
        return (
            (policy.max_batch_tokens is None or tokens <= policy.max_batch_tokens)
            and (policy.max_batch_s is None or predicted_s <= policy.max_batch_s)
            and tokens <= self.ceiling.tokens
        )

    def _best_growth(
        self, sides: "tuple[_Neighbours[RequestT], ...]", count: int, longest: int, total: int, batch_s: float
    ) -> "tuple[tuple[_Neighbours[RequestT], int, int, int, float] | None, bool]":
        """The run of requests of one side that lowers the seconds per size most, and the batch it makes.

        Tries all that there are on a side, half of them, and so on, for as long as fewer are better: a batch costs at
        least in proportion to what is in it, so once fewer are worse, even fewer are worse still.

        None when every run would raise the seconds or exceed a limit; the second value tells whether one did that.
        """
        predict_s = self.cost_model.predict_s
        room = self.largest_count - count
        best, best_s_per_size, over_budget = None, batch_s / total * EVEN, False
        for side in sides:
            sizes = side.sizes(room)
            added, of_more = len(sizes), math.inf
            while added:
                run = sizes[:added]
                new_longest, new_total = max(longest, *run), total + sum(run)
                predicted_s = predict_s(count + added, new_longest, new_total)
                s_per_size = predicted_s / new_total
                if not self._is_allowed(count + added, new_longest, predicted_s):
                    over_budget = over_budget or s_per_size <= best_s_per_size
                elif s_per_size * EVEN >= of_more:
                    break
                else:
                    of_more = s_per_size
                    if s_per_size <= best_s_per_size:
                        best, best_s_per_size = (side, added, new_longest, new_total, predicted_s), s_per_size
                added //= 2
        return best, over_budget

    def _neighbours(self, anchor: RequestT, most: int) -> "tuple[_Neighbours[RequestT], _Neighbours[RequestT]]":
        """The waiting requests of the anchor's class, nearest sizes first: those smaller, and those larger.

        Those of its own bucket count as smaller; within a bucket they come in the order of their arrival.
        """
        own = size_bucket(anchor.size)
        indices = self.queue.bucket_indices(anchor.priority)

        def runs(buckets: list[int]) -> Iterator[list[RequestT]]:
            for index in buckets:
                run = self.queue.front(anchor.priority, index, most + 1)
                if index == own:
                    run.remove(anchor)
                yield run

        smaller = [index for index in reversed(indices) if index <= own]
        return _Neighbours(runs(smaller)), _Neighbours(runs(indices[len(smaller) :]))


class _Neighbours(Generic[RequestT]):
    """Requests of ever more different sizes, in runs: those of one bucket at a time."""

    __slots__ = ("_run", "_runs", "_sizes")

    def __init__(self, runs: Iterator[list[RequestT]]) -> None:
        self._runs = runs
        self._run: list[RequestT] = []
        self._sizes: list[int] = []

    def sizes(self, most: int) -> list[int]:
        """The sizes of the next, `most` at most, of one run; empty when there are none at all."""
        while not self._run:
            run = next(self._runs, None)
            if run is None:
                return []
            self._run, self._sizes = run, [request.size for request in run]
        return self._sizes[:most]

    def take(self, count: int) -> list[RequestT]:
        """The next `count` of the run, which are then gone."""
        taken = self._run[:count]
        del self._run[:count], self._sizes[:count]
        return taken
