"""Brief batches that run in one visit to the thread, on asyncio and trio."""

import math
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from modalkit.batching import (
    BatchPolicy,
    BatchScheduler,
    BatchTimeoutError,
    Failure,
    OutputCountError,
    PaddedCostModel,
    Success,
    dispatch,
    execution,
)

pytestmark = pytest.mark.anyio

POLICY = BatchPolicy(max_batch_size=4)


class Recorder:
    """A function that notes which items ran together, and how many had their outcomes by then."""

    def __init__(self, on_batch: Callable[[list[int]], Any] = list) -> None:
        self.runs: list[tuple[list[int], int]] = []
        self.outcomes = dict[int, Any]()
        self._on_batch = on_batch

    def run(self, items: list[int]) -> Any:
        self.runs.append((list(items), len(self.outcomes)))
        return self._on_batch(items)

    async def run_all(self, count: int, run: Callable[[list[int]], Any] | None = None, **options: Any) -> None:
        """Run one item alone, so that the time of a batch is known, and then `count` that wait together."""
        async with BatchScheduler(run or self.run, policy=POLICY, cost_model=PaddedCostModel(), **options) as scheduler:
            await scheduler.submit(-1)
            self.runs.clear()
            for item in range(count):
                scheduler.submit_nowait(item, partial(self.outcomes.__setitem__, item))

    def runs_beside(self, failing: int) -> int:
        """How many items ran that were never in a batch with this one, counted once for each run."""
        others = {item for items, _ in self.runs if failing in items for item in items}
        return sum(item not in others for items, _ in self.runs for item in items)


