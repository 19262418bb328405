"""What finding failing items costs, and that it finds exactly them, in one batch after the other."""

import math
import random
from collections import deque
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modalkit.batching.group_testing import FailureHistory, GroupTest


class PoisonedError(Exception):
    """What a run with a failing item in it fails with."""


class Outcomes:
    """Runs items in batches as the scheduler does, and notes what became of each."""

    def __init__(self, count: int, most: int, failing: Callable[[int], bool]) -> None:
        self.waiting = deque(range(count))
        self.most = most
        self.failing = failing
        self.history = FailureHistory()
        self.succeeded: list[int] = []
        self.failed: list[int] = []
        self.systemic: list[int] = []
        self.runs: list[list[int]] = []
        self.runs_of_batches: list[int] = []

    def run_all(self) -> "Outcomes":
        while self.waiting:
            limit = self.history.count_limit(self.most) or self.most
            before, ended = len(self.runs), self.ended
            self.run_batch([self.waiting.popleft() for _ in range(min(limit, len(self.waiting)))])
            self.runs_of_batches.append(len(self.runs) - before)
            assert self.ended > ended, "each batch ends something"
        return self

    @property
    def ended(self) -> int:
        return len(self.succeeded) + len(self.failed) + len(self.systemic)

    def passes(self, part: list[int]) -> bool:
        self.runs.append(part)
        return not any(map(self.failing, part))

    def run_batch(self, batch: list[int]) -> None:
        if self.passes(batch):
            self.history.record_success(len(batch))
            self.succeeded += batch
            return
        test = GroupTest(batch, self.history, lambda _: True)
        test.record_failure(PoisonedError())
        while part := test.next_part():
            if self.passes(part):
                test.record_success()
                self.succeeded += part
            else:
                test.record_failure(PoisonedError())
        (self.systemic if test.is_systemic else self.failed).extend(item for item, _ in test.failing)
        self.systemic += test.unresolved
        self.waiting.extendleft(reversed(test.untested))


STREAMS = st.tuples(st.integers(1, 300), st.integers(1, 64)).flatmap(
    lambda case: st.tuples(st.just(case[0]), st.just(case[1]), st.sets(st.integers(0, case[0] - 1)))
)


@given(STREAMS)
def test_every_item_ends_exactly_once_and_only_failing_ones_are_found_failing(case: tuple[int, int, set[int]]) -> None:
    count, most, failing = case
    outcomes = Outcomes(count, most, failing.__contains__).run_all()
    assert sorted([*outcomes.succeeded, *outcomes.failed, *outcomes.systemic]) == list(range(count))
    assert set(outcomes.failed) <= failing
    assert failing.isdisjoint(outcomes.succeeded)
    for item in outcomes.failed:
        assert [item] in outcomes.runs, "no item is failing by inference"


@given(st.integers(1, 300).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n - 1))))
def test_one_failing_item_is_found_at_logarithmic_cost(case: tuple[int, int]) -> None:
    count, failing = case
    outcomes = Outcomes(count, count, failing.__eq__)
    outcomes.waiting.clear()
    outcomes.run_batch(list(range(count)))
    assert outcomes.failed == [failing]
    # Parts are smaller than half where a batch so large makes it likely that several are failing.
    assert len(outcomes.runs) <= 1 + max(1, 2 * math.ceil(math.log2(count)))
    assert sorted([*outcomes.succeeded, failing, *outcomes.waiting]) == list(range(count))


@pytest.mark.parametrize("most", [1, 2, 3, 8, 32, 100, 256])
def test_where_everything_fails_batches_are_given_up_after_64_items_alone(most: int) -> None:
    outcomes = Outcomes(100 * most, most, lambda _: True).run_all()
    assert not outcomes.succeeded
    alone = [len(part) == 1 for part in outcomes.runs]
    until_64 = next(index for index in range(len(alone)) if sum(alone[: index + 1]) == 64)
    assert until_64 <= 64 + 2 * math.ceil(math.log2(most)) + 64 / most, "little more than one run for each of these"
    given_up_from = next(
        index for index in range(len(outcomes.runs_of_batches)) if sum(outcomes.runs_of_batches[: index + 1]) > until_64
    )
    assert all(runs <= 3 for runs in outcomes.runs_of_batches[given_up_from + 1 :])
    if most >= 8:
        assert not outcomes.failed, "whatever failed meanwhile may run again"
        assert len(outcomes.runs_of_batches) == 100, "batches are whole again"


