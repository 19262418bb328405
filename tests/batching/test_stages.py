"""Stages of neighbouring batches overlap where that pays, in order; a failing stage fails only the failing items."""

import threading
import time
from collections.abc import Callable
from typing import Any

import anyio
import pytest

from modalkit.batching import (
    BatchPolicy,
    BatchRecord,
    BatchScheduler,
    BatchTimeoutError,
    Failure,
    Outcome,
    OutputCountError,
    Preparation,
    Priority,
    Stages,
    StageSeconds,
    Success,
)
from modalkit.batching.dispatch import MIN_OVERLAP_S, MIN_OVERLAP_SHARE
from modalkit.batching.stages import StageShares

pytestmark = pytest.mark.anyio

ONE = BatchPolicy(max_batch_size=1)
LONG_S = 60  # only a failing test waits as long


class Model:
    """Doubles numbers in three stages; notes what ran where, and waits before a stage until it may go on."""

    def __init__(self, preprocess_s: float = 0.003, predict_s: float = 0.003) -> None:
        # Work, on whose measured time all this depends.
        self.seconds = {"preprocess": preprocess_s, "predict": predict_s, "postprocess": 0.0}
        self.events: list[tuple[str, list[int]]] = []
        self.threads: list[str] = []
        self.entered = {stage: threading.Semaphore(0) for stage in ("preprocess", "predict", "postprocess")}
        self.closed: dict[tuple[str, int], threading.Event] = {}
        self.broken: dict[tuple[str, int], Exception] = {}

    def stages(self) -> Stages[int, int]:
        return Stages(
            lambda items: self.stage("preprocess", items),
            lambda items, _: self.stage("predict", items),
            lambda items, _: [2 * item for item in self.stage("postprocess", items)],
        )

    def close(self, stage: str, item: int) -> threading.Event:
        """Keep batches with `item` out of a stage until the event is set."""
        return self.closed.setdefault((stage, item), threading.Event())

    def stage(self, name: str, items: list[int]) -> list[int]:
        self.events.append((name, items))
        self.threads.append(threading.current_thread().name)
        self.entered[name].release()
        time.sleep(self.seconds[name])
        for item in items:
            if (gate := self.closed.get((name, item))) is not None:
                gate.wait(LONG_S)
            if (error := self.broken.get((name, item))) is not None:
                raise error
        return items

    async def until_entered(self, stage: str, times: int = 1) -> None:
        for _ in range(times):
            assert await anyio.to_thread.run_sync(self.entered[stage].acquire, True, LONG_S)


async def make_overlap_pay(model: Model, scheduler: BatchScheduler[int, int]) -> None:
    """Let the scheduler see that a batch spends half of its time in `preprocess`."""
    await scheduler.submit(0)
    for stage in model.entered:
        await model.until_entered(stage)
    model.events.clear()
    model.threads.clear()


async def test_a_lone_request_visits_one_thread_once() -> None:
    model = Model()
    async with BatchScheduler(model.stages(), name="model") as scheduler:
        assert await scheduler.submit(4) == 8
        await make_overlap_pay(model, scheduler)
        assert await scheduler.submit(5) == 10
    assert model.events == [("preprocess", [5]), ("predict", [5]), ("postprocess", [5])]
    assert set(model.threads) == {"model 0"}


@pytest.mark.parametrize("preparation", [None, Preparation(lambda: False, lambda: None)])
async def test_the_next_batch_is_preprocessed_while_one_predicts_but_no_more_than_one_ahead(
    preparation: Preparation | None,
) -> None:
    model = Model()
    outcomes: list[Outcome[int]] = []

    async def call() -> None:
        outcomes.extend(await scheduler.submit_many([1, 2, 3]))

    async with BatchScheduler(model.stages(), policy=ONE, name="model", preparations=[preparation]) as scheduler:
        await make_overlap_pay(model, scheduler)
        gate = model.close("predict", 1)
        async with anyio.create_task_group() as group:
            group.start_soon(call)
            await model.until_entered("predict")
            await model.until_entered("preprocess", 2)
            await anyio.wait_all_tasks_blocked()
            assert [event for event in model.events if 3 in event[1]] == [], "it is still free to choose"
            gate.set()
    assert outcomes == [Success(2), Success(4), Success(6)]
    assert model.events.index(("preprocess", [2])) < model.events.index(("postprocess", [1]))
    for stage in ("preprocess", "predict", "postprocess"):
        assert [items for name, items in model.events if name == stage] == [[1], [2], [3]]
    assert set(model.threads) == {"model 0", "model 0 stages"}


