"""The bound that no rule gets below."""

import numpy as np
import pytest

from modalkit.benchmarks.simulate.bound import least_p99_s
from modalkit.benchmarks.simulate.devices import MAX_BATCH_SIZE, make_device, simulate
from modalkit.benchmarks.simulate.tables import DEVICES, CostTable
from modalkit.benchmarks.simulate.workload import ArrivalKind, OpenLoop

FLAT = CostTable("flat", "", (1, 32), (1, 512), [[0.01, 0.01], [0.01, 0.01]])
BY_ITEM = CostTable("by item", "", (1, 32), (1, 512), [[0.01, 0.01], [0.32, 0.32]])


def load(arrivals_s: list[float]) -> OpenLoop:
    return OpenLoop(np.array(arrivals_s), np.full(len(arrivals_s), 8))


def test_far_apart_requests_can_have_what_they_take_alone() -> None:
    assert least_p99_s(FLAT, load([0.0, 1.0, 2.0]), 32) == pytest.approx(0.01, rel=0.01)


def test_of_two_requests_the_first_may_wait_for_the_second_or_the_second_for_the_first() -> None:
    """Both in the batch that starts with the second one: the first waits for 2 ms."""
    assert least_p99_s(FLAT, load([0.0, 0.002]), 32) == pytest.approx(0.012, rel=0.05)


def test_a_stream_without_a_gap_waits_for_up_to_one_batch() -> None:
    arrivals_s = np.arange(0, 10, 0.0001).tolist()
    assert 0.019 < least_p99_s(FLAT, load(arrivals_s), 10_000) <= 0.02


def test_where_batches_save_nothing_work_adds_up() -> None:
    """Of ten requests at once, each of 10 ms, the last ends after 100 ms, or after 90 where one may be late."""
    assert least_p99_s(BY_ITEM, load([0.0] * 10), 32) == pytest.approx(0.1, rel=0.01)
    assert least_p99_s(BY_ITEM, load([0.0] * 10), 32, late_share=0.1) == pytest.approx(0.09, rel=0.01)


@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize("kind", list(ArrivalKind))
@pytest.mark.parametrize("load_share", [0.05, 0.4, 0.9])
def test_no_rule_gets_below_it(name: str, kind: ArrivalKind, load_share: float) -> None:
    device = make_device(name, noise=0)
    source = device.open_loop(kind, load_share * device.capacity, 300, seed=3)
    least_s = least_p99_s(device.table, source, MAX_BATCH_SIZE)
    for rule in device.rules.values():
        run = simulate(rule(), device.open_loop(kind, load_share * device.capacity, 300, seed=3), device.table, 0, 0)
        latencies_s = np.nan_to_num(run.finished_s - run.arrivals_s, nan=np.inf)
        assert np.quantile(latencies_s, 0.99, method="lower") >= least_s * (1 - 1e-9)