@pytest.mark.parametrize("most", [8, 32, 256])
@pytest.mark.parametrize("share", [0.5, 0.7, 0.8])
def test_no_item_is_failed_by_others_however_many_fail_in_the_very_first_batch(share: float, most: int) -> None:
    for seed in range(30):
        chance = random.Random(seed)
        failing = {item for item in range(most) if chance.random() < share}
        outcomes = Outcomes(most, most, failing.__contains__).run_all()
        assert sorted(outcomes.succeeded) == sorted(set(range(most)) - failing)
        assert len(outcomes.runs) <= most + 2 * math.ceil(math.log2(most)) + 8


def test_the_first_items_of_a_systemic_failure_come_from_different_places() -> None:
    outcomes = Outcomes(64, 64, lambda _: True).run_all()
    alone = sorted([part[0] for part in outcomes.runs if len(part) == 1][:8])
    assert max(later - earlier for earlier, later in zip([*alone], [*alone[1:], 64], strict=True)) < 20


def test_any_success_ends_a_systemic_failure_and_what_was_learnt_before_it_holds_again() -> None:
    is_up = False
    outcomes = Outcomes(32, 32, lambda _: not is_up).run_all()
    assert len(outcomes.systemic) == 32
    is_up = True
    outcomes.waiting.extend(range(32, 320))
    outcomes.run_all()
    assert outcomes.runs_of_batches[1:] == [1] * 9


def test_small_batches_count_together() -> None:
    outcomes = Outcomes(12, 1, lambda _: True).run_all()
    assert (outcomes.failed, outcomes.systemic) == (list(range(7)), list(range(7, 12)))


def test_a_row_of_failures_where_most_were_failing_before_is_not_systemic() -> None:
    """Every other item fails, then fourteen in a row: with so many failing ones that happens now and then."""
    outcomes = Outcomes(200, 32, lambda item: item % 2 == 0 or 100 <= item < 110).run_all()
    assert not outcomes.systemic
    assert len(outcomes.succeeded) == 95


def test_a_failure_that_passes_finds_no_failing_item() -> None:
    failures = iter([True, True])
    outcomes = Outcomes(16, 16, lambda _: next(failures, False)).run_all()
    assert sorted(outcomes.succeeded) == list(range(16))


def test_halves_of_what_was_too_large_run_one_after_the_other_and_say_nothing_about_items() -> None:
    history, ran = FailureHistory(), list[list[int]]()
    test = GroupTest(list(range(8)), history, lambda _: True)
    test.record_too_large(MemoryError())
    while part := test.next_part():
        ran.append(part)
        if len(part) > 2:
            test.record_too_large(MemoryError())
        else:
            test.record_success()
    assert [part for part in ran if len(part) == 2] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert history.rate.is_at_rest
    assert (test.failing, test.untested) == ([], [])


def test_each_item_of_a_batch_that_hung_runs_alone_and_after_three_that_hang_too_the_rest_is_given_up() -> None:
    history = FailureHistory()
    for most_alone in (3, 1):  # the second batch, while that goes on
        test = GroupTest(list(range(64)), history, lambda _: True)
        test.record_timeout(TimeoutError())
        ran = []
        while part := test.next_part():
            ran.append(part)
            test.record_timeout(TimeoutError())
        assert [len(part) for part in ran] == [1] * most_alone
        assert len(test.failing) == most_alone
        assert len(test.unresolved) == 64 - most_alone
        assert test.is_systemic


def test_one_item_that_hangs_costs_one_error() -> None:
    test = GroupTest(list(range(64)), FailureHistory(), lambda _: True)
    test.record_timeout(TimeoutError())
    succeeded = []
    while part := test.next_part():
        if part == [17]:
            test.record_timeout(TimeoutError())
        else:
            succeeded += part
            test.record_success()
    assert sorted([*succeeded, 17]) == list(range(64))
    assert [item for item, _ in test.failing] == [17]
    assert not test.is_systemic


def test_items_that_are_not_wanted_any_more_are_dropped_and_no_item_is_failing_because_of_them() -> None:
    gone: set[int] = set()
    test = GroupTest(list(range(4)), FailureHistory(), lambda item: item not in gone)
    test.record_failure(PoisonedError())
    gone.update((0, 1))
    ran: list[int] = []
    while part := test.next_part():
        ran += part
        test.record_success()
    assert set(ran) <= {2, 3}
    assert sorted([*ran, *test.untested]) == [2, 3]
    assert not test.failing
