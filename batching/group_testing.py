"""Finds the failing items of a batch by nested group testing, and notices when the items are not the cause.

Sobel and Groll (1959), "Group testing to eliminate efficiently all defectives in a binomial sample": a group of items
runs as a whole. If it fails, at least one item is *failing* (the paper: defective). A part of the group runs, then a
part of the part that fails, and so on until an item fails alone. Nothing is known of the other items, and they wait
again. A part is half of its group, as in Hwang's generalized binary splitting (1972). An item counts as failing only if
it fails in a run of its own, never by inference, because a failure may be temporary.
"""

import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from modalkit.batching.failure_rate import FailureRate

T = TypeVar("T")

MIN_SINGLE_FAILURES = 8  # items that fail alone, without a success in between, before the failure is systemic
MAX_SINGLE_FAILURES = 64  # the same, where most items have failed before; from then on batches are given up
MAX_CHANCE = 1e-5  # a row of failures more likely than this, at the share of failing items before, is not systemic
SINGLES_OF_GIVEN_UP = 2  # items of a batch that run alone before the others are given up
TIMEOUTS_UNTIL_SYSTEMIC = 3  # items that time out alone, without a success in between
GOLDEN_SECTION = 0.618  # repeated steps of this share of a list visit all its regions


class FailureHistory:
    """What past runs say about the next ones: how large batches should be, and whether the failure is systemic.

    A failure is systemic when the last 2·⌈log2 n⌉ runs of a batch of n have failed, and eight items have failed alone.
    If most items failed before, it takes more than eight, so that a row of failures is hardly a coincidence. Any
    success ends a systemic failure.

    That others fail does not prove that an item would. So in a systemic failure each item runs alone, until 64 in a row
    have failed. From then on batches are given up after two: where everything fails, nothing is gained by more runs.
    A search that takes long is given up before, because to fail may be slow, or end the process of a device.
    """

    def __init__(self) -> None:
        self.rate = FailureRate()
        self.is_systemic = False
        self.failures = 0
        """Runs that failed since the last success."""
        self.timeouts = 0
        """Items that timed out alone since the last success."""
        self.too_large = 0
        """Items that were too large alone since the last success."""
        self._singles = 0
        self._singles_needed = MIN_SINGLE_FAILURES
        self._belief_before = self.rate.belief
        self._limit: int | None = None

    def record_success(self, count: int, group_count: int = 0) -> None:
        """Learn that `count` items ran without an error; for `group_count` see `FailureRate`."""
        if self.failures or self.timeouts or self.too_large:
            self.failures = self.timeouts = self.too_large = self._singles = 0
            self.is_systemic = False
        self.rate.record_success(count, group_count)

    def record_failure(self, count: int, group_count: int, batch_count: int) -> None:
        """Learn that a run of `count` items of a batch of `batch_count` failed."""
        if not self.failures:
            self._belief_before = self.rate.belief
            self._singles_needed = _singles_needed(self.rate.share)
        self.failures += 1
        self._singles += count == 1
        if self.is_systemic:
            return
        if self._singles >= self._singles_needed and self.has_tried_enough(batch_count):
            self.is_systemic = True
            self.rate.belief = self._belief_before  # the failures say nothing about the items
        else:
            self.rate.record_failure(count, group_count)

    @property
    def gives_up(self) -> bool:
        """Whether so many items failed alone that the others of a batch fail without a run of their own."""
        return self.is_systemic and self._singles >= MAX_SINGLE_FAILURES

    def has_tried_enough(self, batch_count: int) -> bool:
        """Whether so many runs failed that only runs of single items can give more information."""
        return self.failures >= 2 * (batch_count - 1).bit_length()

    def count_limit(self, max_count: int) -> int | None:
        """How many items the next batch may hold, or None for `max_count`. Call it once for each batch.

        It grows at most twofold from batch to batch, because a few successes may be luck.
        """
        if self.is_systemic or (self._limit is None and self.rate.is_at_rest):
            self._limit = None
            return None
        size = max_count if self.rate.is_at_rest else self.rate.group_size(max_count)
        if self._limit is not None:
            size = min(size, 2 * self._limit)
        self._limit = size if size < max_count else None
        return self._limit


def _singles_needed(share: float) -> int:
    by_chance = math.ceil(math.log(MAX_CHANCE) / math.log(min(share, 0.99)))
    return min(max(MIN_SINGLE_FAILURES, by_chance), MAX_SINGLE_FAILURES)


