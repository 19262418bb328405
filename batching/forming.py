"""Chooses the companions of an anchor: the waiting requests that run with it in one batch."""

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import accumulate
from operator import attrgetter
from typing import Generic

from modalkit.batching.adaptive import TokenLimit
from modalkit.batching.cost import CostModel
from modalkit.batching.measured_cost import MeasuredCostModel
from modalkit.batching.policy import Batch, BatchPolicy, DispatchReason
from modalkit.batching.queue import RequestQueue, RequestT, size_bucket
from modalkit.batching.request import Priority

MAX_PARTITIONED = 32  # waiting requests for which all partitions are compared: 0.1 ms for 16, half a millisecond for 32
ROUNDING = 1e-9  # a smaller difference, of ratios or relative, does not decide whether requests run together
ROUNDING_MARGIN = 1 + ROUNDING
INITIAL_COUNT_LIMIT = 8  # requests in a batch before anything was measured
COUNT_LIMIT_FACTOR = 4  # times the most requests that ever ran together
SIMILARITY_OFFSET = 16  # added to both sizes before they are compared, so that small sizes may differ more
MAX_SIZE_RATIO = 1.5  # to the anchor's size, where no prediction is trusted
OVERHEAD_S = 0.0001  # that the scheduler takes to form and to end a batch, which no measured time has


