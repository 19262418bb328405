"""The cost model finds the costs of any device from a few noisy batches, and follows them when they change."""

import json
import math
import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modalkit.batching import CostFeature, MeasuredCostModel, PaddedCostModel
from modalkit.batching.least_squares import solve_nonnegative

Seconds = Callable[[int, int], float]


def cpu(count: int, longest: int) -> float:
    tokens = count * longest
    return 0.005 + 0.00008 * tokens + 1.5e-7 * tokens * longest


def gpu(count: int, longest: int) -> float:
    """Flat until the device is full."""
    return max(0.004, 0.001 + 5e-6 * count * longest)


def batches(number: int, seed: int = 0) -> list[tuple[int, int]]:
    chance = random.Random(seed)
    return [(chance.choice([1, 2, 4, 8, 16, 32]), chance.randint(4, 256)) for _ in range(number)]


def errors(model: MeasuredCostModel, truth: Seconds) -> list[float]:
    return sorted(abs(model.predict_s(n, size, n * size) / truth(n, size) - 1) for n, size in batches(200, seed=1))


def taught(
    truth: Seconds, number: int = 100, noise: float = 0.1, outliers: float = 0.0, factor: float = 20.0
) -> MeasuredCostModel:
    model, chance = MeasuredCostModel(), random.Random(2)
    for count, size in batches(number):
        seconds = truth(count, size) * chance.lognormvariate(0, noise)
        model.observe(count, size, count * size, seconds * (factor if chance.random() < outliers else 1))
    return model


def test_before_anything_is_observed_it_predicts_the_documented_defaults() -> None:
    model, default = MeasuredCostModel(), PaddedCostModel()
    for count, size in [(1, 8), (8, 32), (32, 128)]:
        assert model.predict_s(count, size, 0) == pytest.approx(default.predict_s(count, size, 0), rel=0.05)


@pytest.mark.parametrize("truth", [cpu, gpu])
def test_a_hundred_noisy_batches_are_enough_for_a_median_error_below_a_tenth(truth: Seconds) -> None:
    assert errors(taught(truth), truth)[100] < 0.1


@pytest.mark.parametrize("truth", [cpu, gpu])
def test_batches_that_took_twenty_times_as_long_hardly_change_it(truth: Seconds) -> None:
    assert errors(taught(truth, outliers=0.05), truth)[100] < 0.15


@pytest.mark.parametrize("truth", [cpu, gpu])
def test_batches_that_took_next_to_no_time_hardly_change_it(truth: Seconds) -> None:
    model = taught(truth, 1000, outliers=0.02, factor=0.001)
    assert errors(model, truth)[100] < 0.15
    assert errors(model, truth)[190] < 0.4


def test_a_slow_batch_teaches_nothing_if_it_is_the_first_of_its_number_of_requests() -> None:
    model = taught(gpu, noise=0.0)
    before_s = model.predict_s(24, 64, 1536)
    model.observe(24, 64, 1536, 1.0)
    assert model.predict_s(24, 64, 1536) == before_s
    for _ in range(8):
        model.observe(24, 64, 1536, 1.0)
    assert model.predict_s(24, 64, 1536) > 10 * before_s, "later ones do"


def test_it_follows_a_device_that_becomes_five_times_as_slow() -> None:
    model = taught(cpu, 300)
    for count, size in batches(50, seed=3):
        model.observe(count, size, count * size, 5 * cpu(count, size))
    assert errors(model, lambda n, size: 5 * cpu(n, size))[100] < 0.15


def test_numbers_of_requests_that_were_never_as_predicted_say_nothing_about_the_device() -> None:
    """Beyond a cliff the costs are wrong; those below it are not, and the scheduler would leave that size for good."""
    model = taught(cpu)
    before_s = model.predict_s(8, 32, 256)
    for count in (100, 100, 90, 90, 110, 110, 120, 120):
        model.observe(count, 32, count * 32, 3 * model.predict_s(count, 32, count * 32))
    assert model.predict_s(8, 32, 256) == pytest.approx(before_s, rel=0.3)


