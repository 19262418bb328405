"""A ceiling comes down at once, goes up slowly, and leaves alone what is known to fit."""

import math

from hypothesis import given
from hypothesis import strategies as st

from modalkit.batching.ceiling import Ceiling


def test_there_is_none_until_a_batch_was_too_large() -> None:
    ceiling = Ceiling()
    for _ in range(1000):
        ceiling.fitted(10_000)
    assert ceiling.tokens == math.inf


def test_it_is_half_of_what_did_not_fit_or_what_did_if_that_is_more() -> None:
    ceiling = Ceiling()
    ceiling.too_large(1000)
    assert ceiling.tokens == 500
    ceiling = Ceiling()
    ceiling.fitted(900)
    ceiling.too_large(1000)
    assert ceiling.tokens == 900


def test_what_once_fitted_does_not_count_after_less_did_not() -> None:
    ceiling = Ceiling()
    ceiling.fitted(900)
    ceiling.too_large(600)
    assert ceiling.tokens == 300


def test_a_batch_above_it_never_raises_it() -> None:
    """A request that is too large alone is tried all the same, and fails; so may a batch formed before it was known."""
    ceiling = Ceiling()
    ceiling.too_large(1000)
    ceiling.too_large(5000)
    assert ceiling.tokens == 500


@given(st.integers(100, 100_000))
def test_a_device_with_a_fixed_limit_is_seldom_asked_for_more(limit: int) -> None:
    """Batches are as large as the ceiling lets them; above the limit they fail and are halved."""
    ceiling = Ceiling()
    ceiling.too_large(2 * limit)
    failures = 0
    for _ in range(5000):
        tokens = int(ceiling.tokens)
        if tokens > limit:
            failures += 1
            ceiling.too_large(tokens)
        else:
            ceiling.fitted(tokens)
    assert failures <= 12
    assert ceiling.tokens >= 0.8 * limit
