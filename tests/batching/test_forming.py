"""Companions are chosen by costs that are known, and with care by costs that are not."""

import math
import random
from statistics import median

import pytest

from modalkit.batching import BatchPlanner, BatchPolicy, MeasuredCostModel, PaddedCostModel, Priority, Request
from modalkit.batching.policy import Batch

INTERACTIVE, BULK = Priority

CPU = PaddedCostModel(fixed_s=0.005, token_s=0.0001)
GPU = PaddedCostModel(fixed_s=0.010, token_s=0.000001)


def push(
    plan: BatchPlanner[Request[int]], sizes: list[int], priority: Priority = INTERACTIVE, now: float = 0.0
) -> None:
    for number, size in enumerate(sizes):
        plan.push(Request(number, size, priority, now))


def next_batch(plan: BatchPlanner[Request[int]], now: float = 0.0) -> Batch[Request[int]]:
    batch = plan.decide(now).batch
    assert batch is not None
    return batch


def bulk_in(batch: Batch[Request[int]]) -> int:
    return sum(request.priority is BULK for request in batch.requests)


def work_off(plan: BatchPlanner[Request[int]], seconds: float, items: int, size: int = 20) -> list[int]:
    """Run a backlog of bulk requests of which every batch takes as long; returns the numbers in the batches."""
    push(plan, [size] * items, BULK)
    counts, now = [], 0.0
    while (batch := plan.decide(now).batch) is not None:
        now += seconds
        plan.end_batch(batch, seconds)
        counts.append(len(batch.requests))
    return counts


def test_batches_of_a_second_whatever_is_in_them_become_full_ones_at_once() -> None:
    """The case that once ran 480 items in 141 batches of three."""
    for items, most in ((200, 8), (480, 17)):
        plan = BatchPlanner[Request[int]](BatchPolicy(), MeasuredCostModel())
        counts = work_off(plan, 1.0, items)
        assert sum(counts) == items
        assert len(counts) <= most, counts


def test_larger_batches_are_tried_again_though_there_is_never_enough_for_a_full_one() -> None:
    """Beyond 16 requests all take four times as long, until what disturbed the device ends."""
    plan = BatchPlanner[Request[int]](BatchPolicy(max_batch_size=256), MeasuredCostModel())
    push(plan, [20] * 40, BULK)

    def usual(batches: int, factor: int) -> float:
        counts, now = list[int](), 0.0
        for _ in range(batches):
            batch = next_batch(plan, now)
            count = len(batch.requests)
            seconds = (0.01 + 0.001 * count) * (factor if count > 16 else 1)
            now += seconds
            plan.end_batch(batch, seconds)
            push(plan, [20] * count, BULK, now)
            counts.append(count)
        return median(counts[-100:])

    assert usual(1_000, 4) <= 16
    assert usual(5_000, 1) > 16


def test_batches_become_full_ones_where_the_first_of_each_number_of_requests_is_slow() -> None:
    """A compiler that takes a second for each number of requests, which has run for one request at the start."""
    costs, compiled, counts = MeasuredCostModel(), {1}, list[int]()
    costs.calibrate(1, 20, 20, 0.02)
    plan = BatchPlanner[Request[int]](BatchPolicy(), costs)
    for now in range(100):
        push(plan, [20] * (48 - len(plan.queue)), now=now)
        batch = next_batch(plan, now)
        count = len(batch.requests)
        plan.end_batch(batch, 0.02 + 0.0003 * count + (0.0 if count in compiled else 1.1))
        compiled.add(count)
        counts.append(count)
    assert counts[:4] == [8, 8, 32, 32]
    assert counts[10:] == [32] * 90


def test_batches_that_were_slow_because_they_were_the_first_do_not_keep_later_ones_small() -> None:
    """Where nothing was measured before and their time is above `max_batch_s`: such a batch would never run again."""
    for slow in (1, 3):
        plan = BatchPlanner[Request[int]](BatchPolicy(max_batch_s=0.5), MeasuredCostModel())
        push(plan, [20] * 1000, BULK)
        counts, now = list[int](), 0.0
        while (batch := plan.decide(now).batch) is not None:
            seconds = 5.0 if len(counts) < slow else 0.02
            now += seconds
            plan.end_batch(batch, seconds)
            counts.append(len(batch.requests))
        assert counts[-2] == 32, "the last one has what was left"
        assert len(counts) <= 1000 / 32 + slow + 4, counts


def test_batches_that_are_slow_exceed_their_time_only_until_that_is_known() -> None:
    plan = BatchPlanner[Request[int]](BatchPolicy(max_batch_s=0.5), MeasuredCostModel())
    push(plan, [20] * 1000, BULK)
    too_long, now = 0, 0.0
    while (batch := plan.decide(now).batch) is not None:
        seconds = 0.2 * len(batch.requests)
        now += seconds
        plan.end_batch(batch, seconds)
        too_long += seconds > 0.5
    assert too_long <= 4


