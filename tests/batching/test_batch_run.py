"""What becomes of the requests of a batch that fails, on asyncio and trio."""

import math
import threading
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
    Failure,
    Outcome,
    PaddedCostModel,
    Priority,
    Success,
    batch_run,
)
from tests.support.panic import Panic

pytestmark = pytest.mark.anyio


class Model:
    """Fails a batch with a failing item, and notes its runs."""

    def __init__(self) -> None:
        self.failing: set[int] = set()
        self.hanging: set[int] = set()
        self.is_down = False
        self.runs: list[list[int]] = []

    async def run(self, items: list[int]) -> list[int]:
        self.runs.append(items)
        await anyio.lowlevel.checkpoint()
        if not self.hanging.isdisjoint(items):
            await anyio.sleep_forever()
        if self.is_down:
            raise ConnectionError("what the model needs is down")
        for item in items:
            if item in self.failing:
                raise ValueError(f"{item} is failing")
        return [-item for item in items]


def kinds(outcomes: list[Outcome[int]], failing: set[int]) -> None:
    """Check that the other items got their results, and the failing ones an error that names them."""
    for item, outcome in enumerate(outcomes):
        if item in failing:
            assert isinstance(outcome, Failure)
            assert str(outcome.error) == f"{item} is failing"
            assert not outcome.is_systemic
        else:
            assert outcome == Success(-item)


@pytest.mark.parametrize("every", [2, 4, 8, 32])
@pytest.mark.parametrize("most", [8, 32, 256])
async def test_a_failing_item_fails_alone_at_any_rate(every: int, most: int) -> None:
    model = Model()
    model.failing = set(range(1, 400, every))
    policy = BatchPolicy(max_batch_size=most)
    async with BatchScheduler(model.run, policy=policy, cost_model=PaddedCostModel()) as scheduler:
        kinds(await scheduler.submit_many(range(400)), model.failing)


async def test_batches_are_small_while_failures_are_frequent_and_large_again_afterwards() -> None:
    model = Model()
    model.failing = set(range(0, 100, 2))
    async with BatchScheduler(model.run, cost_model=PaddedCostModel()) as scheduler:
        await scheduler.submit_many(range(100))
        assert sum(map(len, model.runs)) < 200
        model.runs.clear()
        await scheduler.submit_many(range(100, 2100))
    assert len(model.runs) < 2000 / 32 + 30
    assert set(map(len, model.runs[30:-1])) == {32}


async def test_an_untested_item_waits_again_with_its_old_sequence_number_while_others_run() -> None:
    model, records = Model(), list[BatchRecord]()
    model.failing = {0}
    policy = BatchPolicy(max_batch_size=4)
    async with BatchScheduler(
        model.run, policy=policy, cost_model=PaddedCostModel(), on_batch=records.append
    ) as scheduler:
        async with anyio.create_task_group() as group:

            async def bulk() -> None:
                kinds(await scheduler.submit_many(range(6), priority=Priority.BULK), {0})

            group.start_soon(bulk)
            while not model.runs:
                await anyio.lowlevel.checkpoint()
            group.start_soon(scheduler.submit, 9)
    assert len(model.runs[0]) == 4
    with_9 = next(number for number, run in enumerate(model.runs) if 9 in run)
    assert model.runs[with_9][0] == 9, "a request that came meanwhile goes first"
    assert with_9 < len(model.runs) - 1
    assert records[0].count == 4
    assert records[0].failed == 1
    assert sum(record.count - record.requeued for record in records) == 7


async def test_when_everything_fails_all_get_an_error_that_may_be_no_fault_of_theirs() -> None:
    model = Model()
    model.is_down = True
    async with BatchScheduler(model.run, cost_model=PaddedCostModel()) as scheduler:
        first = await scheduler.submit_many(range(64))
        assert len(model.runs) <= 64 + 2 * math.ceil(math.log2(32)), "each alone, and few in larger parts"
        model.runs.clear()
        second = await scheduler.submit_many(range(320))
        assert len(model.runs) <= 3 * 10
        model.is_down = False
        assert await scheduler.submit_many(range(320)) == [Success(-item) for item in range(320)]
        assert scheduler.statistics().failed == 384
    for outcome in (*first, *second):
        assert isinstance(outcome, Failure)
        assert isinstance(outcome.error, ConnectionError)
        assert outcome.is_systemic