async def test_a_prepared_batch_of_jobs_is_requeued_when_an_interactive_request_comes_before_it_runs() -> None:
    model = Model()
    outcomes: list[Outcome[int]] = []

    async def call(numbers: list[int], priority: Priority) -> None:
        outcomes.extend(await scheduler.submit_many(numbers, priority=priority))

    async with BatchScheduler(model.stages(), policy=ONE) as scheduler:
        await make_overlap_pay(model, scheduler)
        gate = model.close("predict", 1)
        async with anyio.create_task_group() as group:
            group.start_soon(call, [1, 2], Priority.BULK)
            await model.until_entered("predict")
            await model.until_entered("preprocess", 2)
            group.start_soon(call, [3], Priority.INTERACTIVE)
            await anyio.wait_all_tasks_blocked()
            gate.set()
        statistics = scheduler.statistics()
    assert outcomes == [Success(6), Success(2), Success(4)]
    assert [items for name, items in model.events if name == "predict"] == [[1], [3], [2]]
    assert statistics.batches == 4, "a preempted batch is no batch that ran"


@pytest.mark.parametrize("max_partial_in_flight", [None, 1])
async def test_too_few_for_a_full_batch_are_not_forgotten_behind_overlapping_ones(
    max_partial_in_flight: int | None,
) -> None:
    model = Model()
    pairs = BatchPolicy(max_batch_size=2)
    async with BatchScheduler(model.stages(), policy=pairs, max_partial_in_flight=max_partial_in_flight) as scheduler:
        await make_overlap_pay(model, scheduler)
        with anyio.fail_after(LONG_S):
            outcomes = await scheduler.submit_many(range(5))
    assert outcomes == [Success(2 * number) for number in range(5)]


@pytest.mark.parametrize(
    ("seconds", "pays"),
    [
        (StageSeconds(0.002, 0.010, 0.0), True),
        (StageSeconds(0.0005, 0.010, 0.001), True),
        (StageSeconds(0.0005, 0.010, 0.0), False),
        (StageSeconds(0.0001, 0.0001, 0.0001), False),
        (StageSeconds(0.002, 0.0001, 0.0), False),
    ],
)
def test_overlapping_pays_by_its_share_and_by_its_seconds(seconds: StageSeconds, pays: bool) -> None:
    shares = StageShares()
    shares.add(seconds)
    assert (shares.outside >= MIN_OVERLAP_SHARE and shares.saved_s >= MIN_OVERLAP_S) == pays


async def test_the_times_of_stages_before_a_replacement_are_forgotten() -> None:
    old, new, records = Model(), Model(preprocess_s=0), list[BatchRecord]()
    async with BatchScheduler(old.stages(), policy=ONE, on_batch=records.append) as scheduler:
        await make_overlap_pay(old, scheduler)
        running = old.close("predict", 1)
        async with anyio.create_task_group() as group:
            group.start_soon(scheduler.submit, 1)
            await old.until_entered("predict")
            await scheduler.replace(new.stages(), policy=ONE)
            running.set()
        records.clear()
        assert await scheduler.submit_many([3, 4]) == [Success(6), Success(8)]
    assert [record.overlapped for record in records] == [False, False]


async def test_no_two_batches_are_in_the_same_stage_or_in_the_first_and_last_even_while_one_is_split() -> None:
    model = Model(predict_s=0.001)
    inside: set[str] = set()
    met: list[tuple[str, str]] = []

    def alone(stage: str, items: list[int]) -> list[int]:
        met.extend((stage, other) for other in inside if other == stage or "predict" not in (stage, other))
        inside.add(stage)
        try:
            return model.stage(stage, items)
        finally:
            inside.discard(stage)

    stages: Stages[int, int] = Stages(
        lambda items: alone("preprocess", items),
        lambda items, _: alone("predict", items),
        lambda items, _: alone("postprocess", items),
    )
    model.broken["predict", 9] = ValueError("poisoned")
    async with BatchScheduler(stages, policy=BatchPolicy(max_batch_size=8)) as scheduler:
        await make_overlap_pay(model, scheduler)
        outcomes = await scheduler.submit_many(range(1, 65))
    assert sum(isinstance(outcome, Failure) for outcome in outcomes) == 1
    assert met == []


