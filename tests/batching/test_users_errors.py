"""The one rule for what users' code raises: it is an error of what the code was called for, and ends nothing else."""

import asyncio
import threading
from collections.abc import Sequence
from typing import Any

import anyio
import pytest
import trio
from anyio import sleep_forever

from modalkit.batching import BatchRecord, BatchScheduler, Failure, Outcome, PaddedCostModel, Success
from modalkit.batching.errors import users_error
from modalkit.batching.task_groups import await_users_code
from tests.support.panic import Panic


def raising(error: BaseException) -> Exception:
    """What the rule makes of an error that is being handled."""

    def call() -> None:
        raise error

    try:
        call()
    except BaseException as caught:  # noqa: BLE001  # as where users' code is called
        return users_error(caught)
    raise AssertionError


@pytest.mark.parametrize("error", [SystemExit(3), Panic("no"), GeneratorExit(), BaseExceptionGroup("", [Panic()])])
def test_an_error_that_is_no_exception_becomes_one_that_has_it_as_its_cause(error: BaseException) -> None:
    made = raising(error)
    assert isinstance(made, RuntimeError)
    assert made.__cause__ is error
    assert type(error).__name__ in str(made)


def test_an_exception_stays_as_it_is() -> None:
    error = ExceptionGroup("two", [ValueError(), KeyError()])
    assert raising(error) is error


def test_an_interrupt_goes_on_also_in_groups_and_threads() -> None:
    kind = KeyboardInterrupt
    passed = list[BaseException]()

    def check() -> None:
        for error in (kind(), BaseExceptionGroup("", [ValueError(), kind()])):
            try:
                raising(error)
            except BaseException as raised:  # noqa: BLE001  # compared below
                passed.append(raised)

    thread = threading.Thread(target=check)
    thread.start()
    thread.join()
    check()
    assert [type(error) for error in passed] == [kind, BaseExceptionGroup] * 2


def test_a_cancellation_of_trio_goes_on() -> None:
    async def main() -> bool:
        with trio.CancelScope() as scope:
            scope.cancel()
            await await_users_code(sleep_forever())
        return scope.cancelled_caught

    assert trio.run(main)


def test_an_interrupt_in_users_code_ends_the_program(anyio_backend_name: str) -> None:
    async def run(items: list[int]) -> list[int]:
        raise KeyboardInterrupt

    async def main() -> None:
        async with BatchScheduler(run) as scheduler:
            await scheduler.submit(1)

    with pytest.raises(BaseException) as raised:  # noqa: PT011  # in groups, on trio
        anyio.run(main, backend=anyio_backend_name)
    assert BaseExceptionGroup("", [raised.value]).subgroup(KeyboardInterrupt) is not None


class Unsteady(PaddedCostModel):
    """A cost model that panics for items of size 13, and when it learns."""

    def predict_s(self, count: int, longest: int, total: int) -> float:
        if longest == 13:
            raise Panic("unlucky")
        return super().predict_s(count, longest, total)

    def observe(self, count: int, longest: int, total: int, elapsed_s: float) -> None:
        raise Panic("cannot learn")


@pytest.mark.anyio
async def test_a_panic_in_any_function_of_a_user_ends_nothing_else() -> None:
    async def close() -> None:
        raise Panic("cannot close")

    def tell(record: BatchRecord) -> None:
        raise Panic("cannot tell")

    def is_too_large(error: Exception) -> bool:
        raise Panic("cannot say")

    def size(item: int) -> int:
        if item == 3:
            raise Panic("cannot measure")
        return item

    def run(items: list[int]) -> list[int]:
        if 5 in items:
            raise Panic("cannot compute")
        return items

    def listen(outcome: Outcome[int]) -> None:
        heard.set()
        raise Panic("cannot hear")

    heard = anyio.Event()
    async with BatchScheduler(
        run, cost_model=Unsteady(), item_size=size, is_too_large=is_too_large, on_batch=tell, on_close=close
    ) as scheduler:
        for _ in range(2):
            for refused in (13, 5):
                with pytest.raises(RuntimeError, match=r"Panic: (unlucky|cannot compute)"):
                    await scheduler.submit(refused)
            assert await scheduler.submit(3) == 3
        scheduler.submit_nowait(1, listen)
        await heard.wait()
        assert await scheduler.submit_many([1, 2]) == [Success(1), Success(2)]
        assert not scheduler.is_broken


class Lazy(Sequence[int]):
    """Outputs that are computed when they are read."""

    def __init__(self, items: list[int]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: Any) -> Any:
        if self.items[index] == 5:
            raise Panic("cannot compute")
        return self.items[index]


@pytest.mark.anyio
async def test_a_panic_where_outputs_are_read_in_the_event_loop_fails_their_item_alone() -> None:
    async def run(items: list[int]) -> Lazy:
        return Lazy(items)

    async with BatchScheduler(run) as scheduler:
        outcomes = await scheduler.submit_many(range(4, 8))
        assert await scheduler.submit(1) == 1
    assert [type(outcome) for outcome in outcomes] == [Success, Failure, Success, Success]


def test_a_batch_that_cancels_its_own_task_fails_and_ends_nothing_else() -> None:
    """As libraries do that bring their own time limits: they cancel the task that they run in."""

    async def run(items: list[int]) -> list[int]:
        if 5 in items:
            task = asyncio.current_task()
            assert task is not None
            task.cancel()
            await asyncio.sleep(0)
        return items

    async def main() -> list[Outcome[int]]:
        async with BatchScheduler(run, batch_timeout_s=60) as scheduler:
            outcomes = await scheduler.submit_many(range(4, 8))
            assert await scheduler.submit(1) == 1
            return outcomes
        raise AssertionError("the block was left without an error")

    outcomes = asyncio.run(main())
    assert [type(outcome) for outcome in outcomes] == [Success, Failure, Success, Success]


def test_a_program_ends_that_leaves_a_scheduler_open_while_a_batch_runs() -> None:
    """Then `asyncio.run` cancels all tasks, and waits until they have ended."""
    ran = list[list[int]]()

    async def main() -> BatchScheduler[int, int]:
        is_running = asyncio.Event()

        async def run(items: list[int]) -> list[int]:
            ran.append(items)
            is_running.set()
            await anyio.sleep_forever()
            return items

        scheduler = BatchScheduler(run)
        await scheduler.__aenter__()
        for item in range(4):
            scheduler.submit_nowait(item, lambda _: None)
        await is_running.wait()
        return scheduler

    asyncio.run(main())
    assert ran == [[0, 1, 2, 3]], "none of them ran again alone"


@pytest.mark.anyio
@pytest.mark.parametrize("raised", [asyncio.CancelledError(), BaseExceptionGroup("", [asyncio.CancelledError()])])
async def test_a_cancellation_that_is_not_that_of_the_task_is_an_error(raised: BaseException) -> None:
    assert isinstance(users_error(raised), Exception)


@pytest.mark.anyio
async def test_the_cancellation_of_the_task_goes_on() -> None:
    with anyio.CancelScope() as scope:
        scope.cancel()
        try:
            await anyio.sleep(1)
        except BaseException as error:
            with pytest.raises(type(error)):
                users_error(error)
            raise