def test_a_device_that_is_slower_than_when_the_costs_were_learnt_is_followed() -> None:
    model, restored = taught(cpu), MeasuredCostModel()
    restored.restore(json.loads(json.dumps(model.state())))
    for count, size in batches(20, seed=3):
        restored.observe(count, size, count * size, 5 * cpu(count, size))
    assert errors(restored, lambda n, size: 5 * cpu(n, size))[100] < 0.15


def test_calibrated_shapes_are_remembered_for_sizes_that_no_batch_has_lately_had() -> None:
    model = MeasuredCostModel()
    for count, size in [(1, 8), (1, 64), (1, 256), (8, 8), (8, 64), (8, 256), (32, 64)]:
        model.calibrate(count, size, count * size, cpu(count, size))
    for _ in range(2000):
        model.observe(1, 16, 16, cpu(1, 16))
    assert model.predict_s(8, 256, 2048) == pytest.approx(cpu(8, 256), rel=0.2)


def test_a_pipeline_that_does_not_pad_is_predicted_by_the_sum_of_sizes() -> None:
    model, chance = MeasuredCostModel(CostFeature.TOTAL), random.Random(4)
    for _ in range(100):
        count, longest = chance.randint(1, 32), chance.randint(50, 256)
        total = chance.randint(longest + count, longest * count + 1)
        model.observe(count, longest, total, 0.002 + 0.0001 * total)
    assert model.predict_s(10, 200, 500) == pytest.approx(0.052, rel=0.05)


@pytest.mark.parametrize("elapsed_s", [0.0, -1.0, math.nan, math.inf])
def test_what_is_no_time_is_not_learnt(elapsed_s: float) -> None:
    model = taught(cpu)
    costs = model.costs
    for _ in range(100):
        model.observe(8, 32, 256, elapsed_s)
    assert model.costs == costs
    with pytest.raises(ValueError, match="elapsed_s must be a positive time, got"):
        model.calibrate(8, 32, 256, elapsed_s)


@given(st.lists(st.tuples(st.integers(1, 1000), st.integers(1, 2**31), st.floats(1e-6, 1e4)), max_size=40))
def test_whatever_is_observed_costs_are_not_negative_and_predictions_positive_and_finite(
    observed: list[tuple[int, int, float]],
) -> None:
    model = MeasuredCostModel()
    for count, size, seconds in observed:
        model.observe(count, size, count * size, seconds)
    predictions = [model.predict_s(n, 50, 50 * n) for n in (1, 2, 10, 100, 10_000)]
    assert all(0 < prediction < math.inf for prediction in predictions)
    assert all(cost >= 0 for cost in model.costs.values())


def test_it_forgets_nothing_by_way_of_its_state() -> None:
    model = taught(cpu, 400)
    restored = MeasuredCostModel()
    restored.restore(json.loads(json.dumps(model.state())))
    assert restored.costs == pytest.approx(model.costs)
    assert restored.observed == model.observed
    for one in (model, restored):
        for count, size in batches(50, seed=5):
            one.observe(count, size, count * size, cpu(count, size) / 3)
    assert restored.costs == pytest.approx(model.costs)


def broken_states() -> list[object]:
    good = MeasuredCostModel().state()
    return [
        {},
        {**good, "version": 0},
        {**good, "feature": "total"},
        {**good, "kept": {"matrix": [[1.0]], "vector": [1.0]}},
        {**good, "recent": {**good["recent"], "vector": [math.nan] * 15}},
        {**good, "recent": {**good["recent"], "vector": ["x"] * 15}},
        {**good, "newest_weight": 0},
        {**good, "error": math.nan},
        {**good, "deviations": [[1, math.nan, 1, 1.0]]},
        {**good, "deviations": [[1, 0.1]]},
        {key: value for key, value in good.items() if key != "kept"},
    ]


@pytest.mark.parametrize("state", broken_states())
def test_a_state_that_was_never_one_is_refused_and_changes_nothing(state: dict[str, object]) -> None:
    model = taught(cpu)
    costs = model.costs
    with pytest.raises(ValueError, match=r"."):
        model.restore(state)
    assert model.costs == costs