@pytest.mark.parametrize("stage", ["preprocess", "predict", "postprocess"])
async def test_a_poisoned_item_fails_alone_in_overlapping_batches_too(stage: str) -> None:
    model = Model()
    model.broken[stage, 3] = ValueError(f"poisoned in {stage}")
    async with BatchScheduler(model.stages(), policy=BatchPolicy(max_batch_size=4)) as scheduler:
        await make_overlap_pay(model, scheduler)
        outcomes = await scheduler.submit_many(range(1, 13))
    assert [outcome for outcome in outcomes if isinstance(outcome, Success)] == [
        Success(2 * number) for number in range(1, 13) if number != 3
    ]
    failure = outcomes[2]
    assert isinstance(failure, Failure)
    assert str(failure.error) == f"poisoned in {stage}"


@pytest.mark.parametrize("stage", ["preprocess", "predict", "postprocess"])
async def test_a_stage_that_hangs_fails_its_batch_in_time_and_the_next_ones_run(stage: str) -> None:
    model = Model()
    async with BatchScheduler(model.stages(), policy=ONE, batch_timeout_s=0.2) as scheduler:
        await make_overlap_pay(model, scheduler)
        gate = model.close(stage, 1)
        hung, *others = await scheduler.submit_many([1, 2, 3])
        gate.set()
    assert isinstance(hung, Failure)
    assert isinstance(hung.error, BatchTimeoutError)
    assert others == [Success(4), Success(6)]


async def test_a_wrong_number_of_outputs_is_an_error_in_overlapping_batches_too() -> None:
    model = Model()
    stages = model.stages()
    short: Stages[int, int] = Stages(
        stages.preprocess,
        stages.predict,
        lambda items, _: [2 * item for item in model.stage("postprocess", items)][items[0] % 2 :],
    )
    async with BatchScheduler(short, policy=ONE) as scheduler:
        await make_overlap_pay(model, scheduler)
        odd, even = await scheduler.submit_many([1, 2])
    assert isinstance(odd, Failure)
    assert isinstance(odd.error, OutputCountError)
    assert even == Success(4)


async def test_leaving_waits_for_batches_in_every_stage() -> None:
    model = Model()
    results: list[int] = []

    async def call(number: int) -> None:
        results.append(await scheduler.submit(number))

    async with anyio.create_task_group() as group:
        async with BatchScheduler(model.stages(), policy=ONE) as scheduler:
            await make_overlap_pay(model, scheduler)
            for number in range(1, 6):
                group.start_soon(call, number)
            await model.until_entered("preprocess")
    assert sorted(results) == [2, 4, 6, 8, 10]


async def test_cancelling_the_block_ends_overlapping_batches_at_once() -> None:
    model = Model()
    gate = model.close("predict", 1)
    with anyio.CancelScope() as scope:
        async with BatchScheduler(model.stages(), policy=ONE) as scheduler, anyio.create_task_group() as group:
            await make_overlap_pay(model, scheduler)
            for number in (1, 2, 3):
                group.start_soon(scheduler.submit, number)
            await model.until_entered("predict")
            scope.cancel()
    gate.set()
    assert scope.cancelled_caught
    assert scheduler.statistics().running == 0


async def test_records_tell_where_the_time_of_each_batch_went() -> None:
    model, records = Model(preprocess_s=0.009), list[BatchRecord]()
    async with BatchScheduler(model.stages(), policy=ONE, on_batch=records.append) as scheduler:
        await make_overlap_pay(model, scheduler)
        await scheduler.submit_many([1, 2, 3])
    first, *others = records
    assert first.preprocess_s > 0.5 * first.measured_s
    assert not first.overlapped
    assert any(record.overlapped for record in others)
    for record in records:
        assert min(record.preprocess_s, record.predict_s, record.postprocess_s) > 0
        assert record.measured_s <= record.total_s


async def test_a_function_of_no_batch_runs_in_the_thread_of_the_batches() -> None:
    names = []

    def note(items: list[Any]) -> list[Any]:
        names.append(threading.current_thread().name)
        return items

    async with BatchScheduler(note, name="model") as scheduler:
        await scheduler.run_in_thread(lambda: note([]))
        await scheduler.submit(1)
    assert names == ["model 0", "model 0"]


