"""The scheduler's search for failing items costs little more than the best plan that knows how many there are."""

from functools import partial

import anyio
import pytest
from typer.testing import CliRunner

from modalkit.benchmarks.simulate.__main__ import app
from modalkit.benchmarks.simulate.poison import NestedPlan, best_nested_plan, scheduler_effort, stream


@pytest.mark.parametrize("most", [8, 32, 256])
@pytest.mark.parametrize("share", [1 / 32, 1 / 8, 1 / 4, 1 / 2])
def test_runs_and_item_runs_are_within_one_and_a_half_times_the_best_nested_plan(share: float, most: int) -> None:
    failing = stream(share, 1)
    ours, best = anyio.run(partial(scheduler_effort, failing, most)), best_nested_plan(share, most).effort(failing)
    assert ours.runs <= 1.5 * best.runs
    assert ours.item_runs <= 1.5 * best.item_runs
    assert ours.wrongly_failed == 0


@pytest.mark.parametrize("most", [8, 32, 256])
@pytest.mark.parametrize("share", [1 / 4, 1 / 2, 0.9, 1])
def test_after_a_burst_of_failing_items_batches_are_full_again_within_a_hundred_runs(share: float, most: int) -> None:
    runs: list[list[int]] = []
    failing = [*stream(share, 5, 600), *[False] * 100 * most]
    anyio.run(partial(scheduler_effort, failing, most, runs))
    last = max(index for index, run in enumerate(runs) if any(failing[item] for item in run))
    full = next(index for index, run in enumerate(runs) if index > last and len(run) == most)
    assert full - last <= 100
    assert {len(run) for run in runs[full:-1]} == {most}


@pytest.mark.parametrize(("share", "new", "runs_per_item"), [(0.45, 1, 1.0), (0.25, 2, 0.8178), (0.05, 14, 0.2899)])
def test_the_best_plan_is_that_of_the_literature(share: float, new: int, runs_per_item: float) -> None:
    """Above (3 - √5)/2 every item runs alone; below, the runs for an item are close to the entropy, its bound."""
    plan = best_nested_plan(share, 64)
    assert plan.new == new
    failing = stream(share, 1, 40_000)
    assert plan.effort(failing).runs / 40_000 == pytest.approx(runs_per_item, abs=0.02)


def test_a_plan_ends_with_the_stream_and_infers_the_last_failing_item() -> None:
    effort = NestedPlan(2, [0, 1, 1]).effort([False, True, False])
    assert (effort.runs, effort.item_runs) == (3, 4)


def test_the_table_is_printed() -> None:
    result = CliRunner().invoke(app, ["poison", "--items", "100", "--streams", "1"])
    assert result.exit_code == 0
    assert "item-runs" in result.stdout
