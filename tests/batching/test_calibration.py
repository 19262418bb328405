"""Calibration measures what it can in the time it has, on a clock that the pipeline itself moves."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modalkit.batching.calibration import Calibration, Measurement, believed_measurements, credible, undisturbed

Costs = Callable[[int, int], float]
"""Seconds of a batch of so many requests, the largest of that size."""

MOST_S = 60.0


def linear(count: int, size: int) -> float:
    return 0.001 + 0.0001 * count * size


class Device:
    """A batch moves the clock by what it costs; items are their sizes, at most `largest`."""

    def __init__(self, costs: Costs = linear, slowdown: float = 1.0, largest: int = 100) -> None:
        self.now = 0.0
        self.costs = costs
        self.slowdown = slowdown
        self.largest = largest
        self.ran: list[tuple[int, int]] = []

    def run(self, items: list[int]) -> None:
        self.ran.append((len(items), max(items)))
        self.now += self.slowdown * self.costs(len(items), max(items))

    def sample_items(self, n: int, size: int) -> list[int]:
        return [min(size, self.largest)] * n

    def calibration(self, **options: Any) -> Calibration[int]:
        return Calibration(
            run=self.run, sample_items=self.sample_items, item_size=int, clock=lambda: self.now, **options
        )

    def shapes(self, **options: Any) -> list[tuple[int, int]]:
        return [(m.count, m.longest) for m in self.calibration(**options).measure()]


def test_it_covers_counts_and_sizes_up_to_the_limits_of_both() -> None:
    device = Device()
    measured = list(device.calibration(max_count=10, max_s=100).measure())
    assert {(m.count, m.longest) for m in measured} == {(n, s) for n in (1, 4, 10) for s in (8, 32, 100)}
    for m in measured:
        assert m.total == m.count * m.longest
        assert m.seconds == pytest.approx(0.001 + 0.0001 * m.total)


def test_it_ends_in_time_however_slow_the_device_is() -> None:
    device = Device(slowdown=30)
    measured = list(device.calibration(max_count=32, max_s=3.0).measure())
    assert measured
    assert device.now <= 3.0


def test_a_device_so_slow_that_one_shape_takes_all_the_time_is_measured_once() -> None:
    device = Device(slowdown=10_000)
    assert len(list(device.calibration(max_count=32, max_s=3.0).measure())) == 1


def test_no_shape_exceeds_the_token_budget() -> None:
    device = Device()
    measured = list(device.calibration(max_count=32, max_tokens=200, max_s=100).measure())
    assert max(m.count * m.longest for m in measured) <= 200
    assert (1, 100) in device.ran


def test_a_first_run_that_is_slow_does_not_count() -> None:
    device = Device()
    warm: set[tuple[int, int]] = set()
    run = device.run

    def run_cold(items: list[int]) -> None:
        run(items)
        if (shape := (len(items), max(items))) not in warm:
            warm.add(shape)
            device.now += 0.05

    device.run = run_cold  # type: ignore[method-assign]
    for m in device.calibration(max_count=4, max_s=100).measure():
        assert m.seconds < 0.05


def test_a_pipeline_that_makes_up_no_items_is_not_measured() -> None:
    calibration = replace(Device().calibration(max_count=32), sample_items=lambda _n, _size: [])
    assert list(calibration.measure()) == []


def test_a_pipeline_that_makes_up_too_few_items_is_told_so() -> None:
    calibration = replace(Device().calibration(max_count=32), sample_items=lambda _n, size: [size])
    with pytest.raises(ValueError, match=r"sample_items\(32, 8\) returned 1 items"):
        list(calibration.measure())


def fixed(_count: int, _size: int) -> float:
    return 1.0


def test_three_slow_batches_are_enough_to_tell_that_their_cost_is_fixed() -> None:
    device = Device(fixed)
    assert device.shapes(max_count=32, max_s=3.0) == [(1, 8), (2, 8), (32, 8)]
    assert len(device.ran) == 3, "none of them was run twice"


def test_slow_batches_that_grow_with_each_request_are_not_begun_when_they_would_overrun() -> None:
    device = Device(lambda count, _size: 1.0 * count)
    assert device.shapes(max_count=32, max_s=3.0) == [(1, 8), (2, 8)]
    assert device.now == 3.0


def test_the_extremes_come_first() -> None:
    assert Device().shapes(max_count=32, max_s=100)[:3] == [(1, 8), (32, 8), (1, 100)]


def test_with_more_time_slow_batches_are_measured_at_the_extremes_first() -> None:
    assert Device(fixed, largest=512).shapes(max_count=128, max_s=36.0, step=2, rounds=5)[:5] == [
        (1, 8),
        (16, 8),  # more of them might have taken too long
        (128, 8),
        (1, 128),
        (1, 512),
    ]


def test_a_second_run_of_a_slow_batch_is_made_where_it_takes_little_of_the_time() -> None:
    """The first one may have compiled something: 0.3 s the first time, then 10 ms."""
    device = Device()
    seen: set[tuple[int, int]] = set()

    def compiled(count: int, size: int) -> float:
        is_new = (count, size) not in seen
        seen.add((count, size))
        return 0.3 if is_new else 0.01

    device.costs = compiled
    measured = list(device.calibration(max_count=32, max_s=3.0).measure())
    assert [m.seconds for m in measured] == pytest.approx([0.01] * len(measured))
    assert len(measured) > 5
    assert device.now <= 3.3


def test_a_slow_first_run_that_could_not_be_repeated_is_not_believed() -> None:
    """The first batch of several requests takes 1.1 s, because something is compiled, and later ones 20 ms."""
    device = Device()
    seen = {1}

    def compiled(count: int, _size: int) -> float:
        is_new = count not in seen
        seen.add(count)
        return 1.1 if is_new else 0.02

    device.costs = compiled
    measured = list(device.calibration(max_count=32, max_s=3.0).measure())
    assert max(m.seconds for m in measured) == pytest.approx(1.1)
    assert max(m.seconds for m in credible(measured)) == pytest.approx(0.02)


def test_batches_of_a_second_are_believed_though_each_ran_once() -> None:
    measured = list(Device(fixed).calibration(max_count=32, max_s=3.0).measure())
    assert len(measured) == 3
    assert credible(measured) == measured


def test_a_batch_out_of_memory_leaves_out_those_as_large_and_no_others() -> None:
    def run_small(count: int, size: int) -> float:
        if count * size > 300:
            raise MemoryError
        return linear(count, size)

    calibration = Device(run_small).calibration(max_count=64, max_s=100)
    measured = {(m.count, m.longest) for m in calibration.measure()}
    assert measured == {(n, s) for n in (1, 4, 16, 64) for s in (8, 32, 100) if n * s <= 300}
    assert calibration.too_large_tokens == 400
    assert calibration.failure is None
    assert calibration.is_complete


def test_sizes_that_the_model_does_not_take_are_left_out_and_told() -> None:
    def run_short(count: int, size: int) -> float:
        if size > 64:
            raise IndexError("index out of range in self")
        return linear(count, size)

    calibration = Device(run_short, largest=2**20).calibration(max_count=8, max_s=100)
    assert {(m.count, m.longest) for m in calibration.measure()} == {(n, s) for n in (1, 4, 8) for s in (8, 32)}
    assert calibration.failure is not None
    assert (calibration.failure.size, str(calibration.failure.error)) == (128, "index out of range in self")
    assert calibration.too_large_tokens is None


def test_sizes_that_cannot_be_made_up_are_left_out_and_told() -> None:
    device = Device(largest=2**20)
    made = device.sample_items

    def sample_items(n: int, size: int) -> list[int]:
        if size > 64:
            raise ValueError("at most 64")
        return made(n, size)

    calibration = replace(device.calibration(max_count=1), sample_items=sample_items)
    assert [m.longest for m in calibration.measure()] == [8, 32]
    assert calibration.failure is not None
    assert calibration.failure.size == 128


def test_a_pipeline_that_fails_for_its_smallest_item_is_told_so() -> None:
    def fail(_count: int, _size: int) -> float:
        raise KeyError("weights")

    with pytest.raises(KeyError, match="weights"):
        Device(fail).shapes(max_count=8)


def test_a_pipeline_that_takes_one_item_but_not_several_is_told_so() -> None:
    def run_alone(count: int, _size: int) -> float:
        if count > 1:
            raise TypeError("not a batch")
        return 0.001

    with pytest.raises(TypeError, match="not a batch"):
        Device(run_alone).shapes(max_count=8)


def test_given_sizes_are_asked_for_instead_of_powers() -> None:
    calibration = replace(Device().calibration(max_count=4), sizes=[11, 90])
    assert {m.longest for m in calibration.measure()} == {11, 90}


def test_what_a_pipeline_does_to_the_list_it_is_given_is_not_measured_again() -> None:
    device = Device()
    run = device.run

    def run_and_clear(items: list[int]) -> None:
        run(items)
        items.clear()

    calibration = replace(device.calibration(max_count=4), run=run_and_clear)
    assert len(list(calibration.measure())) == 6


def test_a_batch_takes_no_longer_than_a_larger_one() -> None:
    measured = [Measurement(1, 8, 8, 5.0), Measurement(2, 8, 16, 0.11), Measurement(4, 8, 32, 0.1)]
    other_size = Measurement(1, 9, 9, 7.0)
    assert undisturbed([*measured, other_size]) == [Measurement(1, 8, 8, 0.1), *measured[1:], other_size]


def test_a_first_run_that_is_not_believed_makes_no_smaller_batch_seem_disturbed() -> None:
    slow_once = Measurement(4, 8, 32, 9.0, is_repeated=False)
    others = [Measurement(1, 8, 8, 5.0), Measurement(2, 8, 16, 0.11), Measurement(8, 8, 64, 0.2)]
    assert believed_measurements([*others, slow_once]) == [Measurement(1, 8, 8, 0.11), *others[1:]]


@given(seconds=st.lists(st.floats(1e-6, 100), min_size=1, max_size=8))
def test_only_what_took_much_longer_than_a_larger_batch_is_corrected(seconds: list[float]) -> None:
    measured = [Measurement(n, 8, 8 * n, s) for n, s in enumerate(seconds, start=1)]
    for before, after in zip(measured, undisturbed(measured), strict=True):
        larger_s = min(seconds[before.count - 1 :])
        assert after.seconds == (before.seconds if before.seconds <= 1.5 * larger_s else larger_s)


costs_of_any_kind = st.one_of(
    st.builds(lambda s: lambda _n, _size: s, st.floats(1e-5, MOST_S)),
    st.builds(lambda a, b: lambda n, _size: a + b * n, st.floats(1e-5, 10), st.floats(1e-6, 10)),
    st.builds(lambda a, b: lambda n, size: a + b * n * size, st.floats(1e-5, 10), st.floats(1e-7, 1)),
    st.builds(
        lambda a, tile: lambda n, size: a * math.ceil(n * size / tile),
        st.floats(1e-5, 2),
        st.sampled_from([1, 8, 64, 100, 1024]),
    ),
)


@given(
    costs=costs_of_any_kind,
    max_count=st.integers(1, 256),
    max_s=st.floats(0.1, 100),
    step=st.sampled_from([2, 4]),
    rounds=st.integers(1, 5),
    largest=st.sampled_from([1, 9, 100, 512, 10**6]),
)
def test_time_is_bounded_whatever_batches_cost(
    costs: Costs, max_count: int, max_s: float, step: int, rounds: int, largest: int
) -> None:
    """Costs that grow in proportion to the tokens at most overrun by a tenth of the time; a first batch always runs."""
    device = Device(costs, largest=largest)
    calibration = device.calibration(max_count=max_count, max_s=max_s, step=step, rounds=rounds)
    measured = list(calibration.measure())
    assert measured
    longest_s = max(m.seconds for m in measured)
    assert device.now <= max(1.1 * max_s, measured[0].seconds) + _overrun_of_steps(costs, longest_s)
    assert len(set(device.ran)) == len(measured), "no shape is measured twice"
    if calibration.is_complete:
        assert (max_count, max(m.longest for m in measured)) in {(m.count, m.longest) for m in measured}


def _overrun_of_steps(costs: Costs, longest_s: float) -> float:
    """Flat up to a tile, and then in proportion: what looked like a fixed cost may turn out to be none, once."""
    return longest_s if costs(1, 1) == costs(1, 2) != costs(256, 10**6) else 0.0


@given(exponent=st.floats(1.1, 2.0), cost_s=st.floats(1e-7, 1e-3), max_s=st.floats(1, 60))
def test_time_that_grows_faster_than_the_size_overruns_by_one_batch_at_most(
    exponent: float, cost_s: float, max_s: float
) -> None:
    device = Device(lambda n, size: cost_s * n * size**exponent, largest=10**6)
    measured = list(device.calibration(max_count=32, max_s=max_s).measure())
    assert device.now <= 1.1 * max_s + measured[-1].seconds