@pytest.fixture
def all_brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a slow machine, too, the batches of these tests count as brief."""
    monkeypatch.setattr(dispatch, "MAX_VISIT_S", math.inf)
    monkeypatch.setattr(execution, "LONG_VISIT_S", math.inf)


@pytest.mark.usefixtures("all_brief")
async def test_brief_batches_share_a_visit_while_full_ones_wait() -> None:
    recorder = Recorder()
    await recorder.run_all(14)
    assert [(len(items), answered) for items, answered in recorder.runs] == [(4, 0), (4, 0), (4, 0), (2, 12)]
    assert recorder.outcomes == {item: Success(item) for item in range(14)}


async def test_batches_that_are_not_brief_have_a_visit_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "MAX_VISIT_S", 0.0)
    recorder = Recorder()
    await recorder.run_all(12)
    assert [(len(items), answered) for items, answered in recorder.runs] == [(4, 0), (4, 4), (4, 8)]


@pytest.mark.usefixtures("all_brief")
async def test_a_visit_has_a_limited_number_of_items(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "MAX_VISIT_ITEMS", 8)
    recorder = Recorder()
    await recorder.run_all(12)
    assert [answered for _, answered in recorder.runs] == [0, 0, 8]


def raise_value_error(_: list[int]) -> list[int]:
    raise ValueError("1 is failing")


def end_the_process(_: list[int]) -> list[int]:
    raise SystemExit


@pytest.mark.parametrize(
    ("fail", "error"),
    [(raise_value_error, ValueError), (end_the_process, RuntimeError), (lambda items: [*items, 0], OutputCountError)],
)
@pytest.mark.usefixtures("all_brief")
async def test_an_item_fails_alone_among_the_batches_of_a_visit(
    fail: Callable[[list[int]], list[int]], error: type[Exception]
) -> None:
    recorder = Recorder(lambda items: fail(items) if 1 in items else items)
    await recorder.run_all(12)
    failure = recorder.outcomes.pop(1)
    assert isinstance(failure.error, error)
    assert recorder.outcomes == {item: Success(item) for item in range(12) if item != 1}
    assert recorder.runs_beside(1) == 8


@pytest.mark.usefixtures("all_brief")
async def test_a_batch_that_hangs_leaves_the_others_of_its_visit_their_results() -> None:
    release = threading.Event()
    recorder = Recorder(lambda items: release.wait() and items if 0 in items else items)
    try:
        await recorder.run_all(12, batch_timeout_s=0.1)
    finally:
        release.set()
    for thread in threading.enumerate():
        if thread.name.startswith("batch scheduler"):
            thread.join(timeout=30)
    failure = recorder.outcomes.pop(0)
    assert isinstance(failure, Failure)
    assert isinstance(failure.error, BatchTimeoutError)
    assert recorder.outcomes == {item: Success(item) for item in range(1, 12)}
    assert recorder.runs_beside(0) == 8, "the thread that hung ran some, too"


@pytest.mark.usefixtures("all_brief")
async def test_asynchronous_batches_run_one_at_a_time() -> None:
    recorder = Recorder()

    async def run(items: list[int]) -> Any:
        return recorder.run(items)

    await recorder.run_all(8, run)
    assert [answered for _, answered in recorder.runs] == [0, 4]


@pytest.mark.usefixtures("all_brief")
async def test_another_worker_runs_what_follows_a_failing_batch_while_its_items_are_searched() -> None:
    others_done = threading.Event()
    failing, outcomes = list[int](), dict[int, Any]()

    def run(items: list[int]) -> list[int]:
        if 0 in items and len(items) == POLICY.max_batch_size:
            failing.extend(items)
            raise ValueError("they fail together")
        if 0 in items:
            assert others_done.wait(timeout=30), "the others wait for the search"
        return items

    def take(item: int, outcome: Any) -> None:
        outcomes[item] = outcome
        if set(range(12)) - set(failing) <= set(outcomes):
            others_done.set()

    async with BatchScheduler(run, policy=POLICY, cost_model=PaddedCostModel(), max_in_flight=2) as scheduler:
        await scheduler.submit(-1)
        for item in range(12):
            scheduler.submit_nowait(item, partial(take, item))
    assert outcomes == {item: Success(item) for item in range(12)}


@pytest.mark.usefixtures("all_brief")
async def test_what_is_withdrawn_while_the_batch_before_it_fails_does_not_run() -> None:
    withdraw = list[Callable[[], object]]()

    def withdraw_all(_: object) -> None:
        for one in withdraw:
            one()

    recorder = Recorder(lambda items: raise_value_error(items) if 0 in items else items)
    async with BatchScheduler(recorder.run, policy=POLICY, cost_model=PaddedCostModel()) as scheduler:
        await scheduler.submit(-1)
        scheduler.submit_nowait(0, withdraw_all)
        withdraw += [scheduler.submit_nowait(item, print) for item in range(1, 12)]
    [_, (failing, _), *_] = recorder.runs
    assert {item for items, _ in recorder.runs[1:] for item in items} == set(failing)


@pytest.mark.usefixtures("all_brief")
async def test_a_visit_ends_with_the_first_batch_that_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execution, "LONG_VISIT_S", 0.0)
    recorder = Recorder()
    await recorder.run_all(12)
    assert [(len(items), answered) for items, answered in recorder.runs] == [(4, 0), (4, 4), (4, 8)]


async def test_a_batch_that_ends_at_the_moment_of_its_time_limit_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()

    class EndingError(BatchTimeoutError):
        """The thread ends a lone item while the error for it is made."""

        def __init__(self, timeout_s: float, count: int) -> None:
            super().__init__(timeout_s, count)
            if count == 1:
                release.set()
                for thread in threading.enumerate():
                    if thread.name.startswith("batch scheduler"):
                        thread.join(timeout=30)

    monkeypatch.setattr(execution, "BatchTimeoutError", EndingError)

    def run(items: list[int]) -> list[int]:
        assert release.wait(timeout=30)
        return items

    async with BatchScheduler(run, policy=POLICY, batch_timeout_s=0.05) as scheduler:
        first, second = await scheduler.submit_many(range(2))
    assert isinstance(first, Failure)
    assert isinstance(first.error, BatchTimeoutError)
    assert second == Success(1)
