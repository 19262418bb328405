"""Several devices take batches from one queue, and each has costs of its own."""

import threading
from collections.abc import Callable

import anyio
import anyio.lowlevel
import pytest

from modalkit.batching import (
    BatchPlanner,
    BatchPolicy,
    BatchScheduler,
    MeasuredCostModel,
    Preparation,
    Request,
    RunBatch,
    Success,
    batch_run,
)
from modalkit.batching.measured_cost import CostFeature


def test_each_device_gets_batches_by_its_own_costs() -> None:
    plan = BatchPlanner[Request[int]](BatchPolicy(max_batch_size=32), MeasuredCostModel(), MeasuredCostModel())
    # The first costs by the batch, the second by the request and far more for each one after the fourth.
    for device, seconds in enumerate(({1: 1.0, 4: 1.0, 16: 1.0, 32: 1.0}, {1: 0.1, 4: 0.4, 16: 16.0, 32: 64.0})):
        for _ in range(5):
            for count, seconds_of_batch in seconds.items():
                plan.record_run([10] * count, seconds_of_batch, device)
    for number in range(200):
        plan.push(Request(number, 10))
    batches = [plan.decide(0.0, device=device).batch for device in (0, 1)]
    assert [batch and batch.device for batch in batches] == [0, 1]
    first, second = (len(batch.requests) for batch in batches if batch is not None)
    assert first == 32
    assert second <= 4


def test_what_is_too_large_for_one_device_is_not_for_another() -> None:
    plan = BatchPlanner[Request[int]](BatchPolicy(max_batch_size=8), MeasuredCostModel(), MeasuredCostModel())
    for device in (0, 1):
        plan.record_run([10] * 8, 0.1, device)
    plan.record_too_large([10] * 8, 1)
    for number in range(40):
        plan.push(Request(number, 10))
    counts = [len(batch.requests) for device in (0, 1) if (batch := plan.decide(0.0, device=device).batch)]
    assert counts == [8, 4]


@pytest.mark.anyio
async def test_devices_run_at_once_and_a_slow_one_delays_only_its_own_batch() -> None:
    released = threading.Event()
    ran: list[tuple[str, int]] = []

    def device(name: str, before: Callable[[], object]) -> Callable[[list[int]], list[int]]:
        def run(numbers: list[int]) -> list[int]:
            ran.extend((name, number) for number in numbers)
            before()
            return numbers

        return run

    slow, fast = device("slow", lambda: released.wait(10)), device("fast", lambda: None)
    async with BatchScheduler([slow, fast], policy=BatchPolicy(max_batch_size=1)) as scheduler:
        done: list[int] = []

        async def submit(number: int) -> None:
            await scheduler.submit(number)
            done.append(number)
            if len(done) == 9:
                released.set()

        async with anyio.create_task_group() as callers:
            for number in range(10):
                callers.start_soon(submit, number)
    assert sorted(done) == list(range(10))
    assert sum(name == "slow" for name, _ in ran) == 1


@pytest.mark.anyio
async def test_a_device_that_cannot_run_takes_no_batches_and_one_that_recovers_does() -> None:
    is_usable, ran = threading.Event(), threading.Event()

    def prepare() -> None:
        if not is_usable.wait(0.01):
            raise RuntimeError("no device")

    def second(numbers: list[int]) -> list[int]:
        ran.set()
        return numbers

    async def first(numbers: list[int]) -> list[int]:
        await anyio.lowlevel.checkpoint()
        return numbers

    policy = BatchPolicy(max_batch_size=1)
    devices: list[RunBatch[int, int]] = [first, second]
    preparations = [None, Preparation(lambda: not is_usable.is_set(), prepare)]
    async with BatchScheduler(devices, policy=policy, preparations=preparations) as scheduler:
        assert await scheduler.submit_many(range(20)) == [Success(number) for number in range(20)]
        assert not ran.is_set()
        is_usable.set()
        while not ran.is_set():
            await scheduler.submit_many(range(20))