async def test_where_everything_fails_slowly_a_batch_is_given_up_after_eight_items_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(batch_run, "MAX_SYSTEMIC_SEARCH_S", 0.0)
    model = Model()
    model.is_down = True
    async with BatchScheduler(model.run, cost_model=PaddedCostModel()) as scheduler:
        outcomes = await scheduler.submit_many(range(32))
    assert len(model.runs) <= 8 + 2 * math.ceil(math.log2(32))
    assert all(isinstance(outcome, Failure) and outcome.is_systemic for outcome in outcomes)


async def test_one_that_hangs_among_many_costs_one_error() -> None:
    model = Model()
    model.hanging = {17}
    policy = BatchPolicy(max_batch_size=64)
    async with BatchScheduler(
        model.run, policy=policy, cost_model=PaddedCostModel(), batch_timeout_s=0.02
    ) as scheduler:
        outcomes = await scheduler.submit_many(range(64), priority=Priority.BULK)
    for item, outcome in enumerate(outcomes):
        if item == 17:
            assert isinstance(outcome, Failure)
            assert isinstance(outcome.error, BatchTimeoutError)
            assert "batch of 1 did not finish" in str(outcome.error)
            assert not outcome.is_systemic
        else:
            assert outcome == Success(-item)
    assert len(model.runs) == 65


async def test_where_everything_hangs_it_is_given_up_after_three_items_alone() -> None:
    model = Model()
    model.hanging = set(range(64))
    policy = BatchPolicy(max_batch_size=64)
    async with BatchScheduler(
        model.run, policy=policy, cost_model=PaddedCostModel(), batch_timeout_s=0.01
    ) as scheduler:
        outcomes = await scheduler.submit_many(range(64))
    assert len(model.runs) == 1 + 3
    for outcome in outcomes:
        assert isinstance(outcome, Failure)
        assert isinstance(outcome.error, BatchTimeoutError)
        assert outcome.is_systemic


async def test_after_a_hang_those_whose_deadline_passed_do_not_run_again() -> None:
    model = Model()
    model.hanging = {0}
    async with BatchScheduler(model.run, cost_model=PaddedCostModel(), batch_timeout_s=0.05) as scheduler:
        outcomes = await scheduler.submit_many(range(4), timeout_s=0.02)
        assert await scheduler.submit(5) == -5
    for outcome in outcomes:
        assert isinstance(outcome, Failure)
        assert isinstance(outcome.error, DeadlineExceededError)
    assert [len(run) for run in model.runs] == [4, 1]


@pytest.mark.parametrize("max_in_flight", [1, 3])
async def test_what_was_requeued_while_the_scheduler_closes_still_runs(max_in_flight: int) -> None:
    model, outcomes = Model(), dict[int, Any]()
    model.failing = {0, 3, 6}
    async with BatchScheduler(model.run, cost_model=PaddedCostModel(), max_in_flight=max_in_flight) as scheduler:
        for item in range(8):
            scheduler.submit_nowait(item, lambda outcome, item=item: outcomes.__setitem__(item, outcome))  # type: ignore[misc]
    kinds([outcomes[item] for item in range(8)], model.failing)


async def test_parts_that_succeed_teach_what_they_cost() -> None:
    learnt: list[tuple[int, int]] = []

    class Pupil(PaddedCostModel):
        def observe(self, count: int, longest: int, total: int, elapsed_s: float) -> None:
            learnt.append((count, total))

    model = Model()
    model.failing = {5}
    async with BatchScheduler(model.run, cost_model=Pupil()) as scheduler:
        kinds(await scheduler.submit_many(range(8)), {5})
    assert learnt == [(4, 4), (1, 1), (2, 2)]


