"""What finding the guilty items costs, and that it finds exactly them."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batching import Bisection


class PoisonedError(Exception):
    """What a part with a guilty item fails with."""


def run(count: int, guilty: set[int]) -> tuple[set[int], set[int], set[int], int]:
    """Bisect `count` items; returns (succeeded, found guilty, given up, runs beyond the first)."""
    bisection = Bisection(list(range(count)))
    succeeded: set[int] = set()
    found: set[int] = set()
    runs = 0
    for part in bisection:
        runs += 1
        if guilty.isdisjoint(part):
            succeeded.update(part)
        else:
            found.update(bisection.failed(part, PoisonedError(f"{part}")))
    given_up = {item for item, _ in bisection.given_up()}
    return succeeded, found, given_up, runs - 1


@given(st.integers(1, 300).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n - 1))))
def test_one_guilty_item_fails_alone_at_logarithmic_cost(case: tuple[int, int]) -> None:
    count, guilty = case
    succeeded, found, given_up, further_runs = run(count, {guilty})
    assert found == {guilty}
    assert succeeded == set(range(count)) - {guilty}
    assert not given_up
    assert further_runs <= 2 * math.ceil(math.log2(count))


@given(st.integers(2, 100).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1), max_size=2))))
def test_two_guilty_items_are_always_told_apart_from_the_innocent(case: tuple[int, set[int]]) -> None:
    count, guilty = case
    succeeded, found, given_up, _ = run(count, guilty)
    assert found == guilty
    assert succeeded == set(range(count)) - guilty
    assert not given_up


@given(st.integers(1, 300).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1)))))
def test_every_item_ends_exactly_once_and_the_cost_is_bounded(case: tuple[int, set[int]]) -> None:
    count, guilty = case
    succeeded, found, given_up, further_runs = run(count, guilty)
    assert sorted([*succeeded, *found, *given_up]) == list(range(count))
    assert found <= guilty
    assert further_runs <= 4 * math.ceil(math.log2(count))


def test_a_batch_in_which_everything_fails_is_given_up_early_with_the_parts_errors() -> None:
    bisection = Bisection(list(range(64)))
    runs = [part for part in bisection if bisection.failed(part, PoisonedError(f"part of {len(part)}")) is not None]
    given_up = dict(bisection.given_up())
    assert len(runs) == 1 + 4 * 6
    assert given_up.keys() == set(range(64))
    assert {str(error) for error in given_up.values()} == {"part of 8", "part of 4"}


def test_giving_up_before_anything_ran_is_reported_as_our_bug() -> None:
    with pytest.raises(AssertionError, match="bug in modalkit"):
        list(Bisection([1, 2]).given_up())
