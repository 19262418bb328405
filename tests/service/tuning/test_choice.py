"""Which limits follow from which costs."""

from collections.abc import Sequence

import pytest

from batching import BatchPolicy, CostModel, PaddedCostModel
from batching.calibration import Measurement
from service.tuning.choice import choose_limits, lone_sizes, predicted_capacity_per_s
from service.tuning.errors import TuningError

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


def test_without_an_objective_only_the_batch_size_is_chosen() -> None:
    assert choose_limits(measured(GPU), GPU).values() == {"max_batch_size": 128}


def test_every_key_has_a_reason_of_one_line() -> None:
    for objective_s in (None, 0.5):
        reasons = choose_limits(measured(CPU), CPU, objective_s).reasons
        assert set(reasons) == {"max_batch_size", "wait_ms", "max_batch_tokens", "max_batch_seconds"}
        assert all(reason and "\n" not in reason for reason in reasons.values())


def test_batches_are_no_larger_than_what_adds_two_percent() -> None:
    # At size 64, n requests take 1 + 6.4 n ms: 8 reach 98.1 % of the limit, 4 only 96.2 %.
    assert choose_limits(measured(CPU, sizes=(64,)), CPU).max_batch_size == 8


def test_the_size_that_profits_most_decides() -> None:
    # At size 8, n requests take 1 + 0.8 n ms: 32 reach 97.2 % of what 128 do, 64 reach 99.0 %.
    chosen = choose_limits(measured(CPU), CPU)
    assert chosen.max_batch_size == 64
    assert "size 8 " in chosen.reasons["max_batch_size"]


def test_batches_that_still_pay_at_the_end_are_said_to() -> None:
    chosen = choose_limits(measured(GPU), GPU)
    assert chosen.max_batch_size == 128
    assert "the largest measured; over 64, it still adds" in chosen.reasons["max_batch_size"]


def test_sizes_are_judged_only_by_batches_as_large_as_those_measured() -> None:
    assert choose_limits(measured(GPU, sizes=(64,), most_tokens=1024), GPU).max_batch_size == 16


def test_an_objective_leaves_half_of_it_to_a_batch() -> None:
    chosen = choose_limits(measured(CPU), CPU, 0.2, beside_s=0.002)
    assert chosen.max_batch_seconds == pytest.approx(0.099)
    assert chosen.wait_ms == 0


@pytest.mark.parametrize("objective_s", [0.11, 0.2, 1.0, 30.0])
@pytest.mark.parametrize("model", [CPU, GPU])
@pytest.mark.parametrize("beside_s", [0.0, 0.003])
def test_the_limits_never_exceed_the_objective(model: CostModel, objective_s: float, beside_s: float) -> None:
    chosen = choose_limits(measured(model), model, objective_s, beside_s=beside_s)
    assert chosen.max_batch_seconds is not None
    assert chosen.wait_ms is not None
    assert 2 * chosen.max_batch_seconds + chosen.wait_ms / 1000 + beside_s <= objective_s
    assert model.predict_s(1, SIZES[-1], SIZES[-1]) <= chosen.max_batch_seconds
    assert 0 <= chosen.wait_ms / 1000 <= objective_s / 10


def test_a_tight_objective_makes_batches_smaller() -> None:
    costs = PaddedCostModel(fixed_s=0.010, token_s=0.0001)
    loose = choose_limits(measured(costs), costs, 10.0).max_batch_size
    tight = choose_limits(measured(costs), costs, 0.15)
    assert tight.max_batch_size < loose
    assert tight.max_batch_size == 64  # 128 of size 8 would take 112 ms


def test_waiting_is_allowed_only_where_a_batch_costs_much_more_than_a_request() -> None:
    gpu = choose_limits(measured(GPU), GPU, 0.2)
    assert gpu.wait_ms == pytest.approx(4.9, abs=0.1)  # half of a lone request, less what one more adds
    assert choose_limits(measured(CPU), CPU, 0.2).wait_ms == 0


def test_waiting_takes_a_tenth_of_the_objective_at_most() -> None:
    assert choose_limits(measured(GPU), GPU, 0.03).wait_ms == pytest.approx(3)


def test_waiting_leaves_room_for_the_largest_request() -> None:
    chosen = choose_limits(measured(GPU), GPU, 0.0220)  # the largest takes 10.512 ms
    assert chosen.wait_ms is not None
    assert chosen.wait_ms < 1
    assert chosen.max_batch_seconds is not None
    assert chosen.max_batch_seconds >= GPU.predict_s(1, 512, 512)


def test_waiting_that_the_objective_leaves_no_time_for_is_said_to_be_left_out() -> None:
    chosen = choose_limits(measured(GPU), GPU, 0.02103)  # twice what the largest takes, and 6 microseconds
    assert chosen.wait_ms == 0
    assert "the objective leaves no time for it" in chosen.reasons["wait_ms"]


def test_whole_numbers_are_written_without_a_fraction() -> None:
    values = choose_limits(measured(CPU), CPU, 2.0).values()
    assert {key: repr(value) for key, value in values.items()} == {
        "max_batch_size": "64",
        "wait_ms": "0",
        "max_batch_seconds": "1",
    }


def test_memory_bounds_the_tokens_of_a_batch() -> None:
    assert choose_limits(measured(GPU, most_tokens=4096), GPU, memory_was_the_limit=True).max_batch_tokens == 4096
    assert choose_limits(measured(GPU, most_tokens=4096), GPU).max_batch_tokens is None


def test_an_objective_out_of_reach_names_the_sizes_within_reach() -> None:
    # Alone, size 64 takes 7.4 ms and size 512 takes 52.2 ms.
    with pytest.raises(TuningError, match=r"size 512 alone takes 52\.2 ms.* only sizes up to 64 can.* 105 or more"):
        choose_limits(measured(CPU), CPU, 0.05)


def test_an_objective_out_of_all_reach_says_so() -> None:
    with pytest.raises(TuningError, match="not even size 8 can"):
        choose_limits(measured(CPU), CPU, 0.002)


def test_the_objective_that_the_refusal_names_can_be_met() -> None:
    assert choose_limits(measured(CPU), CPU, 0.105).max_batch_size >= 1


def test_nothing_measured_is_an_error() -> None:
    with pytest.raises(TuningError, match="no request was measured alone"):
        choose_limits([], CPU)


def test_one_measurement_is_enough_to_choose() -> None:
    assert choose_limits(measured(CPU, counts=(1,), sizes=(8,)), CPU).max_batch_size == 1


def test_sizes_are_those_of_lone_requests() -> None:
    assert lone_sizes([Measurement(1, 9, 9, 0.1), Measurement(2, 12, 20, 0.1), Measurement(1, 5, 5, 0.1)]) == [5, 9]


def test_capacity_is_that_of_the_best_batch_of_each_size() -> None:
    shapes = measured(GPU, sizes=(64,))
    assert predicted_capacity_per_s(shapes, GPU, BatchPolicy(max_batch_size=32)) == pytest.approx(32 / 0.012048)
    bounded = BatchPolicy(max_batch_size=32, max_batch_tokens=128)
    assert predicted_capacity_per_s(shapes, GPU, bounded) == pytest.approx(2 / 0.010128)
    slow = BatchPolicy(max_batch_s=0.001)  # a single request may take longer
    assert predicted_capacity_per_s(shapes, GPU, slow) == pytest.approx(1 / 0.010064)
