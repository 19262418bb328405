"""How thoroughly a pipeline is measured, and what ends it."""

import asyncio
from itertools import count
from statistics import median
from typing import Any

import pytest
from pydantic import BaseModel

from modalkit.batching.calibration import Calibration
from modalkit.pipelines import BatchTooLargeError
from modalkit.service.settings import BatchConfig
from modalkit.service.tuning import TuningError
from modalkit.service.tuning.measuring import fitted_costs, measure
from tests.support.length_model import LengthPipeline


class SmallDevice(LengthPipeline):
    """Has no room for more than 100 characters, padding included."""

    def predict(self, input_list: list[BaseModel], preprocessed_data: dict[str, Any]) -> dict[str, Any]:
        texts = preprocessed_data["texts"]
        if len(texts) * max(map(len, texts)) > 100:
            raise BatchTooLargeError("out of room")
        return super().predict(input_list, preprocessed_data)


class Failing(LengthPipeline):
    def predict(self, input_list: list[BaseModel], preprocessed_data: dict[str, Any]) -> dict[str, Any]:
        if len(input_list) > 2:
            raise RuntimeError("three are too many")
        return super().predict(input_list, preprocessed_data)


class Sizeless(LengthPipeline):
    def item_size(self, item: BaseModel) -> int:
        return 0


class Sampleless(LengthPipeline):
    def sample_items(self, n: int, size: int) -> list[BaseModel]:
        return []


class Short(LengthPipeline):
    """Takes no more than 100 characters."""

    def predict(self, input_list: list[BaseModel], preprocessed_data: dict[str, Any]) -> dict[str, Any]:
        if max(map(len, preprocessed_data["texts"])) > 100:
            raise IndexError("index out of range in self")
        return super().predict(input_list, preprocessed_data)


class Slow(LengthPipeline):
    """Moves the clock by `seconds`, whatever it is given."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds
        self.now = 0.0

    def predict(self, input_list: list[BaseModel], preprocessed_data: dict[str, Any]) -> dict[str, Any]:
        self.now += self.seconds
        return super().predict(input_list, preprocessed_data)

    def measured(self, max_s: float) -> Calibration[BaseModel]:
        return measure(self, BatchConfig(), max_s, clock=lambda: self.now)


def test_batches_larger_than_configured_are_measured_too() -> None:
    measured = measure(LengthPipeline(), BatchConfig(max_batch_size=4), 60)
    assert {(1, 8), (128, 8), (128, 1000)} <= {(shape.count, shape.longest) for shape in measured.measurements}
    assert measured.too_large_tokens is None
    assert measured.failure is None
    assert measured.is_complete


def test_no_batch_is_larger_than_the_queue_or_the_configured_tokens() -> None:
    measured = measure(LengthPipeline(), BatchConfig(max_batch_size=4, max_queue_size=16, max_batch_tokens=64), 60)
    assert max(shape.count for shape in measured.measurements) <= 16
    assert max(shape.count * shape.longest for shape in measured.measurements) == 64
    assert measured.is_complete


def test_a_batch_too_large_for_the_device_ends_it_with_what_there_is() -> None:
    measured = measure(SmallDevice(), BatchConfig(), 60)
    assert max(shape.count * shape.longest for shape in measured.measurements) == 64
    assert measured.too_large_tokens == 128
    assert (1, 64) in {(shape.count, shape.longest) for shape in measured.measurements}


def test_sizes_past_what_the_model_takes_are_not_tried_and_told() -> None:
    measured = measure(Short(), BatchConfig(), 60)
    assert {shape.longest for shape in measured.measurements} == {8, 16, 32, 64}
    assert max(shape.count for shape in measured.measurements) == 128
    assert measured.failure is not None
    assert (measured.failure.size, type(measured.failure.error)) == (128, IndexError)
    assert measured.is_complete


@pytest.mark.parametrize(("seconds", "max_s"), [(1.0, 60), (5.0, 60), (30.0, 400)])
def test_slow_batches_are_measured_at_the_extremes_and_leave_time_to_try_limits(seconds: float, max_s: float) -> None:
    pipeline = Slow(seconds)
    measured = pipeline.measured(max_s)
    assert {(1, 8), (128, 8)} <= {(shape.count, shape.longest) for shape in measured.measurements}
    assert pipeline.now <= max_s * 0.66 + seconds
    assert max_s - pipeline.now >= 8 * seconds
    assert not measured.is_complete


@pytest.mark.parametrize("seconds", [60.0, 1000.0])
def test_a_model_too_slow_for_the_time_is_warmed_up_and_told(seconds: float) -> None:
    pipeline = Slow(seconds)
    with pytest.raises(TuningError, match=f"warming up took {seconds:,.1f} s; raise --max-seconds"):
        pipeline.measured(60)
    assert len(pipeline.batches) == 1


def test_the_time_limit_ends_it_with_what_there_is() -> None:
    seconds = count()  # every look at the clock takes a second
    measured = measure(LengthPipeline(), BatchConfig(), 100, clock=lambda: next(seconds))
    assert 1 < len(measured.measurements) < 20
    assert not measured.is_complete


@pytest.mark.parametrize(("config", "max_s"), [(BatchConfig(), 1e-9), (BatchConfig(max_batch_tokens=4), 60)])
def test_limits_that_nothing_fits_are_named(config: BatchConfig, max_s: float) -> None:
    with pytest.raises(TuningError, match=r"raise --max-seconds or batch_config\.max_batch_tokens"):
        measure(LengthPipeline(), config, max_s)


@pytest.mark.parametrize(
    ("pipeline", "message"),
    [
        (Sampleless(), r"implement sample_items\(n, size\).* --samples FILE"),
        (Sizeless(), "item_size returned 0, which must be from 1 to"),
        (Failing(), "after a batch of .* of size .*RuntimeError: three are too many"),
    ],
)
def test_a_pipeline_that_cannot_be_measured_is_told_why(pipeline: LengthPipeline, message: str) -> None:
    with pytest.raises(TuningError, match=message):
        measure(pipeline, BatchConfig(), 60)


def test_each_shape_is_told_as_it_is_measured() -> None:
    told: list[object] = []
    assert told == [] != measure(LengthPipeline(), BatchConfig(), 60, on_shape=told.append).measurements == told


def test_the_costs_are_fitted_to_all_the_measurements() -> None:
    shapes = measure(LengthPipeline(), BatchConfig(), 60).measurements
    costs = fitted_costs(LengthPipeline(), shapes)
    assert costs.observed == len(shapes)
    assert median(abs(costs.predict_s(s.count, s.longest, s.total) / s.seconds - 1) for s in shapes) < 1


class LoadsLater(LengthPipeline):
    """Loads its model from a network when it warms up."""

    is_loaded = False

    async def warm_up(self) -> None:
        await asyncio.sleep(0)
        self.is_loaded = True

    def predict(self, input_list: list[BaseModel], preprocessed_data: dict[str, Any]) -> dict[str, Any]:
        assert self.is_loaded
        return super().predict(input_list, preprocessed_data)


def test_an_asynchronous_warm_up_is_awaited() -> None:
    assert measure(LoadsLater(), BatchConfig(), 60).is_complete