class BatchFormer(Generic[RequestT]):
    """Forms a batch around an anchor, from the requests of its lane that wait in `queue`.

    While few requests wait, all partitions of them into batches are compared. The batch of the anchor in the partition
    that takes the least time is chosen. If many wait, companions come from the nearest sizes, as long as they lower (or
    keep) the ratio of the batch's seconds to what its requests would take in the best batches of their own sizes. (The
    queue knows that by the costs of the first device, at its last refresh, whatever the limits.) If a batch has a small
    fixed cost, padding soon costs more than a companion saves, so batches are small and even. If the fixed cost is
    large, they grow to the limits.

    A `MeasuredCostModel` may be wrong. While it is not trusted, batches are full and of similar sizes: seldom the best
    choice, never a very bad one. No batch holds more than four times as many requests as ever ran together.

    Nothing here changes the queue.
    """

    def __init__(
        self, policy: BatchPolicy, cost_model: CostModel, queue: RequestQueue[RequestT], token_limit: TokenLimit
    ) -> None:
        self.policy = policy
        self.cost_model = cost_model
        self.queue = queue
        self.token_limit = token_limit
        self.failure_limit: int | None = None
        """Requests in a batch while failures are frequent, because a small batch loses less; None for no limit."""
        self._learnt = cost_model if isinstance(cost_model, MeasuredCostModel) else None
        self._overhead_s = 0.0 if self._learnt is None else OVERHEAD_S  # other costs may be in any unit

    @property
    def count_limit(self) -> int:
        """How many requests a batch may hold at present. Without experience of large batches it grows in steps."""
        limit = self.policy.max_batch_size
        if self.failure_limit is not None:
            limit = min(limit, self.failure_limit)
        if self._learnt is not None:
            limit = min(limit, max(INITIAL_COUNT_LIMIT, COUNT_LIMIT_FACTOR * self._learnt.largest_count))
        return limit

    @property
    def is_trusted(self) -> bool:
        """Whether batches may be formed by their predicted costs."""
        return self._learnt is None or self._learnt.is_trusted

    def form(self, anchor: RequestT) -> Batch[RequestT]:
        """The batch around `anchor`."""
        if self.policy.max_batch_s is not None and (count := self._count_to_repeat(anchor, self.policy.max_batch_s)):
            batch = self.form_full(anchor, count, is_timed=False)
            if len(batch.requests) == count:
                return batch
        if not self.is_trusted:
            return self.form_full(anchor)
        if 1 < self.queue.waiting(anchor.priority) <= MAX_PARTITIONED:
            return self._extended_to_all(self._form_by_partition(anchor))
        return self._extended_to_all(self._form_greedily(anchor))

    def shorten(self, batch: Batch[RequestT], max_s: float) -> Batch[RequestT]:
        """The anchor with as many companions, nearest sizes first, as fit into `max_s` predicted seconds."""
        anchor, *others = batch.requests
        by_nearness = [anchor, *sorted(others, key=lambda request: abs(request.size - anchor.size))]
        count = len(by_nearness)
        while count > 1 and batch.predicted_s > max_s:
            count = max(1, min(count - 1, int(count * max_s / batch.predicted_s)))
            requests = by_nearness[:count]
            longest, total = max(request.size for request in requests), sum(request.size for request in requests)
            seconds = self.cost_model.predict_s(count, longest, total)
            batch = replace(batch, requests=requests, longest=longest, total=total, predicted_s=seconds)
        return batch

    def add_companions(self, batch: Batch[RequestT], priority: Priority, max_s: float) -> Batch[RequestT]:
        """The batch with companions of another lane, as far as it takes at most `max_s` predicted seconds.

        They add at most the time that they would take in batches of their own. They come in runs, each from one bucket:
        all that fit, else half of them, and so on.
        """
        room, own = self.count_limit - len(batch.requests), size_bucket(batch.longest)
        for index in [index for index in reversed(self.queue.bucket_indices(priority)) if index <= own]:
            if room <= 0:
                break
            run = [request for request in self.queue.front(priority, index, room) if request.size <= batch.longest]
            added, own_s = len(run), self.own_s(run[0].size) if run else 0.0
            while added:
                count, total = len(batch.requests) + added, batch.total + sum(request.size for request in run[:added])
                seconds = self.cost_model.predict_s(count, batch.longest, total)
                is_short = seconds <= max_s and self.is_allowed(count, batch.longest, seconds)
                if is_short and seconds - batch.predicted_s <= added * own_s * ROUNDING_MARGIN:
                    batch = replace(batch, requests=batch.requests + run[:added], total=total, predicted_s=seconds)
                    room -= added
                    break
                added //= 2
            if run and not added:
                break  # smaller requests need even more padding
        return batch

    def own_s(self, size: int) -> float:
        """Seconds per request of this size in the best batch of requests of this size."""
        limit = self.count_limit
        counts = [*(1 << i for i in range((limit - 1).bit_length())), limit]
        return min([(self._overhead_s + self.cost_model.predict_s(n, size, n * size)) / n for n in counts])

    def _count_to_repeat(self, anchor: RequestT, max_s: float) -> int:
        """The requests of the first batch of all, if so many wait and its time alone forbids more such batches; else 0.

        It may have been slow because it was the first one, which only another one can tell.
        """
        count = 0 if self._learnt is None else self._learnt.unsure_count
        if not 1 < count <= min(self.count_limit, self.queue.waiting(anchor.priority)):
            return 0
        return count if self.cost_model.predict_s(count, anchor.size, count * anchor.size) > max_s else 0

    def form_full(self, anchor: RequestT, count: int | None = None, *, is_timed: bool = True) -> Batch[RequestT]:
        """The anchor with the requests of the most similar sizes, as many as the limits allow, and at most `count`.

        Unless it `is_timed`, they may be predicted to take any time.
        """
        limit, requests, longest, total = count or self.count_limit, [anchor], anchor.size, anchor.size
        sides = self._neighbours(anchor, limit - 1)
        reason, was_refused = DispatchReason.FULL, False
        while len(requests) < limit:
            runs = [(side, side.sizes(limit - len(requests))) for side in sides]
            near = sorted((abs(math.log(sizes[0] / anchor.size)), i) for i, (_, sizes) in enumerate(runs) if sizes)
            for _, i in near:
                side, sizes = runs[i]
                if not _are_similar(anchor.size, sizes[0]):  # sizes in a run differ by less than a twentieth
                    continue
                added = self._allowed(len(requests), longest, total, sizes, is_timed=is_timed)
                was_refused = was_refused or not added
                if added:
                    requests += side.take(added)
                    longest, total = max(longest, *sizes[:added]), total + sum(sizes[:added])
                    break
            else:
                reason = DispatchReason.BUDGET if was_refused else DispatchReason.IDLE
                break
        batch_s = self.cost_model.predict_s(len(requests), longest, total)
        return Batch(requests, anchor.priority, reason, longest, total, batch_s)

    def _allowed(self, count: int, longest: int, total: int, sizes: list[int], *, is_timed: bool) -> int:
        """How many of these requests may join a batch, in this order: all, else half of them, and so on, else 0."""
        added = len(sizes)
        while added:
            new_longest, new_total = max(longest, *sizes[:added]), total + sum(sizes[:added])
            predicted_s = self.cost_model.predict_s(count + added, new_longest, new_total) if is_timed else 0.0
            if self.is_allowed(count + added, new_longest, predicted_s):
                return added
            added //= 2
        return 0

    def _form_by_partition(self, anchor: RequestT) -> Batch[RequestT]:
        """The batch of `anchor` in the partition of the waiting requests of its lane that takes the least time.

        Dynamic programming: the requests are sorted by size, and a batch is a run of them. The least time for the first
        i requests is the minimum, over the number n of requests in the last batch, of the least time for the first
        i - n requests plus the time of this batch.
        """
        # The anchor comes after others of its size: if these make a full batch and a rest, it is in the full one.
        by_size = sorted([*self.queue.all_but([anchor]), anchor], key=attrgetter("size"))
        if by_size[0].size == by_size[-1].size and (whole := self._whole_if_best(anchor, by_size[:-1])) is not None:
            return whole
        totals = list(accumulate((request.size for request in by_size), initial=0))
        limit, least_s, starts, seconds = self.count_limit, [0.0], [0], [0.0]
        are_equal, all_s = by_size[0].size == by_size[-1].size, [0.0]
        for end, largest in enumerate(by_size, start=1):
            best_s, best_start, best_batch_s = math.inf, end - 1, 0.0
            for start in range(end - 1, max(-1, end - limit - 1), -1):
                count = end - start
                if are_equal and start:
                    batch_s = all_s[count]  # was predicted for the first so many
                else:
                    batch_s = self.cost_model.predict_s(count, largest.size, totals[end] - totals[start])
                    if count > 1 and not self.is_allowed(count, largest.size, batch_s):
                        all_s.append(math.inf)
                        break
                    all_s.append(batch_s)
                sum_s = least_s[start] + self._overhead_s + batch_s
                if sum_s <= best_s * ROUNDING_MARGIN:
                    best_s, best_start, best_batch_s = sum_s, start, batch_s
            least_s.append(best_s)
            starts.append(best_start)
            seconds.append(best_batch_s)
        position, end = next(i for i, request in enumerate(by_size) if request is anchor), len(by_size)
        while starts[end] > position:
            end = starts[end]
        start, longest = starts[end], by_size[end - 1].size
        requests = [anchor, *(request for request in by_size[start:end] if request is not anchor)]
        total = totals[end] - totals[start]
        reason = self._reason(len(requests), longest, total, len(by_size))
        return Batch(requests, anchor.priority, reason, longest, total, seconds[end])

    def _whole_if_best(self, anchor: RequestT, others: list[RequestT]) -> Batch[RequestT] | None:
        """All these requests of one size as one batch, if none of fewer takes less for each: no partition does then.

        That is found in a third of the time.
        """
        size, count = anchor.size, 1 + len(others)
        if count > self.count_limit:
            return None
        seconds = [self.cost_model.predict_s(n, size, n * size) for n in range(1, count + 1)]
        least_s = min([(self._overhead_s + batch_s) / n for n, batch_s in enumerate(seconds, start=1)])
        mean_s = (self._overhead_s + seconds[-1]) / count
        if mean_s > least_s * ROUNDING_MARGIN or not self.is_allowed(count, size, seconds[-1]):
            return None
        reason = self._reason(count, size, count * size, count)
        return Batch([anchor, *others], anchor.priority, reason, size, count * size, seconds[-1])

    def _reason(self, count: int, longest: int, total: int, waiting: int) -> DispatchReason:
        if count >= self.count_limit:
            return DispatchReason.FULL
        one_more_s = self.cost_model.predict_s(count + 1, longest, total + longest)
        has_room = self.is_allowed(count + 1, longest, one_more_s)
        return DispatchReason.IDLE if has_room or count == waiting else DispatchReason.BUDGET

    def _form_greedily(self, anchor: RequestT) -> Batch[RequestT]:
        """Grow a batch around `anchor` by runs of smaller or larger requests, each time the run that helps most."""
        limit = self.count_limit
        requests, longest, total = [anchor], anchor.size, anchor.size
        batch_s = self.cost_model.predict_s(1, longest, total)
        apart_s = total * self.queue.seconds_per_size(anchor.size)
        sides = self._neighbours(anchor, limit - 1)
        while len(requests) < limit:
            grown, over_budget = self._best_growth(sides, len(requests), longest, total, batch_s, apart_s)
            if grown is None:
                reason = DispatchReason.BUDGET if over_budget else DispatchReason.IDLE
                return Batch(requests, anchor.priority, reason, longest, total, batch_s)
            side, added, longest, total, batch_s, apart_s = grown
            requests += side.take(added)
        return Batch(requests, anchor.priority, DispatchReason.FULL, longest, total, batch_s)

    def _extended_to_all(self, batch: Batch[RequestT]) -> Batch[RequestT]:
        """The batch with all waiting requests of its lane, if the sum of their latencies is less than in two batches.

        So a few requests of unusual sizes do not wait for a batch of their own while the queue is short.
        """
        count, priority = len(batch.requests), batch.priority
        waiting = self.queue.waiting(priority)
        if batch.reason is not DispatchReason.IDLE or not count < waiting <= self.count_limit:
            return batch
        rest = self.queue.all_but(batch.requests)
        longest_of_rest, total_of_rest = max(request.size for request in rest), sum(request.size for request in rest)
        longest, total = max(batch.longest, longest_of_rest), batch.total + total_of_rest
        together_s = self.cost_model.predict_s(waiting, longest, total)
        second_s = self.cost_model.predict_s(len(rest), longest_of_rest, total_of_rest)
        if not self.is_allowed(waiting, longest, together_s):
            return batch
        if waiting * together_s > waiting * batch.predicted_s + (waiting - count) * second_s:
            return batch
        return Batch([*batch.requests, *rest], priority, batch.reason, longest, total, together_s)

    def is_allowed(self, count: int, longest: int, predicted_s: float) -> bool:
        """Whether a batch of several requests keeps all limits except that of their number."""
        policy, tokens = self.policy, count * longest
        return (
            (policy.max_batch_tokens is None or tokens <= policy.max_batch_tokens)
            and (policy.max_batch_s is None or predicted_s <= policy.max_batch_s)
            and tokens <= self.token_limit.tokens
        )

    def _best_growth(
        self,
        sides: "tuple[_Neighbours[RequestT], ...]",
        count: int,
        longest: int,
        total: int,
        batch_s: float,
        apart_s: float,
    ) -> "tuple[tuple[_Neighbours[RequestT], int, int, int, float, float] | None, bool]":
        """The run of one side that lowers ``batch_s / apart_s`` most, with the figures of the larger batch.

        `apart_s` is what the requests would take in the best batches of their own sizes. On each side it tries all
        requests of the run, and fewer (`_fewer`).

        The first value is None if every run would raise the ratio or exceed a limit. The second value says whether a
        run that would not raise it exceeded a limit.
        """
        predict_s = self.cost_model.predict_s
        room = self.count_limit - count
        best, best_ratio, over_budget = None, (self._overhead_s + batch_s) / apart_s + ROUNDING, False
        for side in sides:
            if not (sizes := side.sizes(room)):
                continue
            added = len(sizes)
            seconds_per_size = self.queue.seconds_per_size(sizes[0])
            while added:
                run = sizes[:added]
                new_longest, new_total = max(longest, *run), total + sum(run)
                predicted_s = predict_s(count + added, new_longest, new_total)
                new_apart_s = apart_s + (new_total - total) * seconds_per_size
                ratio = (self._overhead_s + predicted_s) / new_apart_s
                if not self.is_allowed(count + added, new_longest, predicted_s):
                    over_budget = over_budget or ratio < best_ratio
                elif ratio < best_ratio:
                    best = side, added, new_longest, new_total, predicted_s, new_apart_s
                    best_ratio = ratio - ROUNDING
                added = _fewer(count, added)
        return best, over_budget

    def _neighbours(self, anchor: RequestT, limit: int) -> "tuple[_Neighbours[RequestT], _Neighbours[RequestT]]":
        """The waiting requests of the anchor's lane, nearest sizes first: the smaller ones, and the larger ones.

        Those of its own bucket count as smaller. Within a bucket they are in order of arrival.
        """
        own = size_bucket(anchor.size)
        indices = self.queue.bucket_indices(anchor.priority)

        def runs(buckets: list[int]) -> Iterator[list[RequestT]]:
            for index in buckets:
                run = self.queue.front(anchor.priority, index, limit + 1)
                if index == own:
                    run.remove(anchor)
                yield run

        smaller = [index for index in reversed(indices) if index <= own]
        return _Neighbours(runs(smaller)), _Neighbours(runs(indices[len(smaller) :]))


