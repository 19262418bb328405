"""Calibration measures what it can in the time it has, on a clock that the pipeline itself moves."""

from dataclasses import replace
from typing import Any

import pytest

from batching.calibration import Calibration


class Device:
    """A batch of n items of size s moves the clock by 1 ms + 0.1 ms x n x s; items are their sizes, at most 100."""

    def __init__(self, slowdown: float = 1.0) -> None:
        self.now = 0.0
        self.slowdown = slowdown
        self.ran: list[tuple[int, int]] = []

    def run(self, items: list[int]) -> None:
        self.ran.append((len(items), max(items)))
        self.now += self.slowdown * (0.001 + 0.0001 * len(items) * max(items))

    def sample_items(self, n: int, size: int) -> list[int]:
        return [min(size, 100)] * n

    def calibration(self, **options: Any) -> Calibration[int]:
        return Calibration(
            run=self.run, sample_items=self.sample_items, item_size=int, clock=lambda: self.now, **options
        )


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
    with pytest.raises(ValueError, match=r"sample_items\(4, 8\) returned 1 items"):
        list(calibration.measure())