@pytest.mark.anyio
async def test_no_request_waits_for_a_device_that_is_prepared() -> None:
    is_down, may_end = threading.Event(), threading.Event()

    def prepare() -> None:
        may_end.wait(10)
        is_down.clear()

    devices = [lambda numbers: ["first"] * len(numbers), lambda numbers: ["second"] * len(numbers)]
    async with BatchScheduler(devices, preparations=[None, Preparation(is_down.is_set, prepare)]) as scheduler:
        for number in range(2):
            await anyio.wait_all_tasks_blocked()
            await scheduler.submit(number)
        is_down.set()
        with anyio.fail_after(5):
            assert [await scheduler.submit(number) for number in range(4)] == ["first"] * 4
        may_end.set()
        while await scheduler.submit(0) == "first":
            await anyio.wait_all_tasks_blocked()


@pytest.mark.anyio
async def test_after_each_preparation_the_event_loop_is_told_that_a_device_is_ready() -> None:
    is_down, told = threading.Event(), list[int]()

    def on_ready() -> None:
        assert not is_down.is_set()
        told.append(threading.get_ident())

    preparation = Preparation(is_down.is_set, is_down.clear, on_ready)
    async with BatchScheduler([lambda numbers: numbers], preparations=[preparation]) as scheduler:
        assert await scheduler.submit(1) == 1
        assert told == []
        for _ in range(2):
            is_down.set()
            assert await scheduler.submit(2) == 2
    assert told == [threading.get_ident()] * 2


@pytest.mark.anyio
@pytest.mark.parametrize("hangs", [False, True])
async def test_the_items_of_a_batch_whose_device_cannot_be_prepared_run_on_another_one(
    hangs: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(batch_run, "MAX_PREPARE_S", 0.05)
    is_down, may_end = threading.Event(), threading.Event()

    def first(numbers: list[int]) -> list[int]:
        is_down.wait(10)
        return numbers

    def second(numbers: list[int]) -> list[int]:
        is_down.set()
        raise ConnectionError("the process of the device ended")

    def prepare() -> None:
        may_end.wait(10 if hangs else 0.01)
        raise RuntimeError("no device")

    async with BatchScheduler(
        [first, second],
        policy=BatchPolicy(max_batch_size=4),
        preparations=[None, Preparation(is_down.is_set, prepare)],
    ) as scheduler:
        with anyio.fail_after(5):
            assert await scheduler.submit_many(range(16)) == [Success(number) for number in range(16)]
        may_end.set()
    assert "device 1 was not ready within 0.05 s" in caplog.text


@pytest.mark.anyio
async def test_lone_batches_run_in_the_first_thread_of_a_device() -> None:
    names: set[str] = set()

    def run(numbers: list[int]) -> list[int]:
        names.add(threading.current_thread().name)
        return numbers

    async with BatchScheduler([run, run], max_in_flight=2, name="m") as scheduler:
        for number in range(10):
            await anyio.wait_all_tasks_blocked()
            await scheduler.submit(number)
    assert names == {"m 0", "m 2"}


@pytest.mark.anyio
async def test_a_function_runs_in_a_thread_of_the_device_that_is_named() -> None:
    async def name(numbers: list[int]) -> list[int]:
        return numbers

    async with BatchScheduler([name, name], max_in_flight=2, name="m") as scheduler:
        names = [
            await scheduler.run_in_thread(lambda: threading.current_thread().name, device=device) for device in (0, 1)
        ]
    assert names == ["m 0", "m 2"]


@pytest.mark.parametrize("models", [[MeasuredCostModel(CostFeature.TOTAL)], []])
def test_a_cost_model_for_each_device_is_needed(models: list[MeasuredCostModel]) -> None:
    with pytest.raises(ValueError, match="one for each of the 2 devices, got"):
        BatchScheduler([lambda numbers: numbers, lambda numbers: numbers], cost_model=models)