def test_measurements_that_were_disturbed_do_not_keep_batches_small_where_their_time_is_limited() -> None:
    """No full batch is allowed by what was measured, so larger ones are tried in steps."""

    def seconds(count: int) -> float:
        return 0.005 + 0.0005 * count

    costs = MeasuredCostModel()
    for count in (1, 4, 16, 32):
        costs.calibrate(count, 20, 20 * count, seconds(count) * (4 if count >= 16 else 1))
    plan = BatchPlanner[Request[int]](BatchPolicy(max_batch_s=0.04, max_queue_items=100_000), costs)
    push(plan, [20] * 20_000, BULK)
    counts, now = [], 0.0
    while (batch := plan.decide(now).batch) is not None:
        now += seconds(len(batch.requests))
        plan.end_batch(batch, seconds(len(batch.requests)))
        counts.append(len(batch.requests))
    assert counts[0] == 4
    assert median(counts[-50:]) >= 24
    assert now < 1.2 * 20_000 / 32 * seconds(32)


def test_what_was_never_run_is_approached_in_steps() -> None:
    plan = BatchPlanner[Request[int]](BatchPolicy(max_batch_size=1000), MeasuredCostModel())
    assert work_off(plan, 0.01, 2_000)[:4] == [8, 32, 128, 512]


def test_while_costs_are_not_trusted_batches_are_full_ones_of_similar_sizes() -> None:
    costs, chance = MeasuredCostModel(), random.Random(1)
    for _ in range(40):
        costs.observe(32, 20, 640, 0.01 * chance.choice([0.01, 1, 100]))
    assert not costs.is_trusted
    plan = BatchPlanner[Request[int]](BatchPolicy(), costs)
    push(plan, [40, *[45] * 20, *[400] * 40, *[50] * 20], BULK)
    batch = next_batch(plan)
    assert (len(batch.requests), batch.longest) == (32, 50)


@pytest.mark.parametrize(("limit", "factor"), [(8, 2), (4, 10), (8, math.inf)])
def test_where_sizes_cost_nothing_batches_have_the_number_of_requests_that_costs_least(
    limit: int, factor: float
) -> None:
    class Cliff(PaddedCostModel):
        def predict_s(self, count: int, longest: int, total: int) -> float:
            return (0.01 + 0.001 * count) * (factor if count > limit else 1)

    plan = BatchPlanner[Request[int]](BatchPolicy(), Cliff())
    push(plan, [20 + number % 19 * 5 for number in range(400)], BULK)
    assert [len(next_batch(plan).requests) for _ in range(30)] == [limit] * 30


def test_batches_that_cost_nothing_are_full() -> None:
    plan = BatchPlanner[Request[int]](BatchPolicy(), PaddedCostModel(fixed_s=0, token_s=0))
    push(plan, list(range(1, 101)), BULK)
    assert len(next_batch(plan).requests) == 32
    push(plan, [50])
    assert [len(next_batch(plan).requests) for _ in range(3)] == [19, 32, 18], "also beside an interactive request"


def test_an_interactive_batch_takes_bulk_companions_of_its_size_that_are_nearly_free() -> None:
    plan = BatchPlanner[Request[int]](BatchPolicy(), GPU)
    push(plan, [20] * 100, BULK)
    push(plan, [20])
    batch = next_batch(plan)
    assert batch.priority is INTERACTIVE
    assert batch.requests[0].priority is INTERACTIVE
    assert (len(batch.requests), bulk_in(batch)) == (32, 31)
    assert batch.predicted_s < 1.1 * GPU.predict_s(1, 20, 20)


def test_companions_that_cost_more_than_in_a_batch_of_their_own_are_not_taken() -> None:
    plan = BatchPlanner[Request[int]](BatchPolicy(), CPU)
    push(plan, [10] * 100, BULK)
    push(plan, [300])
    assert bulk_in(next_batch(plan)) == 0


def test_the_more_interactive_requests_are_left_waiting_the_fewer_companions_go_before_them() -> None:
    taken = []
    for waiting in (0, 6, 31):
        plan = BatchPlanner[Request[int]](BatchPolicy(), CPU)
        push(plan, [100] * 200, BULK)
        push(plan, [100, *[20] * waiting])
        taken.append(bulk_in(next_batch(plan)))
    assert taken[0] > taken[1] > taken[2]


def test_the_longer_an_interactive_request_has_waited_the_fewer_companions_delay_it() -> None:
    taken = []
    for waited_s in (0.0, 0.1, 0.3):
        plan = BatchPlanner[Request[int]](BatchPolicy(), CPU)
        push(plan, [100] * 200, BULK)
        push(plan, [100])
        taken.append(bulk_in(next_batch(plan, waited_s)))
    assert taken[0] > taken[1] > taken[2]