async def test_a_function_of_no_batch_runs_while_no_batch_is_in_any_stage_of_any_thread() -> None:
    model = Model(preprocess_s=0.0)
    gates = [model.close("predict", item) for item in (1, 2)]
    async with (
        BatchScheduler(model.stages(), policy=ONE, max_in_flight=2) as scheduler,
        anyio.create_task_group() as task_group,
    ):
        for item in (1, 2):
            task_group.start_soon(scheduler.submit, item)
        await model.until_entered("predict", 2)
        task_group.start_soon(scheduler.run_in_thread, lambda: model.events.append(("function", [])))
        await anyio.wait_all_tasks_blocked()
        task_group.start_soon(scheduler.submit, 3)
        await anyio.wait_all_tasks_blocked()
        assert ("function", []) not in model.events
        for gate in gates:
            gate.set()
    stages = [name for name, _ in model.events]
    alone = stages.index("function")
    assert stages[:alone].count("preprocess") == stages[:alone].count("postprocess")


async def test_a_function_of_no_batch_that_hangs_is_abandoned_in_time() -> None:
    gate = threading.Event()
    double: Callable[[list[int]], list[int]] = lambda items: [2 * item for item in items]  # noqa: E731
    async with BatchScheduler(double) as scheduler:
        with pytest.raises(TimeoutError):
            await scheduler.run_in_thread(lambda: gate.wait(LONG_S), timeout_s=0.05)
        assert await scheduler.submit(1) == 2
        gate.set()


class Asynchronous:
    """Doubles numbers; its stages are functions or asynchronous functions, in every combination of the tests."""

    def __init__(self) -> None:
        self.threads: list[str] = []

    def enter(self) -> None:
        self.threads.append(threading.current_thread().name)

    def stages(self, *asynchronous: str) -> Stages[int, int]:
        def as_chosen(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
            async def in_event_loop(*args: Any) -> Any:
                await anyio.lowlevel.checkpoint()
                return function(*args)

            return in_event_loop if name in asynchronous else function

        def preprocess(items: list[int]) -> list[int]:
            self.enter()
            return [2 * item for item in items]

        def predict(items: list[int], doubled: list[int]) -> list[int]:
            self.enter()
            if 13 in items:
                raise ValueError("13")
            return doubled

        def postprocess(items: list[int], doubled: list[int]) -> list[int]:
            self.enter()
            return doubled

        return Stages(
            as_chosen("preprocess", preprocess),
            as_chosen("predict", predict),
            as_chosen("postprocess", postprocess),
        )


@pytest.mark.parametrize("asynchronous", [["predict"], ["preprocess", "predict"], ["preprocess", "postprocess"]])
async def test_stages_may_be_asynchronous_and_a_failing_item_fails_alone(asynchronous: list[str]) -> None:
    model = Asynchronous()
    async with BatchScheduler(model.stages(*asynchronous), max_in_flight=2, policy=BatchPolicy(max_batch_size=8)) as s:
        outcomes = await s.submit_many(range(100))
    assert [outcome for outcome in outcomes if not isinstance(outcome, Success)] == [outcomes[13]]
    assert [outcome.value for outcome in outcomes if isinstance(outcome, Success)] == [
        2 * n for n in range(100) if n != 13
    ]


@pytest.mark.parametrize("asynchronous", [[], ["predict"], ["preprocess", "predict", "postprocess"]])
async def test_a_group_runs_as_one_batch_and_is_not_split(asynchronous: list[str]) -> None:
    model = Asynchronous()
    async with BatchScheduler(model.stages(*asynchronous), max_in_flight=2) as scheduler:
        assert await scheduler.run_as_one_batch(range(5)) == [0, 2, 4, 6, 8]
        with pytest.raises(ValueError, match="13"):
            await scheduler.run_as_one_batch([12, 13])
    assert len(model.threads) == 5


async def test_a_group_that_hangs_times_out() -> None:
    async def hang(items: list[int]) -> list[int]:
        await anyio.sleep_forever()
        return items

    async with BatchScheduler(hang, batch_timeout_s=0.05) as scheduler:
        with pytest.raises(BatchTimeoutError):
            await scheduler.run_as_one_batch([1, 2])


async def test_an_asynchronous_group_that_exits_raises_an_error_and_the_scheduler_goes_on() -> None:
    async def run(items: list[int]) -> list[int]:
        if 13 in items:
            raise SystemExit("13")
        return items

    async with BatchScheduler(run) as scheduler:
        with pytest.raises(RuntimeError, match="SystemExit"):
            await scheduler.run_as_one_batch([13])
        assert await scheduler.run_as_one_batch([1, 2]) == [1, 2]
