"""A scheduler goes on by another function, and within other limits, while requests wait and run."""

import threading
from collections.abc import Callable, Coroutine
from typing import Any

import anyio
import pytest

from modalkit.batching import (
    BatchPolicy,
    BatchScheduler,
    BatchTimeoutError,
    Failure,
    Outcome,
    QueueFullError,
    RequestTooLargeError,
    SchedulerClosedError,
    Success,
)

pytestmark = pytest.mark.anyio

POLICY = BatchPolicy(max_batch_size=4)


class Tagged:
    """Answers each payload with a tag, once the test opens it."""

    def __init__(self, tag: str, *, is_open: bool = True) -> None:
        self.tag = tag
        self.batches: list[list[int]] = []
        self.entered = threading.Semaphore(0)
        self.gate = threading.Event()
        if is_open:
            self.gate.set()

    def __call__(self, payloads: list[int]) -> list[str]:
        self.batches.append(list(payloads))
        self.entered.release()
        self.gate.wait(timeout=60)
        return [f"{self.tag}{payload}" for payload in payloads]

    async def until_entered(self) -> None:
        while not self.entered.acquire(blocking=False):
            await anyio.sleep(0.001)


def collector(
    answers: dict[int, str], scheduler: BatchScheduler[int, str]
) -> Callable[[int], Coroutine[Any, Any, None]]:
    async def call(payload: int) -> None:
        answers[payload] = await scheduler.submit(payload)

    return call


async def test_a_batch_that_runs_ends_as_it_began_and_what_waits_runs_by_the_new_function() -> None:
    old, new, answers = Tagged("old", is_open=False), Tagged("new"), dict[int, str]()
    async with BatchScheduler(old, policy=POLICY) as scheduler, anyio.create_task_group() as task_group:
        call = collector(answers, scheduler)
        task_group.start_soon(call, 0)
        await old.until_entered()
        for payload in range(1, 9):
            task_group.start_soon(call, payload)
        await anyio.wait_all_tasks_blocked()
        await scheduler.replace(new, policy=POLICY)
        while len(answers) < 8:
            await anyio.sleep(0.001)
        old.gate.set()
    assert answers == {0: "old0", **{n: f"new{n}" for n in range(1, 9)}}
    assert old.batches == [[0]]
    assert scheduler.statistics().succeeded == 9


async def test_a_warm_up_that_fails_changes_nothing() -> None:
    def fail() -> None:
        raise ZeroDivisionError

    async with BatchScheduler(Tagged("old"), policy=POLICY) as scheduler:
        with pytest.raises(ZeroDivisionError):
            await scheduler.replace(Tagged("new"), policy=BatchPolicy(max_batch_size=1), warm_up=[fail])
        assert await scheduler.submit(1) == "old1"
        assert scheduler.policy is POLICY


async def test_the_warm_up_runs_beside_batches_and_in_the_thread_of_the_next_ones() -> None:
    old, threads = Tagged("old", is_open=False), list[threading.Thread]()

    def new(payloads: list[int]) -> list[str]:
        threads.append(threading.current_thread())
        return ["new"] * len(payloads)

    async with BatchScheduler(old, policy=POLICY) as scheduler, anyio.create_task_group() as task_group:
        task_group.start_soon(scheduler.submit, 0)
        await old.until_entered()
        await scheduler.replace(new, policy=POLICY, warm_up=[lambda: threads.append(threading.current_thread())])
        assert await scheduler.submit(1) == "new"
        old.gate.set()
    assert threads[0] is threads[1]


async def test_limits_change_at_once_for_what_comes_and_refuse_nothing_that_waits() -> None:
    function, answers = Tagged("a", is_open=False), dict[int, str]()
    async with BatchScheduler(function, policy=BatchPolicy(max_batch_size=1), item_size=int) as scheduler:
        async with anyio.create_task_group() as task_group:
            call = collector(answers, scheduler)
            for payload in (1, 8, 9):
                task_group.start_soon(call, payload)
            await function.until_entered()
            smaller = BatchPolicy(max_batch_size=8, max_batch_tokens=7, max_queue_items=2)
            await scheduler.replace(function, policy=smaller, item_size=int)
            await function.until_entered()
            with pytest.raises(RequestTooLargeError):
                await scheduler.submit(10)
            task_group.start_soon(call, 2)
            await anyio.wait_all_tasks_blocked()
            with pytest.raises(QueueFullError):
                await scheduler.submit_many([3, 4])
            function.gate.set()
        await scheduler.replace(function, policy=POLICY, max_in_flight=2)
        assert await scheduler.submit_many([1] * 8)
    assert answers == {payload: f"a{payload}" for payload in (1, 2, 8, 9)}


async def test_items_of_a_batch_that_hung_run_by_the_new_function_instead_of_alone() -> None:
    old, new, answers = Tagged("old", is_open=False), Tagged("new"), list[Outcome[str]]()
    async with BatchScheduler(old, policy=POLICY, batch_timeout_s=0.05) as scheduler:

        async def call() -> None:
            answers.extend(await scheduler.submit_many(range(4)))

        async with anyio.create_task_group() as task_group:
            task_group.start_soon(call)
            while scheduler.stuck_threads < 1:
                await anyio.sleep(0.001)
            await scheduler.replace(new, policy=POLICY, on_close=lambda: None)
            assert scheduler.stuck_threads == 0
        old.gate.set()
    hung = [answer for answer in answers if isinstance(answer, Failure)]
    assert len(hung) <= 1, "the one that ran alone meanwhile"
    assert [answer.value[:3] for answer in answers if isinstance(answer, Success)] == ["new"] * (4 - len(hung))


