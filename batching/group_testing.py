"""Finds the guilty items of batches that fail, by nested group testing, and knows when the items are not to blame.

Sobel and Groll (1959), "Group testing to eliminate efficiently all defectives in a binomial sample": a group is run as
a whole; one that fails is searched for one guilty item by running a part of what is known to hold one, and nothing is
known of the rest, which joins the items that wait. Here a part is half of it, as in Hwang's generalized binary
splitting (1972), and an item is found guilty only by a run of its own: a failure may pass.
"""

import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from modalkit.batching.failure_rate import FailureRate

T = TypeVar("T")

ALONE_UNTIL_SYSTEMIC = 8  # items that fail alone, without a success in between, before the failure is systemic
MOST_ALONE_UNTIL_SYSTEMIC = 64  # where most items have been guilty lately
LIKELY_BY_CHANCE = 1e-5  # so many items failing in a row by chance, at the share of before, is not called systemic
ALONE_IN_A_SYSTEMIC_FAILURE = 2  # items of a batch that are tried while a systemic failure goes on
HANGS_UNTIL_SYSTEMIC = 3  # items that run into the time limit alone, without a success in between
GOLDEN_SECTION = 0.618  # steps of this part of a list come to all places of it


class FailureHistory:
    """What the runs so far say of the next ones: how large they should be, and whether a failure is systemic.

    It is systemic when nothing has succeeded in the last 2·⌈log2 n⌉ runs, of a batch of n, and eight items have failed
    alone (more, where most were guilty before: a row of failures must not be likely by chance). Any success ends that.
    """

    def __init__(self) -> None:
        self.rate = FailureRate()
        self.is_systemic = False
        """Whether whatever runs fails."""
        self.runs = 0
        """Runs that failed since the last success."""
        self.hangs = 0
        """Items that ran into the time limit alone since the last success."""
        self._alone = 0
        self._alone_needed = ALONE_UNTIL_SYSTEMIC
        self._belief_before = self.rate.belief
        self._limit: int | None = None

    def passed(self, count: int, suspects: int = 0) -> None:
        """Note that a run of `count` items succeeded, of so many `suspects`, one at least of which was guilty."""
        if self.runs or self.hangs:
            self.runs = self.hangs = self._alone = 0
            self.is_systemic = False
        self.rate.passed(count, suspects)

    def failed(self, count: int, suspects: int, batch_count: int) -> None:
        """Note that a run of `count` items of a batch of `batch_count` failed."""
        if not self.runs:
            self._belief_before = self.rate.belief
            self._alone_needed = _alone_needed(self.rate.share)
        self.runs += 1
        self._alone += count == 1
        if self.is_systemic:
            return
        if self._alone >= self._alone_needed and self.has_tried_enough(batch_count):
            self.is_systemic = True
            self.rate.restore(self._belief_before)  # it says nothing of the items
        else:
            self.rate.failed(count, suspects)

    def hung(self) -> None:
        """Note that an item ran into the time limit alone."""
        self.hangs += 1

    def has_tried_enough(self, batch_count: int) -> bool:
        """Whether so many runs failed that only items alone can still tell more."""
        return self.runs >= 2 * (batch_count - 1).bit_length()

    def count_limit(self, most: int) -> int | None:
        """How many items the next batch may hold, or None for no limit below `most`; to be asked once a batch.

        It grows no faster than twofold, because a few lucky runs are no reason to risk a batch many times as large.
        """
        if self.is_systemic or (self._limit is None and self.rate.is_at_rest):
            self._limit = None
            return None
        size = most if self.rate.is_at_rest else self.rate.group_size(most)
        if self._limit is not None:
            size = min(size, 2 * self._limit)
        self._limit = size if size < most else None
        return self._limit


def _alone_needed(share: float) -> int:
    by_chance = math.ceil(math.log(LIKELY_BY_CHANCE) / math.log(min(share, 0.99)))
    return min(max(ALONE_UNTIL_SYSTEMIC, by_chance), MOST_ALONE_UNTIL_SYSTEMIC)


