"""Batches that do not fit a device's memory: every item gets its result, and the limit is learnt."""

import gc
import weakref
from collections.abc import Sequence

import anyio
import anyio.lowlevel
import pytest

from modalkit.batching import BatchPolicy, BatchRecord, BatchScheduler, Failure, PaddedCostModel, Success

pytestmark = pytest.mark.anyio


class Tensor:
    """Something large that a failed call leaves in its frame."""


class Device:
    """Has room for `room` tokens; a batch takes its number times its longest item."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.ran: list[int] = []
        self.refused: list[int] = []
        self.alive_at_call: list[int] = []
        self.tensors: weakref.WeakSet[Tensor] = weakref.WeakSet()

    def run(self, items: Sequence[int]) -> list[int]:
        self.alive_at_call.append(len(self.tensors))
        tensor = Tensor()
        self.tensors.add(tensor)
        tokens = len(items) * max(items)
        if tokens > self.room:
            self.refused.append(tokens)
            raise MemoryError(f"{tokens} tokens do not fit")
        self.ran.append(tokens)
        return [2 * item for item in items]


def is_memory_error(error: Exception) -> bool:
    return isinstance(error, MemoryError)


def scheduler_on(device: Device, max_batch_size: int = 256, **options: object) -> BatchScheduler[int, int]:
    return BatchScheduler(
        device.run,
        policy=BatchPolicy(max_batch_size=max_batch_size),
        item_size=int,
        is_too_large=is_memory_error,
        **{"cost_model": PaddedCostModel(), **options},  # type: ignore[arg-type]  # passed on
    )


async def test_every_item_of_a_batch_that_is_far_too_large_gets_its_result() -> None:
    device = Device(room=40)
    async with scheduler_on(device) as scheduler:
        outcomes = await scheduler.submit_many([10] * 256)
    assert outcomes == [Success(20)] * 256
    assert len(device.refused) < 256 / 4 * 2


async def test_the_limit_is_remembered_and_seldom_tried() -> None:
    device = Device(room=1000)
    async with scheduler_on(device) as scheduler:
        for _ in range(60):
            assert await scheduler.submit_many([10] * 256) == [Success(20)] * 256
    assert len(device.refused) < 0.05 * len(device.ran)
    assert max(device.ran) <= 1000
    assert sum(device.ran) / len(device.ran) > 700


async def test_an_item_that_is_too_large_alone_gets_that_error_and_the_others_their_results() -> None:
    device = Device(room=100)
    async with scheduler_on(device) as scheduler:
        outcomes = await scheduler.submit_many([10, 500, 20])
    assert [type(outcome) for outcome in outcomes] == [Success, Failure, Success]
    failure = outcomes[1]
    assert isinstance(failure, Failure)
    assert str(failure.error) == "500 tokens do not fit"


async def test_an_item_that_is_too_large_alone_makes_no_later_batch_smaller() -> None:
    """Its declared size may say nothing, such as that of an image without `item_size`."""

    def run(items: Sequence[str]) -> Sequence[str]:
        if "huge" in items:
            raise MemoryError("a huge image")
        return items

    records = list[BatchRecord]()
    async with BatchScheduler(
        run, cost_model=PaddedCostModel(), is_too_large=is_memory_error, on_batch=records.append
    ) as scheduler:
        outcomes = await scheduler.submit_many(["huge", *["small"] * 31])
        assert outcomes[1:] == [Success("small")] * 31
        with pytest.raises(MemoryError):
            await scheduler.submit("huge")
        await scheduler.submit_many(["small"] * 64)
    assert [record.count for record in records] == [32, 1, 32, 32]


async def test_a_device_that_is_too_small_is_noticed_beside_an_item_that_is_too_large_alone() -> None:
    device = Device(room=80)
    async with scheduler_on(device) as scheduler:
        await scheduler.submit_many([500, *[10] * 31])
        refused = len(device.refused)
        assert await scheduler.submit_many([10] * 31) == [Success(20)] * 31
    assert len(device.refused) == refused


async def test_where_nothing_fits_any_more_no_item_is_the_cause_until_one_fits_again() -> None:
    """As when another process takes the memory of the device: jobs then run again later."""
    device = Device(room=0)
    async with scheduler_on(device, max_batch_size=16) as scheduler:
        failures = [outcome for outcome in await scheduler.submit_many([10] * 16) if isinstance(outcome, Failure)]
        assert [failure.is_systemic for failure in failures] == [True] * 16
        device.room = 100
        assert await scheduler.submit_many([10]) == [Success(20)]
        failed, succeeded = await scheduler.submit_many([500, 10])
    assert isinstance(failed, Failure)
    assert not failed.is_systemic
    assert succeeded == Success(20)


class TranslatingDevice(Device):
    """Raises an error of its own out of the allocator's."""

    def run(self, items: Sequence[int]) -> list[int]:
        try:
            return super().run(items)
        except MemoryError as error:
            raise MemoryError("translated") from error


