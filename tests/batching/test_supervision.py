"""Whatever goes wrong in the scheduler's own tasks: callers get answers, and `is_broken` is set in the end."""

from collections.abc import Callable

import anyio
import pytest

from modalkit.batching import (
    BatchPolicy,
    BatchRecord,
    BatchScheduler,
    Failure,
    Outcome,
    Priority,
    SchedulerClosedError,
    Success,
)
from modalkit.batching.batch_run import BatchRunner

pytestmark = pytest.mark.anyio


class CostModelOfOurs:
    """Cannot tell what an item of size 13 costs."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def predict_s(self, count: int, longest: int, total: int) -> float:
        if longest == 13:
            raise self.error
        return 0.001 + 0.0001 * count * longest

    def observe(self, count: int, longest: int, total: int, elapsed_s: float) -> None:
        """Learn nothing."""


@pytest.mark.parametrize("error", [ZeroDivisionError("what"), SystemExit(3)])
@pytest.mark.parametrize("priority", Priority)
async def test_a_cost_model_that_fails_costs_one_request_an_error_and_the_next_ones_run(
    error: BaseException, priority: Priority, caplog: pytest.LogCaptureFixture
) -> None:
    async with BatchScheduler(lambda items: items, item_size=int, cost_model=CostModelOfOurs(error)) as scheduler:
        for _ in range(5):
            with pytest.raises((ZeroDivisionError, RuntimeError), match=r"what|SystemExit: 3"):
                await scheduler.submit(13, priority=priority)
            assert await scheduler.submit(4, priority=priority) == 4
        assert not scheduler.is_broken
        assert scheduler.statistics().failed == 5
    assert "could not be formed or run" in caplog.text


async def test_a_cost_model_that_fails_while_the_scheduler_closes_costs_no_other_request_its_result() -> None:
    def run(items: list[int]) -> list[int]:
        return items

    outcomes: dict[int, Outcome[int]] = {}
    model = CostModelOfOurs(ZeroDivisionError("what"))
    async with BatchScheduler(run, item_size=int, cost_model=model) as scheduler:
        scheduler.submit_many_nowait([13, 4, 5], outcomes.__setitem__)
    assert isinstance(outcomes[0], Failure)
    assert [outcomes[1], outcomes[2]] == [Success(4), Success(5)]


async def test_a_cost_model_that_always_fails_breaks_the_scheduler_which_answers_all_and_says_so() -> None:
    model = CostModelOfOurs(ZeroDivisionError())
    policy = BatchPolicy(max_batch_size=4)
    async with BatchScheduler(
        lambda items: items, policy=policy, item_size=int, cost_model=model, max_in_flight=2
    ) as scheduler:
        with anyio.fail_after(30):
            outcomes = await scheduler.submit_many([13] * 20)
            await scheduler.wait_until_broken()
        assert scheduler.is_broken
        errors = [outcome.error for outcome in outcomes if isinstance(outcome, Failure)]
        assert [type(error) for error in errors] == [ZeroDivisionError] * 3 + [SchedulerClosedError] * 17
        with pytest.raises(SchedulerClosedError, match=r"broken .* restart the process"):
            await scheduler.submit(1)
        with pytest.raises(SchedulerClosedError, match="broken"):
            scheduler.submit_nowait(1, lambda _: None)
        assert scheduler.statistics().queue_depth == 0


@pytest.mark.parametrize("times", [2, 3])
async def test_a_bug_in_the_running_of_batches_is_survived_until_it_comes_three_times_in_a_row(
    times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = times

    def with_a_bug(original: Callable[..., object]) -> Callable[..., object]:
        def succeed(*args: object) -> object:
            nonlocal left
            if left:
                left -= 1
                raise LookupError("a bug")
            return original(*args)

        return succeed

    monkeypatch.setattr(BatchRunner, "_succeed", with_a_bug(BatchRunner._succeed))  # noqa: SLF001  # to put a bug there
    async with BatchScheduler(lambda items: items) as scheduler:
        for _ in range(times):
            with pytest.raises(LookupError, match="a bug"):
                await scheduler.submit(1)
        assert scheduler.is_broken == (times == 3)
        assert scheduler.statistics().running == 0
        if times == 2:
            assert await scheduler.submit_many([1, 2]) == [Success(1), Success(2)]


async def test_requests_that_run_when_the_scheduler_breaks_are_answered() -> None:
    running, errors = anyio.Event(), list[SchedulerClosedError]()

    async def run(items: list[int]) -> list[int]:
        running.set()
        await anyio.sleep_forever()
        return items

    model = CostModelOfOurs(ZeroDivisionError())
    with anyio.CancelScope() as scope:
        async with BatchScheduler(run, item_size=int, cost_model=model, max_in_flight=2) as scheduler:

            async def wait() -> None:
                try:
                    await scheduler.submit(1)
                except SchedulerClosedError as error:
                    errors.append(error)

            async with anyio.create_task_group() as group:
                group.start_soon(wait)
                await running.wait()
                for _ in range(3):
                    with pytest.raises(ZeroDivisionError):
                        await scheduler.submit(13)
            scope.cancel()
    assert len(errors) == 1


async def test_a_sink_of_records_that_exits_disturbs_no_batch() -> None:
    def leave(record: BatchRecord) -> None:
        raise SystemExit(record.count)

    async with BatchScheduler(lambda items: items, on_batch=leave) as scheduler:
        for number in range(5):
            assert await scheduler.submit(number) == number
        assert not scheduler.is_broken