async def test_a_batch_of_which_most_items_get_an_error_teaches_nothing() -> None:
    """Invalid items take next to no time."""
    learnt: list[int] = []

    class Pupil(PaddedCostModel):
        def observe(self, count: int, longest: int, total: int, elapsed_s: float) -> None:
            learnt.append(count)

    async def run(items: list[int]) -> list[int | Exception]:
        if len(items) > 8:
            raise ValueError("too many")
        return [ValueError("negative") if item < 0 else item for item in items]

    async with BatchScheduler(run, cost_model=Pupil()) as scheduler:
        await scheduler.submit_many([1, -1, -1, -1])
        assert learnt == []
        await scheduler.submit_many([*[-1] * 8, *range(8)])
        assert 8 not in learnt, "the first half, which ran again by itself"
        assert 4 in learnt, "a part of the other half"
        learnt.clear()
        await scheduler.submit_many([1, 2, -1, -1])
    assert learnt == [4]


async def test_a_batch_whose_callers_all_left_teaches_what_it_costs() -> None:
    """Otherwise batches that take longer than callers wait would stay as large."""
    learnt: list[int] = []
    entered, gate = anyio.Event(), anyio.Event()

    class Pupil(PaddedCostModel):
        def observe(self, count: int, longest: int, total: int, elapsed_s: float) -> None:
            learnt.append(count)

    async def run(items: list[int]) -> list[int]:
        entered.set()
        await gate.wait()
        return items

    async with BatchScheduler(run, cost_model=Pupil()) as scheduler:
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(scheduler.submit_many, range(4))
            await entered.wait()
            task_group.cancel_scope.cancel()
        gate.set()
    assert learnt == [4]


@pytest.mark.parametrize(
    ("kind", "in_thread"),
    [
        (KeyboardInterrupt, True),  # in the event loop it is Ctrl-C
        *((kind, in_thread) for kind in (SystemExit, GeneratorExit, Panic) for in_thread in (True, False)),
    ],
)
async def test_whatever_a_batch_raises_is_the_error_of_its_item(kind: type[BaseException], in_thread: bool) -> None:
    def run_in_thread(items: list[int]) -> list[int]:
        if 3 in items:
            raise kind("not today")
        return items

    async def run(items: list[int]) -> list[int]:
        return run_in_thread(items)

    async with BatchScheduler(run_in_thread if in_thread else run) as scheduler:
        *others, failure = await scheduler.submit_many(range(4))
        assert await scheduler.submit(5) == 5
    assert others == [Success(0), Success(1), Success(2)]
    assert isinstance(failure, Failure)
    assert isinstance(failure.error, RuntimeError)
    assert f"{kind.__name__}: not today" in str(failure.error)


class SpeechlessError(RuntimeError):
    """Has no message that could be shown."""

    def __str__(self) -> str:
        raise ValueError("no words")

    __repr__ = __str__


class SpeechlessExit(SystemExit):
    """The same, and ends the interpreter."""

    __str__ = __repr__ = SpeechlessError.__str__


@pytest.mark.parametrize("kind", [SpeechlessError, SpeechlessExit, Panic])
async def test_an_error_without_a_message_does_no_harm(kind: type[BaseException]) -> None:
    def run(items: list[int]) -> list[int]:
        if 1 in items:
            raise kind
        return items

    def size(item: int) -> int:
        if item == 2:
            raise kind
        return 1

    async with BatchScheduler(run, item_size=size) as scheduler:
        outcomes = await scheduler.submit_many(range(4))
    assert [type(outcome) for outcome in outcomes] == [Success, Failure, Success, Success]


async def test_a_hanging_thread_leaves_its_neighbours_their_results() -> None:
    release = threading.Event()

    def run(items: list[int]) -> list[int]:
        if 2 in items:
            release.wait()
        return items

    async with BatchScheduler(run, batch_timeout_s=0.05) as scheduler:
        outcomes = await scheduler.submit_many(range(6))
        assert scheduler.stuck_threads == 2, "the batch, and the item alone"
        release.set()
    assert [type(outcome) for outcome in outcomes] == [Success, Success, Failure, Success, Success, Success]
    assert isinstance(outcomes[2], Failure)
    assert isinstance(outcomes[2].error, BatchingError)
