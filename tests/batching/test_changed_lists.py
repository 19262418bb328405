"""Whatever a pipeline does to the lists it is given, no caller gets the result of another."""

from collections.abc import Callable, Sequence
from typing import Any

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modalkit.batching import BatchPolicy, BatchScheduler, Failure, InputsMovedError, Outcome, Stages, Success


class Item:
    """A payload that stages may change in place."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.notes: list[str] = []


def mutate(items: list[Item]) -> None:
    for item in items:
        item.notes.append("seen")


CHANGES: dict[str, Callable[[list[Item]], object]] = {
    "nothing": lambda items: None,
    "remove": lambda items: items.remove(items[len(items) // 2]),
    "pop": lambda items: items.pop(),
    "pop first": lambda items: items.pop(0),
    "clear": lambda items: items.clear(),
    "append": lambda items: items.append(Item(-1)),
    "insert": lambda items: items.insert(0, Item(-1)),
    "reverse": lambda items: items.reverse(),
    "sort": lambda items: items.sort(key=lambda item: -item.number),
    "rotate": lambda items: items.__setitem__(slice(None), [*items[1:], items[0]]),
    "remove and fill up": lambda items: items.__setitem__(slice(None), [*items[1:], Item(-1)]),
    "replace": lambda items: items.__setitem__(0, Item(items[0].number)),
    "mutate": mutate,
}


class OddPipeline:
    """Carries numbers through three stages, and changes the list of each before or after it looks at it."""

    def __init__(self, changes: Sequence[str], looks_first: bool) -> None:
        self.changes = [CHANGES[change] for change in changes]
        self.looks_first = looks_first

    def look(self, stage: int, items: list[Item]) -> list[int]:
        if self.looks_first:
            numbers = [item.number for item in items]
            self.changes[stage](items)
            return numbers
        self.changes[stage](items)
        return [item.number for item in items]

    def preprocess(self, items: list[Item]) -> list[int]:
        return self.look(0, items)

    def predict(self, items: list[Item], numbers: list[int]) -> list[int]:
        self.look(1, items)
        return [10 * number for number in numbers]

    def postprocess(self, items: list[Item], raw: list[int]) -> list[int]:
        self.look(2, items)
        return raw

    def in_one(self, items: list[Item]) -> list[int]:
        return [10 * number for number in self.look(0, items)]


async def outcomes_of(run_batch: Any, count: int) -> list[Outcome[int]]:
    scheduler: BatchScheduler[Item, int]
    async with BatchScheduler(run_batch, policy=BatchPolicy(max_batch_size=8)) as scheduler:
        return await scheduler.submit_many(map(Item, range(1, count + 1)))


def check(outcomes: list[Outcome[int]], *, all_succeed: bool) -> None:
    for number, outcome in enumerate(outcomes, start=1):
        if isinstance(outcome, Success):
            assert outcome.value in (10 * number, -10), "its own result, or that of what its pipeline put there"
        assert isinstance(outcome, Success) or not all_succeed


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from(sorted(CHANGES)), min_size=3, max_size=3),
    st.booleans(),
    st.integers(1, 20),
    st.sampled_from(["stages", "thread", "async"]),
)
def test_no_caller_gets_anothers_result(changes: list[str], looks_first: bool, count: int, form: str) -> None:
    pipeline = OddPipeline(changes, looks_first)

    async def in_one(items: list[Item]) -> list[int]:
        return pipeline.in_one(items)

    forms: dict[str, Any] = {
        "stages": Stages(pipeline.preprocess, pipeline.predict, pipeline.postprocess),
        "thread": pipeline.in_one,
        "async": in_one,
    }
    check(anyio.run(outcomes_of, forms[form], count), all_succeed=looks_first)


@pytest.mark.anyio
async def test_a_stage_that_removes_a_bad_item_fails_that_one_alone() -> None:
    """As measured once: 26 of 31 callers got the result of another item."""

    def preprocess(items: list[int]) -> list[int]:
        for item in list(items):
            if item == 7:
                items.remove(item)
        return [10 * item for item in items]

    stages: Stages[int, int] = Stages(preprocess, lambda _, raw: raw, lambda items, raw: raw)
    async with BatchScheduler(stages) as scheduler:
        outcomes = await scheduler.submit_many(range(32))
        assert await scheduler.submit(3) == 30
    assert isinstance(outcomes.pop(7), Failure)
    assert outcomes == [Success(10 * number) for number in range(32) if number != 7]


@pytest.mark.anyio
async def test_a_batch_may_be_filled_up_and_its_items_replaced_at_no_cost() -> None:
    runs = []

    def run(items: list[int]) -> list[int]:
        runs.append(len(items))
        count = len(items)
        items[:] = [item + 1 for item in items]
        items += [0] * (32 - count)
        return [2 * item for item in items][:count]

    async with BatchScheduler(run) as scheduler:
        assert await scheduler.submit_many([10, 20, 30]) == [Success(22), Success(42), Success(62)]
    assert runs == [3]


@pytest.mark.anyio
async def test_a_list_whose_order_was_changed_is_refused_as_a_whole_and_right_one_by_one(
    caplog: pytest.LogCaptureFixture,
) -> None:
    runs = []

    def run(items: list[str]) -> list[str]:
        runs.append(len(items))
        items.sort()
        return [item.upper() for item in items]

    async with BatchScheduler(run) as scheduler:
        assert await scheduler.submit_many(["c", "b", "a"]) == [Success("C"), Success("B"), Success("A")]
    assert runs[0] == 3
    assert "runs one by one" in caplog.text
    assert "let it work on a copy" in str(InputsMovedError())