@pytest.mark.parametrize("kind", [Device, TranslatingDevice])
async def test_what_a_failed_call_held_is_free_before_the_next_one(kind: type[Device]) -> None:
    """As long as the error's frames hold the tensors of the failed call, half the batch does not fit either."""
    device = kind(room=40)
    async with scheduler_on(device) as scheduler:
        gc.collect()
        await scheduler.submit_many([10] * 64)
    assert set(device.alive_at_call) == {0}


async def test_the_limit_is_known_before_the_search_has_ended() -> None:
    device, records, known = Device(room=80), list[BatchRecord](), anyio.Event()

    async def run(items: list[int]) -> list[int]:
        await anyio.lowlevel.checkpoint()
        try:
            return device.run(items)
        finally:
            if len(device.ran) == 2:
                known.set()

    async with BatchScheduler(
        run,
        policy=BatchPolicy(max_batch_size=256),
        cost_model=PaddedCostModel(),
        item_size=int,
        is_too_large=is_memory_error,
        on_batch=records.append,
        max_in_flight=2,
    ) as scheduler:
        async with anyio.create_task_group() as callers:
            callers.start_soon(scheduler.submit_many, [10] * 256)
            await known.wait()
            assert not records
            callers.start_soon(scheduler.submit_many, [10] * 64)
    assert sorted(record.count for record in records) == [*[8] * 8, 256]


async def test_a_batch_that_was_split_is_recorded_once_and_its_parts_teach_what_they_cost() -> None:
    device, records, learnt = Device(room=100), list[BatchRecord](), list[int]()

    class Pupil(PaddedCostModel):
        def observe(self, count: int, longest: int, total: int, elapsed_s: float) -> None:
            learnt.append(count)

    async with scheduler_on(device, cost_model=Pupil(), on_batch=records.append) as scheduler:
        await scheduler.submit_many([10] * 16)
        await scheduler.submit(10)
    assert [(record.count, record.failed) for record in records] == [(16, 0), (1, 0)]
    assert learnt == [8, 8, 1]


async def test_without_a_classifier_it_is_an_error_like_any_other() -> None:
    device = Device(room=50)
    async with BatchScheduler(device.run, item_size=int) as scheduler:
        first, *others = await scheduler.submit_many([100, 10])
    assert isinstance(first, Failure)
    assert others == [Success(20)]


async def test_a_classifier_that_fails_is_logged_and_the_error_counts_as_any_other(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(error: Exception) -> bool:
        raise AttributeError("half imported")

    device = Device(room=50)
    async with BatchScheduler(device.run, item_size=int, is_too_large=fail) as scheduler:
        with pytest.raises(MemoryError):
            await scheduler.submit(100)
        assert await scheduler.submit(10) == 20
    assert "is_too_large failed" in caplog.text


async def test_a_cost_model_that_fails_is_logged_and_disturbs_no_batch(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(PaddedCostModel):
        def observe(self, count: int, longest: int, total: int, elapsed_s: float) -> None:
            raise ArithmeticError

    async with BatchScheduler(lambda items: items, cost_model=Broken()) as scheduler:
        assert await scheduler.submit(1) == 1
        assert await scheduler.submit(2) == 2
    assert "could not learn" in caplog.text
