"""What callers of the scheduler can rely on, on asyncio and trio."""

import asyncio
import gc
import math
import threading
import weakref
from collections import UserList
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from traceback import walk_tb
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from modalkit.batching import (
    BatchingError,
    BatchPolicy,
    BatchRecord,
    BatchScheduler,
    BatchTimeoutError,
    DeadlineExceededError,
    DispatchReason,
    Failure,
    OutputCountError,
    PaddedCostModel,
    Priority,
    QueueFullError,
    RequestTooLargeError,
    SchedulerClosedError,
    Success,
)
from modalkit.batching.pending import ItemSizes
from modalkit.batching.statistics import RECENT_BATCHES

pytestmark = pytest.mark.anyio


class Pipeline:
    """Doubles numbers, remembers its batches, fails on negative ones, and can be held at a gate."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.entered = anyio.Event()
        self.gate = anyio.Event()

    async def run(self, numbers: list[int]) -> list[int]:
        self.batches.append(numbers)
        self.entered.set()
        await self.gate.wait()
        for number in numbers:
            if number < 0:
                raise ValueError(f"{number} is negative")
        return [2 * number for number in numbers]


@asynccontextmanager
async def held(
    pipeline: Pipeline, **options: Any
) -> AsyncIterator[tuple[BatchScheduler[int, int], anyio.abc.TaskGroup]]:
    """A scheduler whose worker is busy with the request 0, so that whatever is submitted next waits in the queue."""
    async with BatchScheduler(pipeline.run, **options) as scheduler, anyio.create_task_group() as group:
        group.start_soon(scheduler.submit, 0)
        await pipeline.entered.wait()
        yield scheduler, group
        pipeline.gate.set()


async def test_requests_that_wait_together_run_together_and_each_gets_its_own_result() -> None:
    pipeline = Pipeline()
    results: dict[int, int] = {}

    async def call(number: int) -> None:
        results[number] = await scheduler.submit(number)

    async with held(pipeline) as (scheduler, group):
        for number in range(1, 9):
            group.start_soon(call, number)
        await anyio.wait_all_tasks_blocked()
    assert results == {number: 2 * number for number in range(1, 9)}
    assert [sorted(batch) for batch in pipeline.batches] == [[0], list(range(1, 9))]


async def test_a_lone_request_on_an_idle_worker_runs_at_once_in_the_schedulers_own_thread() -> None:
    threads = []

    def run(items: list[str]) -> list[str]:
        threads.append(threading.current_thread())
        return [item.upper() for item in items]

    async with BatchScheduler(run, name="model") as scheduler:
        assert await scheduler.submit("one") == "ONE"
        assert await scheduler.submit("two") == "TWO"
    assert threads[0] is threads[1]
    assert threads[0].name == "model 0"


async def test_many_are_submitted_at_once_and_keep_their_order() -> None:
    async with BatchScheduler(lambda items: [-item for item in items]) as scheduler:
        outcomes = await scheduler.submit_many(range(100))
    assert outcomes == [Success(-number) for number in range(100)]


async def test_submitting_nothing_returns_nothing() -> None:
    async with BatchScheduler(lambda items: items) as scheduler:
        assert await scheduler.submit_many([]) == []


async def test_a_poisoned_item_fails_alone() -> None:
    pipeline = Pipeline()
    pipeline.gate.set()
    async with BatchScheduler(pipeline.run, cost_model=PaddedCostModel()) as scheduler:
        outcomes = await scheduler.submit_many([1, 2, 3, -4, 5, 6, 7, 8])
    assert [outcome for outcome in outcomes if isinstance(outcome, Success)] == [
        Success(2 * number) for number in (1, 2, 3, 5, 6, 7, 8)
    ]
    match outcomes[3]:
        case Failure(ValueError() as error):
            assert str(error) == "-4 is negative"
        case other:
            pytest.fail(f"got {other}")
    assert len(pipeline.batches) == 1 + 3 + 1 + 1, "the whole, three halves, the one proof, and those requeued"


async def test_an_exception_among_the_outputs_is_that_items_error_and_costs_no_further_call() -> None:
    calls = []

    def run(items: list[int]) -> Sequence[int | Exception]:
        calls.append(items)
        return [item or LookupError("zero") for item in items]

    async with BatchScheduler(run) as scheduler:
        good, bad = await scheduler.submit_many([1, 0])
    assert good == Success(1)
    assert isinstance(bad, Failure)
    assert isinstance(bad.error, LookupError)
    assert len(calls) == 1


class Mangled(UserList[int]):
    """A sequence that lies about its length."""

    def __init__(self) -> None:
        super().__init__([1, 2, 3])

    def __len__(self) -> int:
        return 1


@pytest.mark.parametrize(
    ("run_batch", "message"),
    [
        (lambda items: items[1:], "one output for each of 1 inputs must be returned, not 0 outputs"),
        (lambda items: [*items, 1], "one output for each of 1 inputs must be returned, not 2 outputs"),
        (lambda _: None, "not an object of type NoneType"),
        (lambda _: "ab", "not an object of type str"),
        (lambda items: (item for item in items), "not an object of type generator"),
        (lambda items: Mangled(), "one output for each of 1 inputs must be returned, not 3 outputs"),
    ],
)
async def test_a_wrong_number_of_outputs_is_an_error_that_says_so(
    run_batch: Callable[[list[int]], Any], message: str
) -> None:
    async with BatchScheduler(run_batch) as scheduler:
        with pytest.raises(OutputCountError, match=message):
            await scheduler.submit(1)
        assert scheduler.statistics().failed == 1


async def test_only_the_items_that_lose_their_output_fail() -> None:
    async with BatchScheduler(lambda items: [item for item in items if item != 3]) as scheduler:
        outcomes = await scheduler.submit_many(range(6))
    assert [type(outcome) for outcome in outcomes] == [Success, Success, Success, Failure, Success, Success]


async def test_a_batch_that_hangs_fails_in_time_and_the_scheduler_goes_on() -> None:
    release = threading.Event()

    def run(items: list[str]) -> list[str]:
        if "hang" in items:
            release.wait()
        return items

    async with BatchScheduler(run, batch_timeout_s=0.05) as scheduler:
        with pytest.raises(BatchTimeoutError, match=r"batch of 1 did not finish within the batch timeout of 0.05 s"):
            await scheduler.submit("hang")
        assert await scheduler.submit("go on") == "go on"
        assert scheduler.statistics().stuck_threads == 1
        release.set()


async def test_an_asynchronous_batch_that_hangs_is_cancelled_in_time() -> None:
    async def run(items: list[str]) -> list[str]:
        if "hang" in items:
            await anyio.sleep_forever()
        return items

    async with BatchScheduler(run, batch_timeout_s=0.05) as scheduler:
        with pytest.raises(BatchTimeoutError):
            await scheduler.submit("hang")
        assert await scheduler.submit("go on") == "go on"


@pytest.mark.parametrize("anyio_backend", ["asyncio"])  # trio has nothing that could do so
async def test_an_asynchronous_batch_that_is_cancelled_by_something_inside_it_is_an_error_of_the_batch() -> None:
    async def run(items: list[str]) -> list[str]:
        if "cancelled" in items:
            raise asyncio.CancelledError
        return items

    async with BatchScheduler(run) as scheduler:
        with pytest.raises(BatchingError, match="cancelled by something inside it"):
            await scheduler.submit("cancelled")
        assert await scheduler.submit("go on") == "go on"


async def test_an_error_leaves_no_cycle_that_keeps_what_its_batch_had_in_hand() -> None:
    """On a GPU that would be memory which only the garbage collector frees."""
    tensors: weakref.WeakSet[Pipeline] = weakref.WeakSet()

    def run(items: list[int]) -> list[int]:
        tensor = Pipeline()
        tensors.add(tensor)
        raise ValueError(len(items))

    async with BatchScheduler(run) as scheduler:
        gc.collect()
        gc.disable()
        try:
            for _ in range(5):
                with pytest.raises(ValueError, match="1"):
                    await scheduler.submit(1)
            await anyio.wait_all_tasks_blocked()
            assert len(tensors) <= 1
        finally:
            gc.enable()


async def test_an_error_that_is_returned_for_many_items_holds_the_frames_of_one_caller_at_most() -> None:
    """Such as a constant of the pipeline: else each caller would leave its frames there, with all that they hold."""
    error = ValueError("not this one")

    def frames() -> list[str]:
        return [frame.f_code.co_name for frame, _ in walk_tb(error.__traceback__)]

    async with BatchScheduler[int, int](lambda items: [error for _ in items]) as scheduler:
        with pytest.raises(ValueError, match="not this one"):
            await scheduler.submit(1)
        first = frames()
        for _ in range(10):
            with pytest.raises(ValueError, match="not this one"):
                await scheduler.submit(1)
        assert frames() == first


async def test_a_callback_that_fails_disturbs_no_batch(caplog: pytest.LogCaptureFixture) -> None:
    def fail(record: BatchRecord) -> None:
        raise KeyError(record.count)

    async with BatchScheduler(lambda items: items, on_batch=fail) as scheduler:
        assert await scheduler.submit(1) == 1
        assert await scheduler.submit(2) == 2
    assert "on_batch failed" in caplog.text


async def test_a_record_tells_what_a_batch_was_and_how_it_went() -> None:
    pipeline, records = Pipeline(), list[BatchRecord]()
    size_of = lambda number: abs(number) or 1  # noqa: E731
    options = {"on_batch": records.append, "cost_model": PaddedCostModel(), "item_size": size_of}
    async with held(pipeline, **options) as (scheduler, group):
        group.start_soon(scheduler.submit_many, [10, -10, 9])
        await anyio.wait_all_tasks_blocked()
    first, second = records
    assert (first.count, first.failed, first.real_tokens, first.padded_tokens) == (1, 0, 1, 1)
    assert (second.count, second.failed, second.real_tokens, second.padded_tokens) == (3, 1, 29, 30)
    assert second.padding_share == pytest.approx(1 / 30)
    assert second.priority is Priority.INTERACTIVE
    assert second.reason is DispatchReason.IDLE
    (waits_s,) = second.waits_s.values()
    assert len(waits_s) == 3
    assert 0 < min(waits_s) <= second.queue_s + 1e-6 <= max(waits_s) + 2e-6, "a mean, which is rounded"
    assert 0 < first.predict_s <= first.total_s + 1e-6, "two clocks, which tick alike"
    assert second.predict_s == 0 < second.total_s, "it failed and ran again in parts"


async def test_a_full_queue_refuses_with_its_depth_and_loses_nothing() -> None:
    pipeline = Pipeline()
    async with held(pipeline, policy=BatchPolicy(max_queue_items=3)) as (scheduler, group):
        for number in (1, 2):
            group.start_soon(scheduler.submit, number)
        await anyio.wait_all_tasks_blocked()
        with pytest.raises(QueueFullError) as caught:
            await scheduler.submit_many([3, 4])
        assert caught.value.depth == 2
        assert scheduler.statistics().refused == 2
        group.start_soon(scheduler.submit, 5)
        await anyio.wait_all_tasks_blocked()
    assert [sorted(batch) for batch in pipeline.batches] == [[0], [1, 2, 5]]


async def test_a_caller_that_goes_away_takes_its_queued_request_with_it() -> None:
    pipeline = Pipeline()
    async with held(pipeline) as (scheduler, group):
        gone = anyio.CancelScope()

        async def leave() -> None:
            with gone:
                await scheduler.submit(1)

        group.start_soon(leave)
        group.start_soon(scheduler.submit, 2)
        await anyio.wait_all_tasks_blocked()
        gone.cancel()
        await anyio.wait_all_tasks_blocked()
        assert scheduler.statistics().queued == {Priority.INTERACTIVE: 1, Priority.BULK: 0}
        assert scheduler.statistics().cancelled == 1
    assert pipeline.batches == [[0], [2]]


async def test_a_caller_that_goes_away_while_its_request_runs_disturbs_no_other() -> None:
    pipeline = Pipeline()
    results = []

    async def stay() -> None:
        results.append(await scheduler.submit(2))

    async with held(pipeline) as (scheduler, group):
        gone = anyio.CancelScope()

        async def leave() -> None:
            with gone:
                await scheduler.submit(1)

        group.start_soon(leave)
        group.start_soon(stay)
        await anyio.wait_all_tasks_blocked()
        pipeline.gate.set()
        pipeline.gate = anyio.Event()
        await anyio.wait_all_tasks_blocked()
        assert sorted(pipeline.batches[-1]) == [1, 2]
        gone.cancel()
        await anyio.wait_all_tasks_blocked()
    assert results == [4]
    assert scheduler.statistics().cancelled == 1


async def test_a_request_whose_caller_left_is_not_run_again_when_its_batch_is_split() -> None:
    pipeline = Pipeline()
    async with held(pipeline) as (scheduler, group):
        gone = anyio.CancelScope()

        async def leave() -> None:
            with gone:
                await scheduler.submit(-1)

        async def stay() -> None:
            assert await scheduler.submit(2) == 4

        group.start_soon(leave)
        group.start_soon(stay)
        await anyio.wait_all_tasks_blocked()
        pipeline.gate.set()
        pipeline.gate = anyio.Event()
        await anyio.wait_all_tasks_blocked()
        gone.cancel()
        await anyio.wait_all_tasks_blocked()
    assert [sorted(batch) for batch in pipeline.batches] == [[0], [-1, 2], [2]]


async def test_a_deadline_ends_the_wait_and_the_request_never_reaches_the_pipeline() -> None:
    pipeline = Pipeline()
    async with held(pipeline) as (scheduler, _):
        with pytest.raises(DeadlineExceededError, match=r"no result within 0\.01 s"):
            await scheduler.submit(1, timeout_s=0.01)
        assert scheduler.statistics().expired == 1
    assert pipeline.batches == [[0]]


async def test_a_deadline_of_many_fails_only_those_without_a_result() -> None:
    async def run(items: list[str]) -> list[str]:
        if "slow" in items:
            await anyio.sleep_forever()
        return items

    policy = BatchPolicy(max_batch_size=1)
    async with BatchScheduler(run, policy=policy, batch_timeout_s=0.2) as scheduler:
        quick, slow = await scheduler.submit_many(["quick", "slow"], timeout_s=0.05)
    assert quick == Success("quick")
    assert isinstance(slow, Failure)
    assert isinstance(slow.error, DeadlineExceededError)


async def test_a_request_that_can_never_fit_is_refused_at_once_and_disturbs_no_other() -> None:
    policy = BatchPolicy(max_batch_tokens=10)
    async with BatchScheduler(lambda items: items, policy=policy, item_size=len) as scheduler:
        with pytest.raises(RequestTooLargeError, match=r"size 11 can never run: max_batch_tokens is 10"):
            await scheduler.submit("x" * 11)
        short, long = await scheduler.submit_many(["ok", "x" * 11])
        assert [isinstance(outcome, Failure) for outcome in await scheduler.submit_many(["x" * 11] * 2)] == [True, True]
    assert short == Success("ok")
    assert isinstance(long, Failure)


@pytest.mark.parametrize("size", [0, -1, 2**40])
async def test_a_given_size_out_of_range_is_refused_and_the_scheduler_goes_on(size: int) -> None:
    async with BatchScheduler(lambda items: items) as scheduler:
        with pytest.raises(ValueError, match=f"size must be from 1 to 2147483648, got {size}"):
            await scheduler.submit("x", size=size)
        assert await scheduler.submit("ok") == "ok"


def raise_key_error(item: str) -> int:
    raise KeyError(item)


@pytest.mark.parametrize(
    ("item_size", "message"),
    [
        (raise_key_error, "raised KeyError: 'x'; the item counts as 1"),
        (lambda _: 0, "returned 0; the item counts as 1"),
        (lambda _: -7, "returned -7; the item counts as 1"),
        (lambda _: None, "raised TypeError"),
        (lambda _: math.nan, "raised ValueError"),
        (lambda _: 10**400, "returned a number of 1329 bits; the item counts as 2147483648"),
    ],
)
async def test_an_item_whose_size_is_unknown_runs_all_the_same_with_one_warning(
    item_size: Callable[[str], Any], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with BatchScheduler(lambda items: items, item_size=item_size, name="model") as scheduler:
        assert await scheduler.submit("x") == "x"
        assert await scheduler.submit_many(["x", "y"]) == [Success("x"), Success("y")]
    [warning] = caplog.messages
    assert f"model: item_size {message}" in warning


def test_an_interrupt_while_an_item_is_measured_is_passed_on() -> None:
    def interrupted(item: str) -> int:
        raise KeyboardInterrupt

    sizes = ItemSizes(interrupted, "model")
    with pytest.raises(KeyboardInterrupt):
        sizes.of("x")


async def test_a_size_with_a_fraction_is_rounded_up() -> None:
    size: Any = 2.2
    policy = BatchPolicy(max_batch_tokens=2)
    async with BatchScheduler(lambda items: items, policy=policy, item_size=lambda _: size) as scheduler:
        with pytest.raises(RequestTooLargeError, match="a request of size 3 can never run"):
            await scheduler.submit("x")


async def test_leaving_runs_everything_accepted_and_then_refuses() -> None:
    pipeline = Pipeline()
    pipeline.gate.set()
    async with anyio.create_task_group() as group:
        async with BatchScheduler(pipeline.run) as scheduler:
            pipeline.gate = anyio.Event()
            for number in range(3):
                group.start_soon(scheduler.submit, number)
            await pipeline.entered.wait()
            pipeline.gate.set()
        with pytest.raises(SchedulerClosedError, match="not open"):
            await scheduler.submit(4)
    assert sorted(number for batch in pipeline.batches for number in batch) == [0, 1, 2]


async def test_submitting_before_opening_is_refused() -> None:
    with pytest.raises(SchedulerClosedError):
        await BatchScheduler(lambda items: items).submit(1)


async def test_an_error_in_the_block_goes_on_unwrapped_and_ends_all_waiting() -> None:
    pipeline = Pipeline()
    errors: list[Exception] = []

    async def call(scheduler: BatchScheduler[int, int], number: int) -> None:
        try:
            await scheduler.submit(number)
        except SchedulerClosedError as error:
            errors.append(error)

    async with anyio.create_task_group() as group:
        with pytest.raises(KeyError, match="mine"):  # noqa: PT012  # the block is what is tested
            async with BatchScheduler(pipeline.run, policy=BatchPolicy(max_batch_size=1)) as scheduler:
                for number in range(3):
                    group.start_soon(call, scheduler, number)
                await anyio.wait_all_tasks_blocked()
                raise KeyError("mine")
    assert len(errors) == 3


async def test_cancelling_the_block_ends_it_at_once() -> None:
    pipeline = Pipeline()
    with anyio.move_on_after(math.inf) as scope:
        async with BatchScheduler(pipeline.run) as scheduler, anyio.create_task_group() as group:
            group.start_soon(scheduler.submit, 1)
            await pipeline.entered.wait()
            scope.cancel()
    assert scope.cancelled_caught
    assert scheduler.statistics().running == 0


async def test_bulk_waits_while_interactive_runs_first() -> None:
    pipeline = Pipeline()
    async with held(pipeline) as (scheduler, group):

        async def bulk() -> None:
            await scheduler.submit_many([1, 2], priority=Priority.BULK)

        group.start_soon(bulk)
        await anyio.wait_all_tasks_blocked()
        group.start_soon(scheduler.submit, 3)
        await anyio.wait_all_tasks_blocked()
    assert pipeline.batches == [[0], [3], [1, 2]]


async def test_several_batches_run_at_the_same_time_when_allowed() -> None:
    pipeline = Pipeline()
    policy = BatchPolicy(max_batch_size=1)
    async with (
        BatchScheduler(pipeline.run, policy=policy, max_in_flight=3) as scheduler,
        anyio.create_task_group() as group,
    ):
        for number in range(5):
            group.start_soon(scheduler.submit, number)
        await anyio.wait_all_tasks_blocked()
        assert [len(batch) for batch in pipeline.batches] == [1, 1, 1]
        assert scheduler.statistics().running == 3
        pipeline.gate.set()


async def test_while_the_allowed_partial_batches_run_only_full_ones_are_added() -> None:
    pipeline = Pipeline()
    policy = BatchPolicy(max_batch_size=4)
    async with held(pipeline, policy=policy, max_in_flight=8, max_partial_in_flight=2) as (scheduler, group):
        for number in range(1, 5):
            group.start_soon(scheduler.submit, number)
            await anyio.wait_all_tasks_blocked()
        assert pipeline.batches == [[0], [1]]  # 2, 3 and 4 wait for one more, or for a batch to end
        group.start_soon(scheduler.submit, 5)
        await anyio.wait_all_tasks_blocked()
        assert [sorted(batch) for batch in pipeline.batches] == [[0], [1], [2, 3, 4, 5]]
        group.start_soon(scheduler.submit, 6)
        await anyio.wait_all_tasks_blocked()
    assert pipeline.batches[3:] == [[6]]


async def test_what_was_held_back_runs_when_the_scheduler_closes() -> None:
    pipeline = Pipeline()
    async with anyio.create_task_group() as group:
        async with BatchScheduler(pipeline.run, max_in_flight=3, max_partial_in_flight=1) as scheduler:
            group.start_soon(scheduler.submit, 0)
            await pipeline.entered.wait()
            group.start_soon(scheduler.submit, 1)
            await anyio.wait_all_tasks_blocked()
            assert pipeline.batches == [[0]]
            pipeline.gate.set()
    assert pipeline.batches == [[0], [1]]


async def test_many_requests_at_once_keep_all_idle_workers_busy() -> None:
    pipeline = Pipeline()
    policy = BatchPolicy(max_batch_size=2)
    async with (
        BatchScheduler(pipeline.run, policy=policy, max_in_flight=4) as scheduler,
        anyio.create_task_group() as group,
    ):
        group.start_soon(scheduler.submit_many, range(8))
        await anyio.wait_all_tasks_blocked()
        assert sorted(map(len, pipeline.batches)) == [2, 2, 2, 2]
        pipeline.gate.set()


async def test_statistics_account_for_every_request_and_batch() -> None:
    policy = BatchPolicy(max_batch_size=4)
    async with BatchScheduler(lambda items: items, policy=policy, item_size=len) as scheduler:
        await scheduler.submit_many(["a" * 10] * 4 + ["a" * 9])
        statistics = scheduler.statistics()
    assert statistics.accepted == statistics.succeeded == 5
    assert statistics.batch_sizes == {4: 1, 1: 1}
    assert statistics.mean_batch_size == 2.5
    assert statistics.real_tokens == statistics.padded_tokens == 49
    assert statistics.padding_share == 0
    assert statistics.busy_s >= statistics.predict_s > 0
    assert 0 < statistics.utilisation < 1
    assert statistics.queue_depth == statistics.queued_s == 0
    assert set(statistics.oldest_s.values()) == {0}


async def test_statistics_tell_how_long_requests_have_waited_and_how_long_all_will_take() -> None:
    pipeline, sizes = Pipeline(), {1: 100, 2: 100, 3: 50}
    options = {"cost_model": PaddedCostModel(1.0, 0.01), "policy": BatchPolicy(max_batch_size=2)}
    async with held(pipeline, **options) as (scheduler, group):
        for number in (1, 2, 3):
            group.start_soon(partial(scheduler.submit, number, size=sizes[number]))
        group.start_soon(partial(scheduler.submit, 4, size=50, priority=Priority.BULK))
        await anyio.wait_all_tasks_blocked()
        statistics = scheduler.statistics()
        assert statistics.queued_s == pytest.approx(3.0 + 2 * 1.0, rel=0.01), (
            "each in the best batch of its size and lane"
        )
        assert statistics.work_s[Priority.BULK] == pytest.approx(1.0, rel=0.01)
        assert min(statistics.oldest_s.values()) > 0


async def test_the_statistics_hold_the_last_batches_with_the_sizes_of_their_requests_and_without_errors() -> None:
    def run(items: list[str]) -> list[str]:
        if "bad" in items:
            raise ValueError("a bad item")
        return items

    policy, told = BatchPolicy(max_batch_size=2), list[BatchRecord]()
    async with BatchScheduler(run, policy=policy, item_size=len, on_batch=told.append) as scheduler:
        await scheduler.submit_many(["a" * 10, "b" * 9])
        with pytest.raises(ValueError, match="a bad item"):
            await scheduler.submit("bad")
        several, failed = scheduler.statistics().recent
        assert (sorted(several.sizes), several.failed, several.device) == ([9, 10], 0, 0)
        assert (list(failed.sizes), failed.failed, failed.errors) == ([3], 1, ())
        assert several.formed_s < failed.formed_s < anyio.current_time()
        for _ in range(RECENT_BATCHES):
            await scheduler.submit("one")
        statistics = scheduler.statistics()
    assert statistics.batches == RECENT_BATCHES + 2
    assert {batch.count for batch in statistics.recent} == {1}
    assert len(statistics.recent) == RECENT_BATCHES


async def test_a_record_has_the_waits_by_lane_and_the_tags_of_its_requests_once() -> None:
    pipeline, records = Pipeline(), list[BatchRecord]()
    async with held(pipeline, cost_model=PaddedCostModel(), on_batch=records.append) as (scheduler, group):
        group.start_soon(partial(scheduler.submit_many, [1, 2], tag="list"))
        group.start_soon(partial(scheduler.submit, 3, tag="one"))
        scheduler.submit_nowait(4, lambda _: None, priority=Priority.BULK, tag="job")
        await anyio.wait_all_tasks_blocked()
    first, second = records
    assert first.tags == []
    assert sorted(second.tags) == ["job", "list", "one"]
    assert {lane: len(waits_s) for lane, waits_s in second.waits_s.items()} == {
        Priority.INTERACTIVE: 3,
        Priority.BULK: 1,
    }


def test_statistics_can_be_read_after_the_event_loop_has_ended() -> None:
    async def main() -> BatchScheduler[int, int]:
        async with BatchScheduler(lambda items: items) as scheduler:
            assert await scheduler.submit(1) == 1
        return scheduler

    scheduler = anyio.run(main)
    statistics = scheduler.statistics()
    assert statistics.succeeded == 1
    assert statistics.open_s == scheduler.statistics().open_s > 0


def test_a_scheduler_that_can_run_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="max_in_flight must be at least 1, got 0"):
        BatchScheduler(lambda items: items, max_in_flight=0)
    with pytest.raises(ValueError, match="max_partial_in_flight must be from 1 to 4 or None, got 5"):
        BatchScheduler(lambda items: items, max_in_flight=4, max_partial_in_flight=5)
    with pytest.raises(ValueError, match="batch_timeout_s must be positive or None, got 0"):
        BatchScheduler(lambda items: items, batch_timeout_s=0)


async def test_a_request_without_a_task_tells_its_outcome_to_a_function() -> None:
    outcomes: dict[int, Any] = {}
    pipeline = Pipeline()
    async with held(pipeline) as (scheduler, _):
        for number in (1, 2, -3):
            scheduler.submit_nowait(number, partial(outcomes.__setitem__, number), priority=Priority.BULK)
        withdraw = scheduler.submit_nowait(4, partial(outcomes.__setitem__, 4), priority=Priority.BULK)
        withdraw()
        withdraw()
        assert scheduler.statistics().queued[Priority.BULK] == 3
        pipeline.gate.set()
    assert (outcomes[1], outcomes[2]) == (Success(2), Success(4))
    assert str(outcomes[-3].error) == "-3 is negative"
    assert set(outcomes) == {1, 2, -3}
    assert scheduler.statistics().cancelled == 1
    with pytest.raises(SchedulerClosedError):
        scheduler.submit_nowait(5, partial(outcomes.__setitem__, 5))


async def test_many_requests_without_tasks_tell_their_places() -> None:
    outcomes: dict[int, Any] = {}
    pipeline = Pipeline()
    policy = BatchPolicy(max_queue_items=6, max_batch_tokens=10)
    async with held(pipeline, policy=policy, item_size=abs) as (scheduler, _):
        handles = scheduler.submit_many_nowait([1, 20, -3, 4], outcomes.__setitem__)
        assert [isinstance(handle, Failure) for handle in handles] == [False, True, False, False]
        with pytest.raises(QueueFullError):
            scheduler.submit_many_nowait([5, 7], outcomes.__setitem__)
        for number in (6, 8, 9):
            scheduler.submit_nowait(number, lambda _: None)  # the last quarter of the queue is free
        assert not isinstance(handles[3], Failure)
        handles[3]()
        pipeline.gate.set()
    assert outcomes.pop(0) == Success(2)
    assert str(outcomes.pop(2).error) == "-3 is negative"
    assert not outcomes
    with pytest.raises(SchedulerClosedError):
        scheduler.submit_many_nowait([1], outcomes.__setitem__)


async def test_a_caller_that_is_cancelled_just_before_it_gets_its_outcome_disturbs_no_other() -> None:
    """The first outcome of a batch cancels the caller that gets the second one."""
    outcomes: list[Any] = []
    scope = anyio.CancelScope()

    def cancel_next(outcome: Any) -> None:
        outcomes.append(outcome)
        scope.cancel()

    async def call() -> None:
        with scope:
            outcomes.append(await scheduler.submit(2))

    pipeline = Pipeline()
    async with held(pipeline) as (scheduler, group):
        scheduler.submit_nowait(1, cancel_next)
        group.start_soon(call)
        await anyio.wait_all_tasks_blocked()
        scheduler.submit_nowait(3, outcomes.append)
    assert pipeline.batches == [[0], [1, 2, 3]]
    assert (outcomes, scope.cancelled_caught) == ([Success(2), Success(6)], True)


async def test_a_request_that_runs_when_it_is_withdrawn_tells_nothing() -> None:
    outcomes: list[Any] = []
    pipeline = Pipeline()
    async with BatchScheduler(pipeline.run) as scheduler:
        withdraw = scheduler.submit_nowait(1, outcomes.append)
        await pipeline.entered.wait()
        withdraw()
        pipeline.gate.set()
    assert outcomes == []


async def test_a_full_queue_refuses_at_once_what_has_no_task_and_a_function_that_fails_does_no_harm(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(_: object) -> None:
        raise LookupError("not for me")

    pipeline = Pipeline()
    async with held(pipeline, policy=BatchPolicy(max_queue_items=1, max_batch_size=1)) as (scheduler, _):
        scheduler.submit_nowait(1, fail)
        with pytest.raises(QueueFullError):
            scheduler.submit_nowait(2, lambda _: None)
        pipeline.gate.set()
        while scheduler.statistics().succeeded < 2:
            await anyio.lowlevel.checkpoint()
        assert await scheduler.submit(3) == 6
    assert "A function that was called with the outcome of a request failed" in caplog.text


async def test_those_without_a_task_get_an_outcome_when_the_scheduler_is_aborted() -> None:
    outcomes: list[Any] = []
    with anyio.CancelScope() as scope:
        async with BatchScheduler(Pipeline().run) as scheduler:
            scheduler.submit_nowait(1, outcomes.append)
            scope.cancel()
            await anyio.lowlevel.checkpoint()
    assert [type(outcome.error) for outcome in outcomes] == [SchedulerClosedError]


async def test_one_request_of_an_owner_runs_next_however_many_of_another_wait() -> None:
    """Companions, too, come in turns: each owner gets half of the batches while both have requests."""
    pipeline = Pipeline()
    policy = BatchPolicy(max_batch_size=8)
    async with held(pipeline, policy=policy, cost_model=PaddedCostModel(fixed_s=1.0, token_s=0.0)) as (
        scheduler,
        group,
    ):
        group.start_soon(partial(scheduler.submit_many, range(1, 1001), owner="a"))
        await anyio.wait_all_tasks_blocked()
        group.start_soon(partial(scheduler.submit, 5000, owner="b"))
        group.start_soon(partial(scheduler.submit_many, range(6000, 6012), owner="c"))
        await anyio.wait_all_tasks_blocked()
    first, second, third = ([number // 1000 for number in batch] for batch in pipeline.batches[1:4])
    assert 5 in first
    assert [numbers.count(6) for numbers in (first, second, third)] == [3, 4, 4]
