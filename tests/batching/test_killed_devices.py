"""Items that end the process of their device: they alone fail, however many batches run on it at once."""

from collections.abc import Set as AbstractSet

import anyio
import anyio.lowlevel
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modalkit.batching import (
    BatchPolicy,
    BatchScheduler,
    BatchTimeoutError,
    Failure,
    Outcome,
    PaddedCostModel,
    Preparation,
    RunBatch,
    Stages,
    Success,
)

STEPS = 6
"""Of a batch, between which other tasks run."""


class Process:
    """Runs batches until one of them kills it; then all that run in it fail, as do those that begin later."""

    def __init__(self, killers: AbstractSet[int], hanging: AbstractSet[int] = frozenset()) -> None:
        self.killers, self.hanging = killers, hanging
        self.has_ended = False
        self.starts = 0
        self.kills = list[list[int]]()
        self.most_at_once = self._running = 0

    async def run(self, items: list[int]) -> list[int]:
        life = self.starts
        self._running += 1
        self.most_at_once = max(self.most_at_once, self._running)
        try:
            for step in range(STEPS):
                await anyio.lowlevel.checkpoint()
                if self.has_ended or life != self.starts:
                    raise ConnectionError("the process has ended")
                # Those in the middle of their batch, so that others begin before and end after them.
                if step == STEPS // 2 and not self.killers.isdisjoint(items):
                    self._end(items)
                    raise ConnectionError("the process was killed")
            if not self.hanging.isdisjoint(items):
                self._end(items)
                raise BatchTimeoutError(1.0, len(items))
        finally:
            self._running -= 1
        return [-item for item in items]

    def _end(self, items: list[int]) -> None:
        self.has_ended = True
        self.kills.append(items)

    def start(self) -> None:
        self.starts += 1
        self.has_ended = False

    @property
    def preparation(self) -> Preparation:
        return Preparation(lambda: self.has_ended, self.start)


def scheduler_on(
    *processes: Process, max_in_flight: int, max_batch_size: int, overlaps: bool = False
) -> BatchScheduler[int, int]:
    async def before(items: list[int]) -> list[int]:
        await anyio.lowlevel.checkpoint()
        return items

    async def after(items: list[int], outputs: list[int]) -> list[int]:
        await anyio.lowlevel.checkpoint()
        return outputs

    def stages(process: Process) -> Stages[int, int]:
        async def predict(items: list[int], prepared: list[int]) -> list[int]:
            return await process.run(items)

        return Stages(before, predict, after)

    runs: list[RunBatch[int, int]] = [stages(process) if overlaps else process.run for process in processes]
    return BatchScheduler(
        runs,
        policy=BatchPolicy(max_batch_size=max_batch_size),
        cost_model=[PaddedCostModel() for _ in processes],
        max_in_flight=max_in_flight,
        preparations=[process.preparation for process in processes],
        name="m",
    )


@pytest.mark.anyio
@pytest.mark.parametrize("max_in_flight", [2, 3])
@pytest.mark.parametrize("max_batch_size", [1, 4, 16])
@pytest.mark.parametrize(
    "killers", [{0}, {47}, {5, 6}, {0, 16, 32}, {3, 20, 37, 46}], ids=lambda killers: "-".join(map(str, killers))
)
async def test_exactly_the_items_that_kill_their_process_fail(
    max_in_flight: int, max_batch_size: int, killers: set[int]
) -> None:
    process = Process(killers)
    with anyio.fail_after(30):
        async with scheduler_on(process, max_in_flight=max_in_flight, max_batch_size=max_batch_size) as scheduler:
            outcomes = await scheduler.submit_many(range(48))
    assert {item for item, outcome in enumerate(outcomes) if isinstance(outcome, Failure)} == killers
    assert [outcome for outcome in outcomes if isinstance(outcome, Success)] == [
        Success(-item) for item in range(48) if item not in killers
    ]
    assert process.most_at_once == max_in_flight, "batches run at once as before"


@given(
    killers=st.sets(st.integers(0, 39), max_size=5),
    hanging=st.sets(st.integers(0, 39), max_size=2),
    max_in_flight=st.integers(1, 3),
    max_batch_size=st.sampled_from([1, 2, 8]),
    devices=st.integers(1, 2),
    overlaps=st.booleans(),
    at_once=st.integers(1, 40),
)
def test_items_that_kill_or_hang_fail_alone_wherever_they_are(
    killers: set[int],
    hanging: set[int],
    max_in_flight: int,
    max_batch_size: int,
    devices: int,
    overlaps: bool,
    at_once: int,
) -> None:
    hanging -= killers
    processes = [Process(killers, hanging) for _ in range(devices)]

    async def run() -> None:
        failed = set[int]()

        async def submit(items: range, scheduler: BatchScheduler[int, int]) -> None:
            outcomes = await scheduler.submit_many(items)
            for item, outcome in zip(items, outcomes, strict=True):
                if isinstance(outcome, Failure):
                    failed.add(item)
                else:
                    assert outcome == Success(-item)

        with anyio.fail_after(30):
            async with (
                scheduler_on(
                    *processes, max_in_flight=max_in_flight, max_batch_size=max_batch_size, overlaps=overlaps
                ) as scheduler,
                anyio.create_task_group() as callers,
            ):
                for first in range(0, 40, at_once):
                    callers.start_soon(submit, range(first, min(first + at_once, 40)), scheduler)
                    await anyio.lowlevel.checkpoint()
        assert failed == killers | hanging

    anyio.run(run)


@pytest.mark.anyio
async def test_an_item_that_kills_its_process_alone_is_not_tried_again() -> None:
    process = Process({7})
    async with scheduler_on(process, max_in_flight=2, max_batch_size=4) as scheduler:
        with pytest.raises(ConnectionError):
            await scheduler.submit(7)
    assert process.kills == [[7]]


@pytest.mark.anyio
@pytest.mark.parametrize(("max_in_flight", "killers"), [(1, set(range(48))), (2, {0, 17, 30, 31})])
async def test_items_that_kill_their_process_fail_where_it_starts_only_at_the_third_attempt(
    max_in_flight: int, killers: set[int]
) -> None:
    """As where its memory is not free at once: a batch that waited for one attempt only would run whole for ever."""

    class Slow(Process):
        attempts = 0

        def start(self) -> None:
            self.attempts += 1
            if self.attempts % 3:
                raise OSError("the memory of the device is not free yet")
            super().start()

    process = Slow(killers)
    outcomes = list[Outcome[int]]()
    with anyio.move_on_after(10):
        async with scheduler_on(process, max_in_flight=max_in_flight, max_batch_size=4) as scheduler:
            outcomes += await scheduler.submit_many(range(48))
    assert len(outcomes) == 48, "it came to an end"
    assert {item for item, outcome in enumerate(outcomes) if isinstance(outcome, Failure)} == killers
