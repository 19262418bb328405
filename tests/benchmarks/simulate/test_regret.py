"""Whatever batches cost, the planner comes near the best fixed batching chosen in hindsight, from a cold start."""

import math
from collections.abc import Callable

import numpy as np
import pytest

from modalkit.batching import BatchPlanner, BatchPolicy, MeasuredCostModel
from modalkit.benchmarks.simulate.devices import make_device
from modalkit.benchmarks.simulate.mix import mix
from modalkit.benchmarks.simulate.regret import (
    ALL_ITEMS,
    FIRST_ITEMS,
    backlog_s,
    backlog_share,
    cases,
    mean_regret,
    regret,
)
from modalkit.benchmarks.simulate.structures import Structure, fixed_s, linear
from modalkit.benchmarks.simulate.tables import CPU
from modalkit.benchmarks.simulate.workload import IndexedRequest

CASES = list(cases())


@pytest.mark.parametrize(("structure", "sizes"), CASES, ids=[f"{s.name}, {m}" for s, m in CASES])
def test_every_structure_reaches_the_best_fixed_batching_over_2000_items_and_nearly_over_200(
    structure: Structure, sizes: str
) -> None:
    found = mean_regret(structure, sizes, (1,), loops=False)
    assert found.all >= 0.95
    assert found.first >= 0.8


def test_callers_in_a_loop_and_requests_at_a_rate_wait_no_longer_than_in_the_best_fixed_batching() -> None:
    """Where the fixed cost of a batch is large beside that of a token, and the sizes are of two kinds."""
    found = regret(Structure("in loops", linear(0.5, padded_s=5e-5)), "two kinds")
    assert found.callers >= 0.95
    assert found.waiting >= 0.95


def _ten_times_at_a_thousand(count: int, longest: int, total: int) -> float:
    return 0.3 + (3.0 if count * longest > 1000 else 0.0)


def _root_of_tokens(count: int, longest: int, total: int) -> float:
    return 0.01 * math.sqrt(count * longest)


def _cubes(count: int, longest: int, total: int) -> float:
    return 0.05 + 1e-6 * count * longest * math.sqrt(longest)


@pytest.mark.parametrize(
    "seconds", [fixed_s(7.0), linear(0.2, 0.003, 2e-5), linear(3.0, total_s=1e-3), _root_of_tokens, _cubes]
)
@pytest.mark.parametrize("sizes", ["none", "equal", "texts", "uniform"])
def test_structures_that_nothing_was_tuned_on_do_as_well(seconds: Callable[[int, int, int], float], sizes: str) -> None:
    structure = Structure("unseen", seconds)
    assert backlog_share(structure, sizes, ALL_ITEMS, 11)[0] >= 0.93
    assert backlog_share(structure, sizes, FIRST_ITEMS, 11)[0] >= 0.7


def test_a_sudden_cliff_costs_less_than_half() -> None:
    structure = Structure("cliff", _ten_times_at_a_thousand)
    assert backlog_share(structure, "texts", ALL_ITEMS, 1)[0] >= 0.5


@pytest.mark.parametrize("beyond", [64, 100])
@pytest.mark.parametrize("factor", [2, 4])
def test_the_number_below_a_cliff_is_found_where_batches_may_hold_many_more(beyond: int, factor: int) -> None:
    """Batches grew from 8 to 32 and 128, so none ran between the last two."""

    def seconds(count: int, longest: int, total: int) -> float:
        return (0.01 + 0.001 * count) * (factor if count > beyond else 1)

    items = 20_000
    policy = BatchPolicy(max_batch_size=256, max_queue_items=items)
    planner: BatchPlanner[IndexedRequest] = BatchPlanner(policy, MeasuredCostModel())
    ours_s, _ = backlog_s(planner, Structure("cliff", seconds), np.ones(items, dtype=np.int64), 1)
    assert items / beyond * seconds(beyond, 1, beyond) / ours_s >= 0.9


def test_jobs_and_interactive_requests_share_the_measured_cpu() -> None:
    """The p99 of interactive requests stays within a few times that without jobs, and hardly any throughput is lost."""
    found = mix(make_device(CPU, 0.05), 0.25, 800)
    assert found.p99_s <= 3 * found.p99_alone_s
    assert found.throughput >= 0.93