def _are_similar(one: int, other: int) -> bool:
    smaller, larger = sorted((one, other))
    return larger + SIMILARITY_OFFSET <= MAX_SIZE_RATIO * (smaller + SIMILARITY_OFFSET)


def _fewer(count: int, added: int) -> int:
    """Fewer than `added`: as many as make the next lower power of 2 with `count`, if that adds any, else half of them.

    So few numbers of requests are common, and what each costs is soon known.
    """
    power = 1 << (count + added - 1).bit_length() - 1
    return power - count if power > count else added // 2


class _Neighbours(Generic[RequestT]):
    """Requests in order of distance from the anchor's size, in runs: the requests of one bucket at a time."""

    __slots__ = ("_run", "_runs", "_sizes")

    def __init__(self, runs: Iterator[list[RequestT]]) -> None:
        self._runs = runs
        self._run: list[RequestT] = []
        self._sizes: list[int] = []

    def sizes(self, limit: int) -> list[int]:
        """The sizes of the next requests of one run, at most `limit`; empty at the end."""
        while not self._run:
            run = next(self._runs, None)
            if run is None:
                return []
            self._run, self._sizes = run, [request.size for request in run]
        return self._sizes[:limit]

    def take(self, count: int) -> list[RequestT]:
        """Remove and return the next `count` requests of the run."""
        taken = self._run[:count]
        del self._run[:count], self._sizes[:count]
        return taken
