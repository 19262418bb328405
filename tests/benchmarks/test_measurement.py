"""What counts in a run, and what a target is met by."""

import math
from collections.abc import Iterator

import pytest

from modalkit.benchmarks.measurement import Figure, Rounds


def counting(name: str, values: Iterator[float], order: list[str]) -> dict[str, float]:
    order.append(name)
    return {name: next(values)}


def test_every_other_round_goes_the_opposite_way() -> None:
    order: list[str] = []
    rounds = Rounds([lambda: counting("a", iter([1.0]), order), lambda: counting("b", iter([1.0]), order)])
    rounds.run()
    rounds.run()
    rounds.run()
    assert order == ["a", "b", "b", "a", "a", "b"]


def test_a_ratio_is_the_median_of_each_rounds_own_ratio() -> None:
    ours, theirs = iter([1.0, 20.0, 3.0]), iter([2.0, 10.0, 4.0])
    rounds = Rounds([lambda: {"ours": next(ours)}, lambda: {"theirs": next(theirs)}])
    for _ in range(3):
        rounds.run()
    figure = rounds.ratio("ours", "theirs", "ours / theirs", at_most=1)
    assert figure.rounds == (0.5, 2.0, 0.75)
    assert figure.value == 0.75
    assert figure.is_met


def test_a_ratio_of_values_from_different_rounds_is_refused() -> None:
    rounds = Rounds([lambda: {"a": 1.0, "b": math.nan}])
    rounds.run()
    with pytest.raises(ValueError, match="zip"):
        rounds.ratio("a", "b", "a / b")


@pytest.mark.parametrize(
    ("figure", "is_met"),
    [
        (Figure(name="low enough", rounds=(1.0,), at_most=1), True),
        (Figure(name="too high", rounds=(1.01,), at_most=1), False),
        (Figure(name="high enough", rounds=(1.0,), at_least=1), True),
        (Figure(name="too low", rounds=(0.99,), at_least=1), False),
        (Figure(name="only told", rounds=(1.0,)), None),
        (Figure(name="not measured", rounds=(), at_most=1), None),
    ],
)
def test_a_target_is_met_or_missed(figure: Figure, is_met: bool | None) -> None:
    assert figure.is_met is is_met


def test_what_a_contender_could_not_measure_has_no_value() -> None:
    rounds = Rounds([lambda: {"padding": math.nan}])
    rounds.run()
    assert math.isnan(rounds.figure("padding", "padding", "").value)