def test_while_interactive_requests_arrive_bulk_batches_are_short_and_cost_hardly_more() -> None:
    plan = BatchPlanner[Request[int]](BatchPolicy(), CPU)
    chance = random.Random(3)
    push(plan, [chance.choice([10, 20, 50, 100, 200]) for _ in range(6_000)], BULK)
    now, sizes = 0.0, 0
    seconds: list[float] = []
    while plan.queue.waiting(BULK) > 500:
        if len(seconds) % 4 == 0:
            push(plan, [20], INTERACTIVE, now)
        batch = next_batch(plan, now)
        now += batch.predicted_s
        plan.end_batch(batch, batch.predicted_s)
        if batch.priority is BULK:
            seconds.append(batch.predicted_s)
            sizes += batch.total
    settled = seconds[len(seconds) // 2 :]
    alone = BatchPlanner[Request[int]](BatchPolicy(), CPU)
    push(alone, [200] * 100, BULK)
    assert max(settled) < 0.5 * next_batch(alone).predicted_s


def test_a_bound_on_bulk_batches_holds_while_interactive_requests_arrive_and_not_without_them() -> None:
    plan = BatchPlanner[Request[int]](BatchPolicy(max_bulk_batch_s=0.020), GPU)
    push(plan, [400] * 200, BULK)
    assert next_batch(plan).predicted_s > 0.020
    push(plan, [5], INTERACTIVE, 1.0)
    assert next_batch(plan, 1.0).priority is INTERACTIVE
    assert next_batch(plan, 1.5).predicted_s <= 0.020
    assert next_batch(plan, 10.0).predicted_s > 0.020


def test_bulk_gets_its_share_of_the_time_when_interactive_requests_never_stop() -> None:
    plan = BatchPlanner[Request[int]](BatchPolicy(), CPU)
    now, bulk_s, chance = 0.0, 0.0, random.Random(5)
    for _ in range(600):
        push(plan, [chance.choice([10, 100, 300]) for _ in range(8)], INTERACTIVE, now)
        push(plan, [chance.choice([10, 100, 300]) for _ in range(4)], BULK, now)
        batch = next_batch(plan, now)
        now += batch.predicted_s
        plan.end_batch(batch, batch.predicted_s)
        in_bulk = sum(request.size for request in batch.requests if request.priority is BULK)
        bulk_s += batch.predicted_s * in_bulk / batch.total
    assert bulk_s / now >= 0.095


def test_a_large_bulk_request_does_not_starve_while_small_ones_go_along_with_interactive_ones() -> None:
    costs, large = PaddedCostModel(fixed_s=0.05, token_s=2e-6), Request(0, 500, BULK)
    plan = BatchPlanner[Request[int]](BatchPolicy(), costs)
    plan.push(large)
    now = arrived = 0.0
    while large in plan.queue and now < 60:
        while arrived <= now:
            push(plan, [25, 40], INTERACTIVE, arrived)
            arrived += 0.01
        push(plan, [20] * (200 - plan.queue.waiting(BULK)), BULK, now)
        batch = next_batch(plan, now)
        now += batch.predicted_s
        plan.end_batch(batch, batch.predicted_s)
    assert now < 5


def test_classes_are_not_mixed_where_that_is_not_wanted() -> None:
    plan = BatchPlanner[Request[int]](BatchPolicy(mixes_lanes=False), GPU)
    push(plan, [20] * 100, BULK)
    push(plan, [20])
    assert bulk_in(next_batch(plan)) == 0


def test_what_came_along_with_interactive_batches_is_no_debt_of_bulk() -> None:
    """Bulk of a size that never goes along gets its share after an hour in which others went along."""
    plan = BatchPlanner[Request[int]](BatchPolicy(), CPU)
    now = 0.0
    for _ in range(1_000):
        push(plan, [20] * 4, INTERACTIVE, now)
        push(plan, [20] * 8, BULK, now)
        batch = next_batch(plan, now)
        now += batch.predicted_s
        plan.end_batch(batch, batch.predicted_s)
    while (left := plan.decide(now).batch) is not None:
        plan.end_batch(left, left.predicted_s)
    push(plan, [400] * 50, BULK, now)
    bulk_s, started_s = 0.0, now
    while now < started_s + 10:
        push(plan, [10] * 64, INTERACTIVE, now)
        batch = next_batch(plan, now)
        now += batch.predicted_s
        bulk_s += batch.predicted_s * (batch.priority is BULK)
        plan.end_batch(batch, batch.predicted_s)
        if not plan.queue.waiting(BULK):
            return
    assert bulk_s >= 0.5


def test_slow_batches_stay_full_at_a_cold_start_with_both_classes() -> None:
    plan = BatchPlanner[Request[int]](BatchPolicy(), MeasuredCostModel())
    push(plan, [20] * 3_000, BULK)
    now, counts, next_s = 0.0, [], 0.0
    while plan.queue.waiting(BULK) > 100:
        if now >= next_s:
            push(plan, [20], INTERACTIVE, now)
            next_s = now + 1.9
        batch = next_batch(plan, now)
        now += 1.0
        plan.end_batch(batch, 1.0)
        counts.append(len(batch.requests))
    assert sum(counts) / len(counts) > 28
