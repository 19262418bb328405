"""Trying what is predicted to be bad costs a bounded share of the time, and is not given up for ever."""

from hypothesis import given
from hypothesis import strategies as st

from modalkit.batching.exploration import LAST_PATIENCE, SHARE, Exploration


@given(st.lists(st.tuples(st.floats(0.001, 10), st.floats(0.001, 10)), min_size=50, max_size=400))
def test_all_tries_lose_no_more_than_their_share_of_the_time(batches: list[tuple[float, float]]) -> None:
    exploration, running_s, lost_s = Exploration(), 0.0, 0.0
    for elapsed_s, loss_s in batches:
        if exploration.is_due(loss_s):
            exploration.try_finished(loss_s)
            lost_s += loss_s
        else:
            exploration.batch_finished(elapsed_s)
            running_s += elapsed_s
    assert lost_s <= SHARE * running_s + 1e-9


def test_tries_become_rarer_while_they_lose_and_never_stop() -> None:
    exploration, gaps, gap = Exploration(), [], 0
    for _ in range(5_000):
        if exploration.is_due(0.001):
            exploration.try_finished(0.001)
            gaps.append(gap)
            gap = 0
        else:
            exploration.batch_finished(1.0)
            gap += 1
    assert gaps == sorted(gaps)
    assert gaps[-1] == LAST_PATIENCE


def test_a_try_that_won_is_repeated_soon() -> None:
    exploration = Exploration()
    for _ in range(8):
        exploration.batch_finished(1.0)
    assert exploration.is_due(0.0)
    exploration.try_finished(-1.0)
    for _ in range(8):
        exploration.batch_finished(1.0)
    assert exploration.is_due(0.0)