class GroupTest(Generic[T]):
    """The search in one batch that failed. It says which items run next, and its callers record how each run ended.

    First record how the batch itself failed, then how each part of `next_part` ended. The search ends when a failing
    item was found and something has succeeded, when all items have run, or when the batch is given up. Then `failing`
    are the items that failed alone, each with its error. `unresolved` are items that may be failing or not, and do not
    run again because the batch is given up. `untested` items may run again in another batch.

    A run that was too large says nothing about its items: its halves run one after the other. After a run that timed
    out each of its items runs alone. An item that is not `is_wanted` any more is dropped.
    """

    def __init__(self, items: Sequence[T], history: FailureHistory, is_wanted: Callable[[T], bool]) -> None:
        self.failing: list[tuple[T, Exception]] = []
        self.unresolved: list[T] = []
        self.untested: list[T] = []
        self._history = history
        self._is_wanted = is_wanted
        self._count = len(items)
        # The part that runs; the rest of the failing group that it comes from; and the size of that group, 0 for none.
        self._running = list(items)
        self._rest_of_group: list[T] = []
        self._group_count = 0
        self._group: list[T] = []  # the failing group that is searched next
        self._parts: deque[list[T]] = deque()  # to be run as they are
        # The parts that were too large, or took too long, and why is not known yet; the `id()` of each item that
        # was so alone, and of each that is no cause.
        self._too_large: list[list[T]] = []
        self._too_large_alone, self._fitting = set[int](), set[int]()
        self._is_over = False
        self._has_succeeded = False
        self._singles = self._timeouts = 0  # items of this batch that failed alone, and that timed out alone

    @property
    def is_systemic(self) -> bool:
        """Whether nothing of the batch succeeded and the failure is systemic, so that no item is the cause."""
        is_full = self._history.too_large >= MIN_SINGLE_FAILURES
        return not self._has_succeeded and (self._history.is_systemic or self._times_out_systemically or is_full)

    def next_part(self, *, is_late: bool = False) -> list[T]:
        """The items to run next; empty when the search is over.

        A search that `is_late` is given up in any systemic failure, be it before 64 items have failed alone.
        """
        self._drop_unwanted()
        self._running, self._rest_of_group, self._group_count = [], [], len(self._group)
        if self._should_stop(is_late=is_late):
            self.unresolved = [*self._group, *(item for part in self._parts for item in part), *self.untested]
            self._group, self.untested = [], []
            self._parts.clear()
        elif self._group:
            # Half of the group, or fewer items where so many are failing that half would probably fail.
            size = self._history.rate.group_size(max(1, len(self._group) // 2))
            self._running, self._rest_of_group = self._group[:size], self._group[size:]
            self._group = []
        elif self._parts:
            self._running = self._parts.popleft()
        elif self.untested and not self._has_succeeded:
            self._running = self._sample()
        self._is_over = not self._running
        return self._running

    def take_too_large(self) -> list[list[T]]:
        """The parts that were too large, or took too long, through no single item of theirs; each is returned once.

        That is known when each item has run in a smaller part, or when the search is over. An item that is too large
        even alone explains the failures of all parts with it, which then say nothing about others.
        """
        known, waiting = list[list[T]](), list[list[T]]()
        for part in self._too_large:
            items = set(map(id, part))
            if items.isdisjoint(self._too_large_alone):
                (known if self._is_over or items <= self._fitting else waiting).append(part)
        self._too_large = waiting
        return known

    def record_success(self) -> None:
        """Record that the part ran without an error."""
        self._has_succeeded = True
        self._timeouts = 0
        # If the part was the whole group, its earlier failure was not caused by its items, so nothing is learnt.
        group_count = self._group_count if self._rest_of_group else 0
        self._fitting.update(map(id, self._running))
        self._history.record_success(len(self._running), group_count)
        self._group = self._rest_of_group

    def record_failure(self, error: Exception) -> None:
        """Record that the part raised an error."""
        part = self._running
        self._fitting.update(map(id, part))
        self._history.record_failure(len(part), self._group_count, self._count)
        self.untested = [*self._rest_of_group, *self.untested]
        if len(part) == 1:
            self._singles += 1
            self.failing.append((part[0], error))
        elif self._history.is_systemic:
            self.untested = [*part, *self.untested]
        else:
            self._group = part

    def record_disturbed(self, error: Exception) -> None:
        """Record that the batch failed beside others, so that an item alone may not be the cause and runs again."""
        if len(self._running) > 1:
            self.record_failure(error)
        else:
            self._parts.append(self._running)

    def record_too_large(self, error: Exception) -> None:
        """Record that the part was too large for the device."""
        part, middle = self._running, len(self._running) // 2
        self._add_too_large(part)
        if middle:
            self._parts.extendleft((part[middle:], part[:middle]))
        else:
            self._history.too_large += 1
            self.failing.append((part[0], error))

    def record_timeout(self, error: Exception) -> None:
        """Record that the part ran into the time limit."""
        part = self._running
        self._add_too_large(part)
        if len(part) > 1:
            self._parts.extend([item] for item in _spread_out(part))
            return
        self._history.timeouts += 1
        self._timeouts += 1
        self.failing.append((part[0], error))

    def _add_too_large(self, part: list[T]) -> None:
        self.untested = [*self._rest_of_group, *self.untested]
        if len(part) > 1:
            self._too_large.append(part)
        else:
            self._too_large_alone.add(id(part[0]))

    @property
    def _times_out_systemically(self) -> bool:
        return self._timeouts > 0 and self._history.timeouts >= TIMEOUTS_UNTIL_SYSTEMIC

    def _should_stop(self, *, is_late: bool) -> bool:
        if self._times_out_systemically:
            return True
        gives_up = self._history.gives_up or (is_late and self._history.is_systemic)
        has_enough = self._singles >= min(SINGLES_OF_GIVEN_UP, self._count)
        return gives_up and not self._has_succeeded and has_enough

    def _sample(self) -> list[T]:
        """Take some untested items, each time from another region; one item if larger groups failed often enough."""
        size = 1
        if not self._history.is_systemic and not self._history.has_tried_enough(self._count):
            size = self._history.rate.group_size(len(self.untested))
        start = min(int(len(self.untested) * (self._singles * GOLDEN_SECTION % 1)), len(self.untested) - size)
        sample = self.untested[start : start + size]
        del self.untested[start : start + size]
        return sample

    def _drop_unwanted(self) -> None:
        group = list(filter(self._is_wanted, self._group))
        self.untested = list(filter(self._is_wanted, self.untested))
        if len(group) < len(self._group):  # the failing item may be among the dropped ones
            self.untested = [*group, *self.untested]
            group = []
        self._group = group
        if self._parts:
            parts = (list(filter(self._is_wanted, part)) for part in self._parts)
            self._parts = deque(part for part in parts if part)


def _spread_out(items: list[T]) -> list[T]:
    """The items in an order in which neighbours were far from each other."""
    order = sorted(range(len(items)), key=lambda index: index * GOLDEN_SECTION % 1)
    return [items[index] for index in order]
