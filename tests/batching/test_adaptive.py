"""The estimators of the planner: a token limit, trials within their share of the time, a limit for bulk batches."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modalkit.batching import Priority, Request
from modalkit.batching.adaptive import MAX_EXPLORATION_SHARE, MAX_TRIAL_INTERVAL, BulkTimeLimit, Exploration, TokenLimit
from modalkit.batching.policy import Batch, DispatchReason

BULK = Priority.BULK


def test_the_token_limit_is_infinite_until_a_batch_was_too_large() -> None:
    token_limit = TokenLimit()
    for _ in range(1000):
        token_limit.record_fit(10_000)
    assert token_limit.tokens == math.inf


def test_the_token_limit_is_half_of_what_did_not_fit_or_the_largest_fit_if_that_is_more() -> None:
    token_limit = TokenLimit()
    token_limit.record_too_large(1000)
    assert token_limit.tokens == 500
    token_limit = TokenLimit()
    token_limit.record_fit(900)
    token_limit.record_too_large(1000)
    assert token_limit.tokens == 900


def test_a_fit_does_not_count_after_a_smaller_batch_did_not_fit() -> None:
    token_limit = TokenLimit()
    token_limit.record_fit(900)
    token_limit.record_too_large(600)
    assert token_limit.tokens == 300


def test_a_batch_above_the_token_limit_never_raises_it() -> None:
    """A request that is too large alone runs all the same, and fails; so may a batch that was formed earlier."""
    token_limit = TokenLimit()
    token_limit.record_too_large(1000)
    token_limit.record_too_large(5000)
    assert token_limit.tokens == 500


@given(st.integers(100, 100_000))
def test_a_device_with_a_fixed_limit_is_seldom_asked_for_more(limit: int) -> None:
    """Batches are as large as the token limit allows; above the limit of the device they fail and are halved."""
    token_limit = TokenLimit()
    token_limit.record_too_large(2 * limit)
    failures = 0
    for _ in range(5000):
        tokens = int(token_limit.tokens)
        if tokens > limit:
            failures += 1
            token_limit.record_too_large(tokens)
        else:
            token_limit.record_fit(tokens)
    assert failures <= 12
    assert token_limit.tokens >= 0.8 * limit


@given(st.lists(st.tuples(st.floats(0.001, 10), st.floats(0.001, 10)), min_size=50, max_size=400))
def test_all_trials_lose_no_more_than_their_share_of_the_time(batches: list[tuple[float, float]]) -> None:
    exploration, running_s, lost_s = Exploration(), 0.0, 0.0
    for elapsed_s, loss_s in batches:
        if exploration.allow(loss_s):
            exploration.record_trial(loss_s)
            lost_s += loss_s
        else:
            exploration.record_batch(elapsed_s)
            running_s += elapsed_s
    assert lost_s <= MAX_EXPLORATION_SHARE * running_s + 1e-9


def test_trials_become_rarer_while_they_lose_and_never_stop() -> None:
    exploration, gaps, gap = Exploration(), [], 0
    for _ in range(5_000):
        if exploration.allow(0.001):
            exploration.record_trial(0.001)
            gaps.append(gap)
            gap = 0
        else:
            exploration.record_batch(1.0)
            gap += 1
    assert gaps == sorted(gaps)
    assert gaps[-1] == MAX_TRIAL_INTERVAL


def test_a_trial_that_would_lose_much_is_made_after_a_long_time() -> None:
    """It is predicted to lose as much as 100 batches take, and that may be wrong."""
    exploration, batches = Exploration(), 0
    while not exploration.allow(100.0) and batches < 10_000:
        exploration.record_batch(1.0)
        batches += 1
    assert batches == pytest.approx(100 / MAX_EXPLORATION_SHARE, abs=1)
    exploration.record_trial(100.0)
    assert not exploration.is_due


def test_a_trial_that_gained_time_is_repeated_soon() -> None:
    exploration = Exploration()
    for _ in range(8):
        exploration.record_batch(1.0)
    assert exploration.allow(0.0)
    exploration.record_trial(-1.0)
    for _ in range(8):
        exploration.record_batch(1.0)
    assert exploration.allow(0.0)


def test_twice_the_usual_number_half_as_many_more_and_a_full_batch_are_tried_in_turn() -> None:
    exploration, counts = Exploration(), list[int]()
    for loss_s in (1.0, -1.0, 1.0, 1.0, 1.0):
        counts.append(exploration.count(32, 256))
        exploration.record_trial(loss_s)
    assert counts == [64, 48, 48, 256, 64], "what gained time is tried once more"
    assert exploration.count(200, 256) == 256


def test_bulk_batches_do_not_become_ever_shorter_where_there_is_nothing_to_shorten() -> None:
    limit = BulkTimeLimit()
    lone = Batch([Request(0, 100, BULK)], BULK, DispatchReason.IDLE, 100, 100, 0.1)
    many = Batch([Request(0, 100, BULK)] * 8, BULK, DispatchReason.IDLE, 100, 800, 0.8)
    limit.add(many, many)
    for _ in range(10_000):
        limit.add(lone, lone)
        limit.add(many, lone)
    assert limit.seconds > 0.05