class GroupTest(Generic[T]):
    """The search in one batch that has failed: says what to run next, and takes in what became of it.

    It goes on until one guilty item is found and something has succeeded, or all items have run, or the failure is
    systemic. Then `guilty` are the items that failed alone, each with its error; those `given_up` were not told apart;
    and the `untested` may run again, in another batch. A batch whose run was too large is no sign of guilt: its halves
    run one after the other; after one that ran into the time limit, each item runs alone.

    After each part of `next_part` one of `passed`, `failed`, `too_large` and `timed_out` is to be called, and one of
    the last three right after the start, for the batch itself. An item that is not `is_wanted` any more is dropped.
    """

    def __init__(self, items: Sequence[T], history: FailureHistory, is_wanted: Callable[[T], bool]) -> None:
        self.guilty: list[tuple[T, Exception]] = []
        self.given_up: list[T] = []
        self.untested: list[T] = []
        self._history = history
        self._is_wanted = is_wanted
        self._count = len(items)
        # What runs; what is left of the suspects without it, and how many they were with it, 0 if there were none.
        self._running = list(items)
        self._other_suspects: list[T] = []
        self._suspect_count = 0
        self._suspects: list[T] = []  # one at least is guilty
        self._parts: deque[list[T]] = deque()  # to be run as they are
        self._has_passed = False
        self._alone = self._hangs = 0  # items that failed, and that hung, alone

    @property
    def is_systemic(self) -> bool:
        """Whether nothing succeeded, and the items are not to blame for it: true of the guilty ones as well."""
        return not self._has_passed and (self._history.is_systemic or self._hangs_systemically)

    def next_part(self) -> list[T]:
        """The items to run next; none when the search is over."""
        self._drop_unwanted()
        self._running, self._other_suspects, self._suspect_count = [], [], len(self._suspects)
        if self._is_hopeless():
            self.given_up = [*self._suspects, *(item for part in self._parts for item in part), *self.untested]
            self._suspects, self.untested = [], []
            self._parts.clear()
        elif self._suspects:
            # Half of them, or fewer where so many failures make even that too likely to fail.
            size = self._history.rate.group_size(max(1, len(self._suspects) // 2))
            self._running, self._other_suspects = self._suspects[:size], self._suspects[size:]
            self._suspects = []
        elif self._parts:
            self._running = self._parts.popleft()
        elif self.untested and not self._has_passed:
            self._running = self._sample()
        return self._running

    def passed(self) -> None:
        """The part ran without an error."""
        self._has_passed = True
        self._hangs = 0
        # Alone in its suspicion, an item that succeeds proves that what failed before was not its fault: no lesson.
        suspects = self._suspect_count if self._other_suspects else 0
        self._history.passed(len(self._running), suspects)
        self._suspects = self._other_suspects

    def failed(self, error: Exception) -> None:
        """The part raised an error."""
        part = self._running
        self._history.failed(len(part), self._suspect_count, self._count)
        self.untested = [*self._other_suspects, *self.untested]
        if len(part) == 1:
            self._alone += 1
            self.guilty.append((part[0], error))
        elif self._history.is_systemic:
            self.untested = [*part, *self.untested]
        else:
            self._suspects = part

    def too_large(self, error: Exception) -> None:
        """The part was too large for the device."""
        part, middle = self._running, len(self._running) // 2
        self.untested = [*self._other_suspects, *self.untested]
        if middle:
            self._parts.extendleft((part[middle:], part[:middle]))
        else:
            self.guilty.append((part[0], error))

    def timed_out(self, error: Exception) -> None:
        """The part ran into the time limit."""
        part = self._running
        self.untested = [*self._other_suspects, *self.untested]
        if len(part) > 1:
            self._parts.extend([item] for item in _from_all_places(part))
            return
        self._history.hung()
        self._hangs += 1
        self.guilty.append((part[0], error))

    @property
    def _hangs_systemically(self) -> bool:
        return self._hangs > 0 and self._history.hangs >= HANGS_UNTIL_SYSTEMIC

    def _is_hopeless(self) -> bool:
        if self._hangs_systemically:
            return True
        enough = self._alone >= min(ALONE_IN_A_SYSTEMIC_FAILURE, self._count)
        return self._history.is_systemic and not self._has_passed and enough

    def _sample(self) -> list[T]:
        """Some of the untested items, each time from another place: one, where larger groups failed often enough."""
        size = 1
        if not self._history.is_systemic and not self._history.has_tried_enough(self._count):
            size = self._history.rate.group_size(len(self.untested))
        start = min(int(len(self.untested) * (self._alone * GOLDEN_SECTION % 1)), len(self.untested) - size)
        sample = self.untested[start : start + size]
        del self.untested[start : start + size]
        return sample

    def _drop_unwanted(self) -> None:
        suspects = list(filter(self._is_wanted, self._suspects))
        self.untested = list(filter(self._is_wanted, self.untested))
        if len(suspects) < len(self._suspects):  # the guilty one may be among those that are gone
            self.untested = [*suspects, *self.untested]
            suspects = []
        self._suspects = suspects
        if self._parts:
            parts = (list(filter(self._is_wanted, part)) for part in self._parts)
            self._parts = deque(part for part in parts if part)


def _from_all_places(items: list[T]) -> list[T]:
    """The items in an order in which neighbours are far from each other."""
    order = sorted(range(len(items)), key=lambda place: place * GOLDEN_SECTION % 1)
    return [items[place] for place in order]
