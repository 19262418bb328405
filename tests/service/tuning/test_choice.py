"""Which limits follow from which costs."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from modalkit.batching import BatchPolicy, CostModel, PaddedCostModel
from modalkit.batching.calibration import Calibration, Measurement
from modalkit.service.tuning import TuningError, choice
from modalkit.service.tuning.choice import ChosenLimits, lone_sizes, predicted_capacity

CPU = PaddedCostModel(fixed_s=0.001, token_s=0.0001)  # a request of size 64 costs 6 times what a batch does
GPU = PaddedCostModel(fixed_s=0.010, token_s=0.000_001)  # 10,000 tokens cost what a batch does
COUNTS = (1, 2, 4, 8, 16, 32, 64, 128)
SIZES = (8, 64, 512)


def measured(
    model: CostModel, counts: Sequence[int] = COUNTS, sizes: Sequence[int] = SIZES, most_tokens: int = 2**16
) -> list[Measurement]:
    return [
        Measurement(count, size, count * size, model.predict_s(count, size, count * size))
        for count in counts
        for size in sizes
        if count * size <= most_tokens
    ]


def choose_limits(
    measurements: Sequence[Measurement], model: CostModel, objective_s: float | None = None, **options: Any
) -> ChosenLimits:
    """With limits that are configured as they are by default."""
    return choice.choose_limits(measurements, model, objective_s, **{"configured": BatchPolicy()} | options)


def test_without_an_objective_only_the_batch_size_is_chosen() -> None:
    assert choose_limits(measured(GPU), GPU).values == {"max_batch_size": 128}


def test_every_key_has_a_reason_of_one_line() -> None:
    for objective_s in (None, 0.5):
        reasons = choose_limits(measured(CPU), CPU, objective_s).reasons
        assert set(reasons) == {"max_batch_size", "wait_ms", "max_batch_tokens", "max_batch_seconds"}
        assert all(reason and "\n" not in reason for reason in reasons.values())


def test_batches_are_no_larger_than_what_adds_two_percent() -> None:
    # At size 64, n requests take 1 + 6.4 n ms: 8 reach 98.1 % of the limit, 4 only 96.2 %.
    assert choose_limits(measured(CPU, sizes=(64,)), CPU).values["max_batch_size"] == 8


def test_the_size_that_profits_most_decides() -> None:
    # At size 8, n requests take 1 + 0.8 n ms: 32 reach 97.2 % of what 128 do, 64 reach 99.0 %.
    chosen = choose_limits(measured(CPU), CPU)
    assert chosen.values["max_batch_size"] == 64
    assert "size 8 " in chosen.reasons["max_batch_size"]


def test_batches_that_still_pay_at_the_end_are_said_to() -> None:
    chosen = choose_limits(measured(GPU), GPU)
    assert chosen.values["max_batch_size"] == 128
    assert "the largest measured; over 64, it still adds" in chosen.reasons["max_batch_size"]


def test_a_limit_is_raised_only_to_what_was_measured() -> None:
    shapes = measured(GPU, sizes=(64,), most_tokens=1024)
    assert choose_limits(shapes, GPU, configured=BatchPolicy(max_batch_size=4)).values["max_batch_size"] == 16


def test_an_objective_leaves_half_of_it_to_a_batch() -> None:
    chosen = choose_limits(measured(CPU), CPU, 0.2, beside_s=0.002)
    assert chosen.values["max_batch_seconds"] == pytest.approx(0.099)
    assert chosen.values["wait_ms"] == 0


@pytest.mark.parametrize("objective_s", [0.11, 0.2, 1.0, 30.0])
@pytest.mark.parametrize("model", [CPU, GPU])
@pytest.mark.parametrize("beside_s", [0.0, 0.003])
def test_the_limits_never_exceed_the_objective(model: CostModel, objective_s: float, beside_s: float) -> None:
    chosen = choose_limits(measured(model), model, objective_s, beside_s=beside_s)
    assert 2 * chosen.values["max_batch_seconds"] + chosen.values["wait_ms"] / 1000 + beside_s <= objective_s
    assert model.predict_s(1, SIZES[-1], SIZES[-1]) <= chosen.values["max_batch_seconds"]
    assert 0 <= chosen.values["wait_ms"] / 1000 <= objective_s / 10


def test_a_tight_objective_makes_batches_smaller() -> None:
    costs = PaddedCostModel(fixed_s=0.010, token_s=0.0001)
    loose = choose_limits(measured(costs), costs, 10.0).values["max_batch_size"]
    tight = choose_limits(measured(costs), costs, 0.15)
    assert tight.values["max_batch_size"] < loose
    assert tight.values["max_batch_size"] == 64  # 128 of size 8 would take 112 ms


def test_waiting_is_allowed_only_where_a_batch_costs_much_more_than_a_request() -> None:
    gpu = choose_limits(measured(GPU), GPU, 0.2)
    assert gpu.values["wait_ms"] == pytest.approx(4.9, abs=0.1)  # half of a lone request, less what one more adds
    assert choose_limits(measured(CPU), CPU, 0.2).values["wait_ms"] == 0


def test_waiting_takes_a_tenth_of_the_objective_at_most() -> None:
    assert choose_limits(measured(GPU), GPU, 0.03).values["wait_ms"] == pytest.approx(3)


def test_waiting_leaves_room_for_the_largest_request() -> None:
    chosen = choose_limits(measured(GPU), GPU, 0.0220)  # the largest takes 10.512 ms
    assert chosen.values["wait_ms"] < 1
    assert chosen.values["max_batch_seconds"] >= GPU.predict_s(1, 512, 512)


def test_waiting_that_the_objective_leaves_no_time_for_is_said_to_be_left_out() -> None:
    chosen = choose_limits(measured(GPU), GPU, 0.02103)  # twice what the largest takes, and 6 microseconds
    assert chosen.values["wait_ms"] == 0
    assert "the objective leaves no time for it" in chosen.reasons["wait_ms"]


def test_whole_numbers_are_written_without_a_fraction() -> None:
    values = choose_limits(measured(CPU), CPU, 2.0).values
    assert {key: repr(value) for key, value in values.items()} == {
        "max_batch_size": "64",
        "wait_ms": "0",
        "max_batch_seconds": "1",
    }


def test_memory_bounds_the_tokens_of_a_batch() -> None:
    assert choose_limits(measured(GPU, most_tokens=4096), GPU, too_large_tokens=8192).values["max_batch_tokens"] == 4096
    assert "max_batch_tokens" not in choose_limits(measured(GPU, most_tokens=4096), GPU).values


def test_an_objective_out_of_reach_names_the_sizes_within_reach() -> None:
    # Alone, size 64 takes 7.4 ms and size 512 takes 52.2 ms.
    with pytest.raises(TuningError, match=r"size 512 alone takes 52\.2 ms.* only sizes up to 64 can.* 105 or more"):
        choose_limits(measured(CPU), CPU, 0.05)


def test_an_objective_out_of_all_reach_says_so() -> None:
    with pytest.raises(TuningError, match="not even size 8 can"):
        choose_limits(measured(CPU), CPU, 0.002)


def test_the_objective_that_the_refusal_names_can_be_met() -> None:
    assert choose_limits(measured(CPU), CPU, 0.105).values["max_batch_size"] >= 1


def test_nothing_measured_is_an_error() -> None:
    with pytest.raises(TuningError, match="no request was measured alone"):
        choose_limits([], CPU)


def test_one_measurement_changes_nothing() -> None:
    assert choose_limits(measured(CPU, counts=(1,), sizes=(8,)), CPU).values["max_batch_size"] == 32


def test_sizes_are_those_of_lone_requests() -> None:
    assert lone_sizes([Measurement(1, 9, 9, 0.1), Measurement(2, 12, 20, 0.1), Measurement(1, 5, 5, 0.1)]) == [5, 9]


def capacity_per_s(shapes: Sequence[Measurement], policy: BatchPolicy) -> float:
    return predicted_capacity(shapes, policy, 0.7).items_per_s


def test_capacity_is_that_of_the_best_batch_of_each_size() -> None:
    shapes = measured(GPU, sizes=(64,))
    assert capacity_per_s(shapes, BatchPolicy(max_batch_size=32)) == pytest.approx(32 / 0.012048)
    bounded = BatchPolicy(max_batch_size=32, max_batch_tokens=128)
    assert capacity_per_s(shapes, bounded) == pytest.approx(2 / 0.010128)
    slow = BatchPolicy(max_batch_s=0.001)  # a single request may take longer
    assert capacity_per_s(shapes, slow) == pytest.approx(1 / 0.010064)


def test_batches_that_run_at_once_add_up_to_the_capacity() -> None:
    shapes = measured(GPU, sizes=(64,))
    policy = BatchPolicy(max_batch_size=32)
    assert predicted_capacity(shapes, policy, 0.7, max_in_flight=3).items_per_s == pytest.approx(
        3 * capacity_per_s(shapes, policy)
    )


def test_what_was_not_measured_promises_no_capacity() -> None:
    shapes = [Measurement(1, 8, 8, 1.0), Measurement(2, 8, 16, 1.0)]
    assert capacity_per_s(shapes, BatchPolicy(max_batch_size=32)) == 2
    shapes += [Measurement(128, 8, 1024, 1.0)]
    assert capacity_per_s(shapes, BatchPolicy(max_batch_size=32)) == 32, "a batch of 32 takes no longer than one of 128"


def test_the_batches_of_a_load_are_as_long_as_those_that_keep_up_with_it() -> None:
    shapes = [Measurement(count, 8, count * 8, 1 + 0.01 * count) for count in COUNTS]
    assert predicted_capacity(shapes, BatchPolicy(max_batch_size=128), 0.65).batch_s == pytest.approx(1.64)


def test_what_was_not_measured_in_time_lowers_no_limit() -> None:
    """Batches of 1 s whatever they hold, of which only one and two requests were measured."""
    shapes = [Measurement(1, 20, 20, 1.0), Measurement(2, 20, 40, 1.0)]
    chosen = choose_limits(shapes, CPU)
    assert chosen.values["max_batch_size"] == 32
    assert chosen.reasons["max_batch_size"].startswith("as configured: more than 2 of size 20 were not measured")


def test_a_size_of_which_too_few_were_measured_lowers_no_limit() -> None:
    shapes = measured(CPU, sizes=(64,))
    assert choose_limits(shapes, CPU).values["max_batch_size"] == 8
    alone = Measurement(1, 512, 512, CPU.predict_s(1, 512, 512))
    chosen = choose_limits([*shapes, alone], CPU)
    assert chosen.values["max_batch_size"] == 32
    assert "more than 1 of size 512" in chosen.reasons["max_batch_size"]


def test_counts_that_other_limits_exclude_need_not_be_measured() -> None:
    shapes = measured(CPU, sizes=(64,), most_tokens=1024)
    assert choose_limits(shapes, CPU).values["max_batch_size"] == 32
    assert choose_limits(shapes, CPU, configured=BatchPolicy(max_batch_tokens=1024)).values["max_batch_size"] == 8
    assert choose_limits(shapes, CPU, too_large_tokens=2048).values["max_batch_size"] == 8


def test_a_tile_between_the_measured_counts_is_not_lowered_away() -> None:
    """Up to 24 requests take one second, so that 16 and 32 seem equally good, and 24 is better than both."""
    shapes = [Measurement(count, 8, count * 8, float(math.ceil(count / 24))) for count in (1, 2, 4, 8, 16, 32)]
    chosen = choose_limits(shapes, CPU)
    assert chosen.values["max_batch_size"] == 32
    assert "between the counts measured at size 8" in chosen.reasons["max_batch_size"]


def test_the_measured_seconds_count_where_the_fitted_costs_are_wrong() -> None:
    shapes = [Measurement(count, 8, count * 8, 1.5) for count in COUNTS]
    with pytest.raises(TuningError, match="3000 or more"):
        choose_limits(shapes, CPU, 0.2)
    assert choose_limits(shapes, CPU).values["max_batch_size"] == 128


def test_measurements_that_the_fitted_costs_contradict_lower_no_limit() -> None:
    shapes = measured(CPU, sizes=(64,))
    assert choose_limits(shapes, CPU).values["max_batch_size"] == 8
    chosen = choose_limits(shapes, GPU)
    assert chosen.values["max_batch_size"] == 32
    assert chosen.reasons["max_batch_size"] == "as configured: by the fitted costs, larger batches of size 64 do pay"


Costs = Callable[[int, int], float]


@dataclass
class TrueCosts:
    """A model that was fitted well."""

    costs: Costs

    def predict_s(self, count: int, longest: int, total: int) -> float:
        return self.costs(count, longest)

    def observe(self, count: int, longest: int, total: int, elapsed_s: float) -> None:
        raise NotImplementedError


costs_of_any_kind = st.one_of(
    st.builds(
        lambda batch, request, token, attention: (
            lambda n, size: batch + n * request + n * size * (token + attention * size)
        ),
        st.floats(1e-5, 60),
        st.just(0.0) | st.floats(1e-6, 1),
        st.just(0.0) | st.floats(1e-7, 1e-1),
        st.just(0.0) | st.floats(1e-9, 1e-4),
    ),
    st.builds(lambda cost, power: lambda n, _size: cost * n**power, st.floats(1e-5, 10), st.floats(0, 2)),
    st.builds(
        lambda cost, tile: lambda n, size: cost * math.ceil(n * size / tile),
        st.floats(1e-5, 10),
        st.integers(1, 5000),
    ),
    st.builds(
        lambda batch, knee, token: lambda n, size: batch + token * max(0, n * size - knee),
        st.floats(1e-5, 10),
        st.sampled_from([16, 100, 1000, 4096]),
        st.floats(1e-6, 1),
    ),
)


def shapes_within(costs: Costs, max_s: float, largest: int, max_tokens: int | None = None) -> list[Measurement]:
    """What is measured of batches that cost so much."""
    now = 0.0

    def run(items: list[int]) -> None:
        nonlocal now
        now += costs(len(items), max(items))

    return list(
        Calibration[int](
            run=run,
            sample_items=lambda n, size: [min(size, largest)] * n,
            item_size=int,
            max_count=128,
            max_tokens=max_tokens,
            max_s=max_s,
            step=2,
            rounds=1,
            clock=lambda: now,
        ).measure()
    )


def throughput(costs: Costs, size: int, limit: int, most_tokens: int | None, longest_s: float) -> float:
    """Of the best batches that keep the limits."""
    counts = [n for n in range(1, limit + 1) if most_tokens is None or n == 1 or n * size <= most_tokens]
    return max(n / costs(n, size) for n in counts if n == 1 or costs(n, size) <= longest_s)


@given(
    costs=costs_of_any_kind,
    max_s=st.floats(0.1, 100),
    largest=st.sampled_from([1, 20, 100, 512]),
    configured=st.sampled_from([1, 3, 8, 24, 32, 64, 100, 128]),
    max_tokens=st.none() | st.integers(512, 5000),
    objective=st.none() | st.floats(1, 100),
    is_fitted=st.booleans(),
)
def test_no_choice_makes_it_worse(
    costs: Costs,
    max_s: float,
    largest: int,
    configured: int,
    max_tokens: int | None,
    objective: float | None,
    is_fitted: bool,
) -> None:
    """Whatever batches cost and however little of it was measured, larger batches are not given up for worse ones."""
    shapes = shapes_within(costs, max_s, largest, max_tokens)
    policy = BatchPolicy(max_batch_size=configured, max_batch_tokens=max_tokens)
    sizes = lone_sizes(shapes)
    objective_s = None if objective is None else 2.1 * objective * costs(1, sizes[-1])
    chosen = choose_limits(shapes, TrueCosts(costs) if is_fitted else CPU, objective_s, configured=policy)
    longest_s = chosen.values.get("max_batch_seconds", math.inf)
    for size in sizes:
        before = throughput(costs, size, configured, max_tokens, longest_s)
        assert throughput(costs, size, int(chosen.values["max_batch_size"]), max_tokens, longest_s) >= 0.95 * before


@given(costs=costs_of_any_kind, max_s=st.floats(0.1, 100), limit=st.sampled_from([1, 8, 32, 128]))
def test_the_predicted_capacity_is_never_more_than_can_be_done(costs: Costs, max_s: float, limit: int) -> None:
    shapes = shapes_within(costs, max_s, 512)
    times_s = [costs(n, size) for size in lone_sizes(shapes) for n in range(1, 129)]
    assume(all(later >= sooner for sooner, later in pairwise(times_s[:128])))
    possible = [1 / throughput(costs, size, limit, None, math.inf) for size in lone_sizes(shapes)]
    predicted = predicted_capacity(shapes, BatchPolicy(max_batch_size=limit), 0.7)
    assert predicted.items_per_s <= len(possible) / sum(possible) * 1.000_001
    assert predicted.batch_s in {shape.seconds for shape in shapes}
