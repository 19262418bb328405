from typing import Any

import numpy as np
import pytest

from modalkit.batching import Priority
from modalkit.benchmarks.simulate.engine import Run, RunBatch
from modalkit.benchmarks.simulate.metrics import summarize


def make_run(**changes: Any) -> Run:
    """Ten requests, a second apart, each alone in a batch of half a second, in which it is half padding."""
    values: dict[str, Any] = {
        "arrivals_s": np.arange(10.0),
        "started_s": np.arange(10.0),
        "finished_s": np.arange(10.0) + 0.5,
        "is_bulk": np.zeros(10, np.bool_),
        "sizes": np.full(10, 4),
        "batches": [RunBatch(float(start), 0.5, 1, 8, 4, is_bulk=False) for start in range(10)],
        "refused": 0,
        "dropped": 0,
    }
    return Run(**{**values, **changes})


def test_the_first_tenth_warms_up_and_what_ends_after_the_last_arrival_adds_no_throughput() -> None:
    summary = summarize(make_run())
    assert summary.virtual_s == 9.0
    assert summary.throughput == pytest.approx(8 / 8)  # of those that came from 1 s on, the last ends at 9.5 s
    assert summary.utilisation == pytest.approx(0.5)
    assert summary.padding == pytest.approx(0.5)
    assert summary.mean_batch_size == 1
    assert summary.longest_s == 0.5
    assert (summary.all.count, summary.all.p50_s, summary.all.mean_s) == (9, 0.5, 0.5)


def test_quantiles_leave_out_who_got_no_answer() -> None:
    finished_s = np.arange(10.0) + 0.5
    finished_s[5] = np.nan
    summary = summarize(make_run(finished_s=finished_s, refused=1))
    assert summary.all.count == 8
    assert summary.turned_away == 0.1


def test_a_backlog_is_measured_until_it_is_worked_off() -> None:
    summary = summarize(make_run(arrivals_s=np.zeros(10)))
    assert summary.virtual_s == 9.5
    assert summary.throughput == pytest.approx(10 / 9.5)


def test_classes_have_latencies_of_their_own_where_there_are_two() -> None:
    assert summarize(make_run()).by_lane == {}
    finished_s = np.arange(10.0) + np.where(np.arange(10) % 2, 0.25, 0.75)
    by_lane = summarize(make_run(is_bulk=np.arange(10) % 2 == 0, finished_s=finished_s)).by_lane
    assert by_lane[Priority.BULK].p99_s == 0.75
    assert by_lane[Priority.INTERACTIVE].p50_s == 0.25


def test_a_request_that_starved_since_the_warm_up_is_seen() -> None:
    finished_s = np.arange(10.0) + 0.5
    finished_s[0] = 100.0
    summary = summarize(make_run(finished_s=finished_s))
    assert summary.longest_s == 100.0
    assert summary.all.p999_s == 0.5