@given(
    st.lists(st.lists(st.floats(0, 10), min_size=3, max_size=3), min_size=3, max_size=12),
    st.lists(st.floats(0, 10), min_size=3, max_size=3),
)
def test_nonnegative_least_squares_finds_a_minimum(rows: list[list[float]], truth: list[float]) -> None:
    """At a minimum no unknown can be moved, within its bound, to lower the error."""
    values = [sum(a * x for a, x in zip(row, truth, strict=True)) - 1 for row in rows]
    matrix = [[sum(row[i] * row[j] for row in rows) for j in range(3)] for i in range(3)]
    vector = [sum(row[i] * value for row, value in zip(rows, values, strict=True)) for i in range(3)]

    def error(x: list[float]) -> float:
        return sum(
            (sum(a * b for a, b in zip(row, x, strict=True)) - v) ** 2 for row, v in zip(rows, values, strict=True)
        )

    found = solve_nonnegative(matrix, vector, [1.0] * 3)
    assert all(x >= 0 for x in found)
    least = error(found)
    for i in range(3):
        for step in (1e-2, -1e-2):
            moved = [max(0.0, x + step) if i == j else x for j, x in enumerate(found)]
            assert error(moved) >= least - 1e-4 * (1 + least)


def steps(count: int, longest: int) -> float:
    """Tiles of eight requests: nine cost as much as sixteen."""
    return 0.01 * -(-count // 8)


def test_steps_are_learnt_which_no_sum_of_costs_has() -> None:
    model = MeasuredCostModel()
    for count in [8, 9, 16, 12, 8, 9, 24, 16, 9, 8, 12, 9, 16, 8, 9] * 3:
        model.observe(count, 1, count, steps(count, 1))
    assert model.predict_s(8, 1, 8) / 8 < 0.85 * model.predict_s(9, 1, 9) / 9


@pytest.mark.parametrize("seconds", [1e-5, 1.0, 60.0])
@pytest.mark.parametrize("size", [1, 20, 1_000_000])
def test_nothing_that_was_assumed_outlives_the_first_batches(seconds: float, size: int) -> None:
    """A batch of any length, whatever is in it: the case in which assumed costs of milliseconds once outvoted it."""
    model = MeasuredCostModel()
    for count in (8, 32, 3):
        model.observe(count, size, count * size, seconds)
    for count in (1, 3, 8, 32):
        assert model.predict_s(count, size, count * size) == pytest.approx(seconds, rel=0.02)


def test_a_model_that_has_been_wrong_lately_is_not_trusted_until_it_is_right_again() -> None:
    model = taught(cpu)
    assert model.is_trusted
    chance = random.Random(6)
    for count, size in batches(6, seed=7):
        model.observe(count, size, count * size, cpu(count, size) * chance.choice([10, 0.1]))
    assert not model.is_trusted
    for count, size in batches(40, seed=8):
        model.observe(count, size, count * size, cpu(count, size))
    assert model.is_trusted


@pytest.mark.parametrize("declared", CostFeature)
@pytest.mark.parametrize("true", CostFeature)
def test_the_padded_or_the_plain_sum_is_found_whichever_was_declared(declared: CostFeature, true: CostFeature) -> None:
    model, chance = MeasuredCostModel(declared), random.Random(4)

    def truth(count: int, longest: int, total: int) -> float:
        return 0.002 + 0.0001 * (count * longest if true is CostFeature.PADDED else total)

    def shape() -> tuple[int, int, int]:
        count, longest = chance.randint(1, 32), chance.randint(50, 256)
        return count, longest, longest + sum(chance.randint(1, longest) for _ in range(count - 1))

    for _ in range(150):
        drawn = shape()
        model.observe(*drawn, truth(*drawn))
    off = sorted(abs(model.predict_s(*drawn) / truth(*drawn) - 1) for drawn in (shape() for _ in range(100)))
    assert off[50] < 0.1
