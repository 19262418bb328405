"""Chooses the companions of a request: which of those that wait run with it in one batch."""

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import accumulate, takewhile
from operator import attrgetter
from typing import Generic

from modalkit.batching.ceiling import Ceiling
from modalkit.batching.cost import CostModel
from modalkit.batching.measured_cost import MeasuredCostModel
from modalkit.batching.policy import Batch, BatchPolicy, DispatchReason
from modalkit.batching.queue import RequestQueue, RequestT, size_bucket
from modalkit.batching.request import Priority

EXACT_UP_TO = 32  # waiting requests, the best of all partitions is found: a tenth of a millisecond for 16, half for 32
EVEN = 1 + 1e-9  # where requests only add up, rounding must not decide whether they may run together
FIRST_COUNT = 8  # most requests in a batch before anything was measured
COUNT_STEP = 4  # times the most that ever ran together, at most
ALIKE_BELOW = 16  # the smaller sizes are, the more they may differ
SIMILAR = 1.5  # sizes that differ by no more from the anchor's go together where no cost is trusted


class BatchFormer(Generic[RequestT]):
    """Forms a batch around a request, its anchor, out of the requests of its class that wait in `queue`.

    While few wait, it is the one that the anchor is in when all are cut into the batches that take the least time. Of
    many, companions are taken from the nearest sizes, as long as each lowers (or keeps) the predicted seconds per unit
    of size. Where a batch's fixed cost is small, padding soon costs more than a companion saves and batches stay small
    and even; where it is large, they grow to the limits.

    A `MeasuredCostModel` may be wrong. While it is not trusted, batches are full ones of similar sizes: seldom the
    best, never far off. And no batch holds more than four times as many requests as ever ran together.

    Nothing here changes the queue.
    """

    def __init__(
        self, policy: BatchPolicy, cost_model: CostModel, queue: RequestQueue[RequestT], ceiling: Ceiling
    ) -> None:
        self.policy = policy
        self.cost_model = cost_model
        self.queue = queue
        self.ceiling = ceiling
        self.count_limit: int | None = None
        """Most requests in a batch for now, beside `max_batch_size`: while many fail, small batches lose less."""
        self._learnt = cost_model if isinstance(cost_model, MeasuredCostModel) else None

    @property
    def most(self) -> int:
        """Most requests in a batch for now: what was never tried is approached in steps."""
        most = self.policy.max_batch_size
        if self.count_limit is not None:
            most = min(most, self.count_limit)
        if self._learnt is not None:
            most = min(most, max(FIRST_COUNT, COUNT_STEP * self._learnt.largest_count))
        return most

    @property
    def is_trusted(self) -> bool:
        """Whether batches may be formed by what they are predicted to cost."""
        return self._learnt is None or self._learnt.is_trusted

    def form(self, anchor: RequestT) -> Batch[RequestT]:
        """The batch around `anchor`."""
        if not self.is_trusted:
            return self.fill(anchor)
        if 1 < self.queue.waiting(anchor.priority) <= EXACT_UP_TO:
            return self._with_the_rest(self._cut_out_batch(anchor))
        return self._with_the_rest(self._grow_batch(anchor))

    def shorten(self, batch: Batch[RequestT], longest_s: float) -> Batch[RequestT]:
        """The anchor with as many of its companions, the nearest first, as `longest_s` allows."""
        anchor, *others = batch.requests
        by_nearness = [anchor, *sorted(others, key=lambda request: abs(request.size - anchor.size))]
        count = len(by_nearness)
        while count > 1 and batch.predicted_s > longest_s:
            count = max(1, min(count - 1, int(count * longest_s / batch.predicted_s)))
            requests = by_nearness[:count]
            longest, total = max(request.size for request in requests), sum(request.size for request in requests)
            seconds = self.cost_model.predict_s(count, longest, total)
            batch = replace(batch, requests=requests, longest=longest, total=total, predicted_s=seconds)
        return batch

    def with_companions(self, batch: Batch[RequestT], priority: Priority, longest_s: float) -> Batch[RequestT]:
        """The batch with requests of another class that come nearly free, while it takes no longer than `longest_s`.

        Each run of them adds at most what it would take in batches of its own.
        """
        room, own = self.most - len(batch.requests), size_bucket(batch.longest)
        for index in [index for index in reversed(self.queue.bucket_indices(priority)) if index <= own]:
            if room <= 0:
                break
            run = [request for request in self.queue.front(priority, index, room) if request.size <= batch.longest]
            added, alone_s = len(run), self._own_s(run[0].size) if run else 0.0
            while added:
                count, total = len(batch.requests) + added, batch.total + sum(request.size for request in run[:added])
                seconds = self.cost_model.predict_s(count, batch.longest, total)
                is_short = seconds <= longest_s and self.is_allowed(count, batch.longest, seconds)
                if is_short and seconds - batch.predicted_s <= added * alone_s * EVEN:
                    batch = replace(batch, requests=batch.requests + run[:added], total=total, predicted_s=seconds)
                    room -= added
                    break
                added //= 2
            if run and not added:
                break  # smaller ones are padded even more
        return batch

    def _own_s(self, size: int) -> float:
        """Seconds of a request of this size in the best batch of its equals."""
        seconds = self.cost_model.predict_s
        return min(seconds(count, size, count * size) / count for count in _powers_of_two(self.most))

    def fill(self, anchor: RequestT) -> Batch[RequestT]:
        """The anchor with those of the most similar sizes, as many as the limits allow: seldom best, never far off."""
        most, requests, longest, total = self.most, [anchor], anchor.size, anchor.size
        sides = self._neighbours(anchor, most - 1)
        reason, was_refused = DispatchReason.FULL, False
        while len(requests) < most:
            runs = [(side, side.sizes(most - len(requests))) for side in sides]
            near = sorted((abs(math.log(sizes[0] / anchor.size)), i) for i, (_, sizes) in enumerate(runs) if sizes)
            for _, i in near:
                side, sizes = runs[i]
                sizes = list(takewhile(partial(_are_similar, anchor.size), sizes))
                added = self._allowed(len(requests), longest, total, sizes)
                was_refused = was_refused or bool(sizes and not added)
                if added:
                    requests += side.take(added)
                    longest, total = max(longest, *sizes[:added]), total + sum(sizes[:added])
                    break
            else:
                reason = DispatchReason.BUDGET if was_refused else DispatchReason.IDLE
                break
        batch_s = self.cost_model.predict_s(len(requests), longest, total)
        return Batch(requests, anchor.priority, reason, longest, total, batch_s)

    def _allowed(self, count: int, longest: int, total: int, sizes: list[int]) -> int:
        """How many of these requests may join a batch, in their order: all, half of them, and so on."""
        added = len(sizes)
        while added:
            new_longest, new_total = max(longest, *sizes[:added]), total + sum(sizes[:added])
            predicted_s = self.cost_model.predict_s(count + added, new_longest, new_total)
            if self.is_allowed(count + added, new_longest, predicted_s):
                return added
            added //= 2
        return 0

    def _cut_out_batch(self, anchor: RequestT) -> Batch[RequestT]:
        """The batch with `anchor` in the partition of all waiting requests that takes the least time altogether.

        Of requests in order of size a batch is always a run: the least time for the first i is, over the number n of
        the last batch, that for the first i - n and this batch.
        """
        # The anchor behind its equals: where they make a full batch and a rest, it is in the full one.
        by_size = sorted([*self.queue.all_but([anchor]), anchor], key=attrgetter("size"))
        totals = list(accumulate((request.size for request in by_size), initial=0))
        most, least_s, starts, seconds = self.most, [0.0], [0], [0.0]
        for end, largest in enumerate(by_size, start=1):
            best_s, best_start, best_batch_s = math.inf, end - 1, 0.0
            for start in range(end - 1, max(-1, end - most - 1), -1):
                count = end - start
                batch_s = self.cost_model.predict_s(count, largest.size, totals[end] - totals[start])
                if count > 1 and not self.is_allowed(count, largest.size, batch_s):
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
        if count >= self.most:
            return DispatchReason.FULL
        one_more_s = self.cost_model.predict_s(count + 1, longest, total + longest)
        has_room = self.is_allowed(count + 1, longest, one_more_s)
        return DispatchReason.IDLE if has_room or count == waiting else DispatchReason.BUDGET

    def _grow_batch(self, anchor: RequestT) -> Batch[RequestT]:
        """Grow a batch around `anchor` by runs of neighbours, from whichever side of its sizes serves better."""
        max_size = self.most
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
        """All waiting requests of the class, if that makes the sum of their latencies shorter than two batches do.

        It keeps a few requests of odd sizes from waiting for a batch of their own while the queue is short.
        """
        count, priority = len(batch.requests), batch.priority
        waiting, total = self.queue.waiting(priority), self.queue.waiting_size(priority)
        if batch.reason is not DispatchReason.IDLE or not count < waiting <= self.most:
            return batch
        rest = self.queue.all_but(batch.requests)
        longest_of_rest = max(request.size for request in rest)
        longest = max(batch.longest, longest_of_rest)
        together_s = self.cost_model.predict_s(waiting, longest, total)
        second_s = self.cost_model.predict_s(waiting - count, longest_of_rest, total - batch.total)
        if not self.is_allowed(waiting, longest, together_s):
            return batch
        if waiting * together_s > waiting * batch.predicted_s + (waiting - count) * second_s:
            return batch
        return Batch([*batch.requests, *rest], priority, batch.reason, longest, total, together_s)

    def is_allowed(self, count: int, longest: int, predicted_s: float) -> bool:
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
        room = self.most - count
        best, best_s_per_size, over_budget = None, batch_s / total * EVEN, False
        for side in sides:
            sizes = side.sizes(room)
            added, of_more = len(sizes), math.inf
            while added:
                run = sizes[:added]
                new_longest, new_total = max(longest, *run), total + sum(run)
                predicted_s = predict_s(count + added, new_longest, new_total)
                s_per_size = predicted_s / new_total
                if not self.is_allowed(count + added, new_longest, predicted_s):
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


def _are_similar(one: int, other: int) -> bool:
    smaller, larger = sorted((one, other))
    return larger + ALIKE_BELOW <= SIMILAR * (smaller + ALIKE_BELOW)


def _powers_of_two(last: int) -> list[int]:
    """1, 2, 4 and so on below `last`, and `last`."""
    return [*(1 << i for i in range((last - 1).bit_length())), last]


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
