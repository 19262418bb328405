"""The estimated share of guilty items, and how large groups should be."""

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modalkit.batching.failure_rate import FailureRate
from modalkit.batching.group_testing import FailureHistory

RUNS = st.lists(st.tuples(st.integers(1, 300), st.integers(0, 300), st.booleans()), max_size=60)


def learn(rate: FailureRate, count: int, more_suspects: int, passes: bool) -> None:
    """Take in one run: of new items, or of some of more suspects."""
    suspects = count + more_suspects if more_suspects else 0
    if passes:
        rate.record_success(count, suspects)
    else:
        rate.record_failure(count, suspects)


@given(RUNS, st.integers(1, 512))
def test_whatever_happens_the_belief_is_one_and_the_group_within_its_bounds(
    runs: list[tuple[int, int, bool]], most: int
) -> None:
    rate = FailureRate()
    for run in runs:
        learn(rate, *run)
        assert sum(rate.belief) == pytest.approx(1)
        assert min(rate.belief) >= 0
        assert 0 < rate.share < 1
        assert 1 <= rate.group_size(most) <= most


@given(RUNS, st.integers(1, 100))
def test_a_failure_never_makes_groups_larger_and_a_success_never_smaller(
    runs: list[tuple[int, int, bool]], count: int
) -> None:
    for passes in (False, True):
        rate = FailureRate()
        for run in runs:
            learn(rate, *run)
        before = rate.group_size(256)
        learn(rate, count, 0, passes)
        # Each run also forgets a little, which moves the belief towards the prior.
        assert rate.group_size(256) >= before - 1 if passes else rate.group_size(256) <= before + 1


@pytest.mark.parametrize(("share", "least", "most"), [(1 / 64, 25, 60), (1 / 8, 4, 7), (1 / 4, 1, 3), (1 / 2, 1, 1)])
def test_groups_become_such_that_half_of_them_succeed(share: float, least: int, most: int) -> None:
    rate, chance, sizes = FailureRate(), random.Random(7), list[int]()
    for _ in range(600):
        size = rate.group_size(256)
        learn(rate, size, 0, all(chance.random() >= share for _ in range(size)))
        sizes.append(size)
    assert least <= sorted(sizes[300:])[150] <= most


def test_at_rest_a_success_teaches_nothing_and_after_failures_it_comes_to_rest_again() -> None:
    rate = FailureRate()
    at_rest = rate.belief
    rate.record_success(32)
    assert rate.belief is at_rest
    for _ in range(20):
        rate.record_failure(32)
    assert not rate.is_at_rest
    for successes in range(100):  # noqa: B007  # the number is what is checked
        rate.record_success(rate.group_size(32))
        if rate.is_at_rest:
            break
    assert successes < 50


def test_what_cannot_be_teaches_nothing() -> None:
    """A group that is known to hold a guilty item, and succeeds, failed for something other than its items."""
    rate = FailureRate()
    before = rate.belief
    rate.record_success(4, 4)
    assert rate.belief is before


def test_the_limit_of_a_batch_at_most_doubles_from_one_batch_to_the_next() -> None:
    history, limits = FailureHistory(), list[int]()
    for _ in range(6):
        history.record_failure(1, 0, 1)
    while (limit := history.count_limit(256)) is not None:
        limits.append(limit)
        history.record_success(limit)
    assert limits[0] == 1
    assert all(later <= 2 * earlier for earlier, later in itertools.pairwise(limits))
    assert len(limits) < 40


def test_while_nothing_has_failed_there_is_no_limit() -> None:
    history = FailureHistory()
    history.record_success(8)
    assert history.count_limit(8) is None
