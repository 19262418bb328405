"""What a frontend is told before it queues a request: whether there is room, and how long it would wait."""

import math
import random
from collections.abc import Callable

import anyio
import pytest

from modalkit.batching import (
    BatchPlanner,
    BatchPolicy,
    BatchScheduler,
    CostModel,
    DeadlineUnreachableError,
    MeasuredCostModel,
    PaddedCostModel,
    Priority,
    QueueFullError,
    QueueSlowError,
    Request,
    SchedulerClosedError,
)

INTERACTIVE, BULK = Priority.INTERACTIVE, Priority.BULK
pytestmark = pytest.mark.anyio

STRUCTURES: dict[str, Callable[[list[int]], float]] = {
    "a call costs the same however many items it has": lambda _: 0.7,
    "each item costs the same": lambda sizes: 0.01 * len(sizes),
    "padded tokens": lambda sizes: 0.002 + 1e-4 * len(sizes) * max(sizes),
    "plain tokens": lambda sizes: 0.01 + 1e-4 * sum(sizes),
    "attention": lambda sizes: 0.001 + 1e-6 * len(sizes) * max(sizes) ** 2,
    "a device that fills up": lambda sizes: 0.05 + 1e-4 * max(0, len(sizes) * max(sizes) - 2000),
}


def drain(planner: BatchPlanner[Request[int]], structure: Callable[[list[int]], float], workers: int) -> float:
    """Run all that waits; returns the seconds that it takes with so many workers."""
    busy_s = 0.0
    while (batch := planner.decide(math.inf).batch) is not None:
        elapsed_s = structure([request.size for request in batch.requests])
        planner.end_batch(batch, elapsed_s)
        busy_s += elapsed_s
    return busy_s / workers


def requests(count: int, seed: int) -> list[Request[int]]:
    rng = random.Random(seed)
    return [Request(0, min(500, 5 + int(rng.expovariate(1 / 60)))) for _ in range(count)]


@pytest.mark.parametrize("structure", STRUCTURES.values(), ids=STRUCTURES)
@pytest.mark.parametrize("cost_model", [MeasuredCostModel, lambda: PaddedCostModel(1.0, 0.001)])
@pytest.mark.parametrize("workers", [1, 4])
def test_the_predicted_wait_is_right_for_any_structure_of_costs(
    structure: Callable[[list[int]], float], cost_model: Callable[[], CostModel], workers: int
) -> None:
    """Also after nothing but lone requests ran, and with a cost model that learns nothing: then it is less exact."""
    planner: BatchPlanner[Request[int]] = BatchPlanner(BatchPolicy(), cost_model(), workers=workers)
    assert planner.wait_s(BULK) == 0, "nothing is known yet"
    for seed in range(3):
        planner.push_all(requests(500, seed))
        drain(planner, structure, workers)
    planner.push_all(requests(1000, 7))
    predicted_s = planner.wait_s(INTERACTIVE)
    factor = 1.5 if cost_model is MeasuredCostModel else 4
    assert predicted_s / factor < drain(planner, structure, workers) < predicted_s * factor
    assert planner.wait_s(INTERACTIVE) == 0


def planner_of(*sizes: int, priority: Priority = INTERACTIVE, **limits: float) -> BatchPlanner[Request[int]]:
    """A planner in whose queue each request takes as many seconds as its size, exactly."""
    policy = BatchPolicy(max_batch_size=1, **limits)  # type: ignore[arg-type]  # tests name the limits they set
    planner: BatchPlanner[Request[int]] = BatchPlanner(policy, PaddedCostModel(0.0, 1.0))
    planner.push_all([Request(0, 1)])
    drain(planner, lambda sizes: float(sizes[0]), 1)
    planner.push_all([Request(0, size, priority) for size in sizes])
    return planner


def test_a_request_is_refused_once_those_before_it_take_too_long() -> None:
    planner_of(9, max_queue_s=10).check_room(INTERACTIVE, None)
    with pytest.raises(
        QueueSlowError, match=r"2 requests in the queue are predicted to take 15 s.*from 10 s on"
    ) as full:
        planner_of(9, 6, max_queue_s=10).check_room(INTERACTIVE, None)
    assert full.value.retry_after_s == 5
    assert not full.value.is_permanent


