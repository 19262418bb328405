"""A full batch is given to the thread before the one that runs there has ended, on asyncio and trio."""

import threading
from functools import partial
from typing import Any

import anyio
import pytest

from modalkit.batching import (
    BatchPolicy,
    BatchScheduler,
    BatchTimeoutError,
    Failure,
    Outcome,
    PaddedCostModel,
    Priority,
    Success,
    dispatch,
)

pytestmark = pytest.mark.anyio

LONG_S = 60  # only a failing test waits as long


class Gates:
    """A function that notes the batches that begin, and waits in each until its gate is open."""

    def __init__(self, *closed: int) -> None:
        self.begun: list[list[int]] = []
        self.entered = threading.Semaphore(0)
        self.gates = {item: threading.Event() for item in closed}

    def run(self, items: list[int]) -> list[int]:
        self.begun.append(list(items))
        self.entered.release()
        for item in items:
            if item in self.gates:
                self.gates[item].wait(LONG_S)
            if item == 13:
                raise ValueError("13")
        return items

    @property
    def items(self) -> list[int]:
        """All items that have begun."""
        return [item for batch in self.begun for item in batch]

    async def until_entered(self) -> None:
        assert await anyio.to_thread.run_sync(self.entered.acquire, True, LONG_S)


@pytest.fixture(autouse=True)
def long_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """The batches of these tests count as long ones, and the next is formed at once."""
    monkeypatch.setattr(dispatch, "MAX_VISIT_S", 0.0)
    monkeypatch.setattr(dispatch, "AHEAD_S", LONG_S)


def scheduler_of(gates: Gates, **options: Any) -> BatchScheduler[int, int]:
    return BatchScheduler(gates.run, policy=BatchPolicy(max_batch_size=2), cost_model=PaddedCostModel(), **options)


async def test_the_next_batch_begins_while_the_event_loop_is_busy_with_the_one_before() -> None:
    gates = Gates(0)
    async with scheduler_of(gates) as scheduler, anyio.create_task_group() as group:
        group.start_soon(scheduler.submit_many, range(8))
        await gates.until_entered()
        await anyio.wait_all_tasks_blocked()
        gates.gates[0].set()
        assert gates.entered.acquire(timeout=LONG_S), "this blocks the event loop"
        assert len(gates.begun) == 2, "one batch ahead, and no more"


async def test_no_batch_is_formed_ahead_that_more_requests_may_fill() -> None:
    gates, outcomes = Gates(0), dict[int, Any]()
    async with scheduler_of(gates) as scheduler:
        for number in range(3):
            scheduler.submit_nowait(number, partial(outcomes.__setitem__, number))
        await gates.until_entered()
        await anyio.wait_all_tasks_blocked()
        scheduler.submit_nowait(3, partial(outcomes.__setitem__, 3))
        gates.gates[0].set()
    assert [len(batch) for batch in gates.begun] == [2, 2]
    assert outcomes == {number: Success(number) for number in range(4)}


async def test_no_batch_is_formed_ahead_where_another_executor_may_run_it_sooner() -> None:
    gates = Gates(0)
    async with scheduler_of(gates, max_in_flight=2) as scheduler, anyio.create_task_group() as group:
        group.start_soon(scheduler.submit_many, range(12))
        for _ in range(6):
            await gates.until_entered()
        gates.gates[0].set()
    assert sorted(gates.items) == list(range(12))


async def test_a_batch_ahead_gives_way_to_an_interactive_request() -> None:
    gates, outcomes = Gates(0), list[Outcome[int]]()

    async def call(numbers: range, priority: Priority) -> None:
        outcomes.extend(await scheduler.submit_many(numbers, priority=priority))

    async with scheduler_of(gates) as scheduler, anyio.create_task_group() as group:
        group.start_soon(call, range(8), Priority.BULK)
        await gates.until_entered()
        await anyio.wait_all_tasks_blocked()
        group.start_soon(call, range(20, 21), Priority.INTERACTIVE)
        await anyio.wait_all_tasks_blocked()
        gates.gates[0].set()
    assert 20 in gates.begun[1]
    assert outcomes == [Success(number) for number in (20, *range(8))]
    assert sorted(gates.items) == [*range(8), 20], "a batch that gives way has not begun"


async def test_a_batch_behind_one_that_hangs_runs_within_a_time_limit_of_its_own() -> None:
    gates = Gates(0)
    async with scheduler_of(gates, batch_timeout_s=0.2) as scheduler:
        outcomes = await scheduler.submit_many(range(8))
        gates.gates[0].set()
    assert isinstance(outcomes[0], Failure)
    assert isinstance(outcomes[0].error, BatchTimeoutError)
    assert outcomes[1:] == [Success(number) for number in range(1, 8)]
    assert all(gates.items.count(item) == 1 for item in range(8) if item not in gates.begun[0])


async def test_an_item_fails_alone_beside_batches_ahead() -> None:
    gates = Gates()
    async with scheduler_of(gates) as scheduler:
        outcomes = await scheduler.submit_many(range(40))
    failed = [number for number, outcome in enumerate(outcomes) if isinstance(outcome, Failure)]
    assert failed == [13]


async def test_a_function_of_no_batch_runs_after_the_batch_ahead_and_before_the_next() -> None:
    gates = Gates(0)
    async with scheduler_of(gates) as scheduler, anyio.create_task_group() as group:
        group.start_soon(scheduler.submit_many, range(12))
        await gates.until_entered()
        await anyio.wait_all_tasks_blocked()
        group.start_soon(scheduler.run_in_thread, lambda: gates.begun.append([]))
        await anyio.wait_all_tasks_blocked()
        gates.gates[0].set()
    assert gates.begun.index([]) == 2


async def test_cancelling_the_block_runs_no_batch_that_was_ahead() -> None:
    gates = Gates(0)
    with anyio.CancelScope() as scope:
        async with scheduler_of(gates) as scheduler, anyio.create_task_group() as group:
            group.start_soon(scheduler.submit_many, range(8))
            await gates.until_entered()
            await anyio.wait_all_tasks_blocked()
            scope.cancel()
    gates.gates[0].set()
    for thread in threading.enumerate():
        if thread.name.startswith("batch scheduler"):
            await anyio.to_thread.run_sync(thread.join, LONG_S)
    assert len(gates.begun) == 1