@pytest.mark.parametrize("max_in_flight", [1, 2])
async def test_in_turn_a_function_runs_no_more_batches_at_once_than_before(max_in_flight: int) -> None:
    function = Tagged("a", is_open=False)
    async with BatchScheduler(function, policy=POLICY, max_in_flight=max_in_flight) as scheduler:
        async with anyio.create_task_group() as task_group:
            for payload in range(max_in_flight):
                task_group.start_soon(scheduler.submit, payload)
                await function.until_entered()
            for _ in range(2):
                await scheduler.replace(function, policy=POLICY, max_in_flight=max_in_flight, in_turn=True)
            task_group.start_soon(scheduler.submit, 8)
            await anyio.wait_all_tasks_blocked()
            statistics = scheduler.statistics()
            assert (statistics.running, statistics.queue_depth) == (max_in_flight, 1)
            function.gate.set()
        assert await scheduler.submit(9) == "a9"


async def test_a_batch_of_its_own_waits_for_those_that_run_by_the_function_before() -> None:
    function, begun = Tagged("a", is_open=False), list[bool]()

    def other(payloads: list[int]) -> list[str]:
        begun.append(function.gate.is_set())
        return ["other" for _ in payloads]

    async with BatchScheduler(function, policy=POLICY) as scheduler, anyio.create_task_group() as task_group:
        task_group.start_soon(scheduler.submit, 0)
        await function.until_entered()
        await scheduler.replace(other, policy=POLICY, in_turn=True)
        task_group.start_soon(scheduler.run_as_one_batch, [1])
        with anyio.move_on_after(0.1):
            while not begun:
                await anyio.sleep(0.001)
        function.gate.set()
    assert begun == [True]


async def test_in_turn_a_batch_that_hangs_delays_the_next_ones_for_the_batch_timeout_only() -> None:
    hanging, other = Tagged("hanging", is_open=False), Tagged("other")
    async with BatchScheduler(hanging, policy=POLICY, batch_timeout_s=0.05) as scheduler:
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(scheduler.submit_many, [0])
            await hanging.until_entered()
            await scheduler.replace(other, policy=POLICY, in_turn=True)
            assert await scheduler.submit(1) == "other1"
        hanging.gate.set()


async def test_a_scheduler_that_closed_is_not_changed() -> None:
    async with BatchScheduler(Tagged("old"), policy=POLICY) as scheduler:
        pass
    with pytest.raises(SchedulerClosedError):
        await scheduler.replace(Tagged("new"), policy=POLICY)


async def test_what_ran_before_is_closed_once_its_batches_have_ended_and_stays_open_when_only_limits_change() -> None:
    old, closed = Tagged("old", is_open=False), list[str]()
    async with BatchScheduler(old, policy=POLICY, on_close=lambda: closed.append("old")) as scheduler:
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(scheduler.submit, 0)
            await old.until_entered()
            await scheduler.replace(old, policy=BatchPolicy(max_batch_size=1))
            await scheduler.replace(Tagged("new"), policy=POLICY, on_close=lambda: closed.append("new"))
            assert await scheduler.submit(1) == "new1"
            assert not closed
            old.gate.set()
        with anyio.fail_after(5):
            while not closed:
                await anyio.sleep(0.001)
        assert closed == ["old"]
    assert closed == ["old", "new"]


async def test_what_ran_before_is_closed_where_the_scheduler_is_aborted_while_its_last_batch_runs() -> None:
    old, closed = Tagged("old", is_open=False), list[str]()
    with anyio.CancelScope() as scope:
        async with BatchScheduler(old, policy=POLICY, on_close=lambda: closed.append("old")) as scheduler:
            scheduler.submit_nowait(0, lambda _: None)
            await old.until_entered()
            await scheduler.replace(Tagged("new"), policy=POLICY, on_close=lambda: closed.append("new"))
            old.gate.set()
            scope.cancel()
    assert closed == ["old", "new"]


async def test_a_batch_that_was_given_up_before_limits_changed_is_counted_until_it_ends_before_the_close() -> None:
    calls, gate, is_closed = list[str](), threading.Event(), threading.Event()

    def run(payloads: list[int]) -> list[int]:
        gate.wait(60)
        is_closed.wait(0.1)
        calls.append("end")
        return payloads

    def close() -> None:
        calls.append("close")
        is_closed.set()

    async with BatchScheduler(run, policy=POLICY, batch_timeout_s=0.01, on_close=close) as scheduler:
        with pytest.raises(BatchTimeoutError):
            await scheduler.submit(0)
        for _ in range(2):
            await scheduler.replace(run, policy=POLICY, in_turn=True)
            assert scheduler.stuck_threads == 1
        gate.set()
    assert calls == ["end", "close"]


async def test_another_number_of_devices_cannot_take_over() -> None:
    async with BatchScheduler([Tagged("a"), Tagged("b")], policy=POLICY) as scheduler:
        with pytest.raises(ValueError, match="there must be 2 devices as before, got 1"):
            await scheduler.replace(Tagged("new"), policy=POLICY)