def test_jobs_that_wait_are_not_before_an_interactive_request() -> None:
    planner = planner_of(20, priority=BULK, max_queue_s=10)
    planner.check_room(INTERACTIVE, 1.0)
    with pytest.raises(QueueSlowError):
        planner.check_room(BULK, None)


def test_a_deadline_that_cannot_be_met_is_refused_at_once() -> None:
    planner = planner_of(9, 6)
    planner.check_room(INTERACTIVE, 16)
    with pytest.raises(DeadlineUnreachableError, match=r"within 4 s: what waits before it .* 15 s; allow more") as late:
        planner.check_room(INTERACTIVE, 4)
    assert late.value.retry_after_s == 11


def test_nothing_is_refused_by_a_prediction_while_nothing_waits() -> None:
    """Else a wrong prediction would never be corrected."""
    planner_of(max_queue_s=1e-9).check_room(INTERACTIVE, 1e-9)


def test_a_full_queue_tells_when_there_is_room() -> None:
    planner = planner_of(6, 6, 6, max_queue_items=3)
    with pytest.raises(QueueFullError) as full:
        planner.check_room(INTERACTIVE, None)
    assert full.value.retry_after_s == 6


def test_an_owner_is_told_that_its_share_of_the_queue_is_full_where_others_have_room() -> None:
    planner: BatchPlanner[Request[int]] = BatchPlanner(
        BatchPolicy(max_queue_items=20, max_batch_size=1), PaddedCostModel()
    )
    for _ in range(18):
        planner.check_room(INTERACTIVE, None, "a")
        planner.push(Request(0, 1, owner="a"))
    with pytest.raises(QueueFullError, match="holds 18 of at most 18"):
        planner.check_room(INTERACTIVE, None, "a")
    planner.check_room(INTERACTIVE, None, "b")
    planner.check_room(INTERACTIVE, None)


def test_other_limits_count_from_when_they_are_set() -> None:
    planner: BatchPlanner[Request[int]] = BatchPlanner(BatchPolicy(max_batch_size=1), PaddedCostModel(1.0, 0.01))
    planner.push(Request(0, 1))
    drain(planner, lambda _: 1.0, 1)
    for _ in range(20):
        planner.push(Request(0, 1, owner="a"))
    assert planner.wait_s(INTERACTIVE) == pytest.approx(20)
    planner.set_policy(BatchPolicy(max_batch_size=1, max_queue_s=5.0), workers=2)
    assert planner.wait_s(INTERACTIVE) == pytest.approx(10)
    with pytest.raises(QueueSlowError):
        planner.check_room(INTERACTIVE, None)
    planner.set_policy(BatchPolicy(max_batch_size=10), workers=2)
    assert planner.wait_s(INTERACTIVE) < 5  # batches of several items cost less by the item
    planner.set_policy(BatchPolicy(max_queue_items=20))
    with pytest.raises(QueueFullError):
        planner.push(Request(0, 1, owner="b"))


def test_a_cost_model_that_raises_refuses_nothing() -> None:
    class Broken(PaddedCostModel):
        def predict_s(self, count: int, longest: int, total: int) -> float:
            raise LookupError

    planner: BatchPlanner[Request[int]] = BatchPlanner(BatchPolicy(max_queue_s=1), Broken())
    planner.push_all([Request(0, 5)])
    planner.check_room(INTERACTIVE, 0.1)


async def test_a_scheduler_counts_what_it_refuses_and_says_when_there_is_room() -> None:
    started, gate = anyio.Event(), anyio.Event()

    async def run(numbers: list[int]) -> list[int]:
        started.set()
        await gate.wait()
        return numbers

    async with (
        anyio.create_task_group() as group,
        BatchScheduler(run, policy=BatchPolicy(max_queue_items=32)) as scheduler,
    ):
        scheduler.check_room()
        group.start_soon(scheduler.submit, 1)
        await started.wait()
        group.start_soon(scheduler.submit_many, range(32))
        await anyio.wait_all_tasks_blocked()
        with pytest.raises(QueueFullError):
            scheduler.check_room()
        with pytest.raises(QueueFullError):
            await scheduler.submit(2)
        assert scheduler.statistics().refused == 2
        gate.set()
    with pytest.raises(SchedulerClosedError):
        scheduler.check_room()
