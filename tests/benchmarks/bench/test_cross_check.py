"""wrk drives the same target."""

import os
import shutil
from collections.abc import Callable
from typing import Any

import pytest

from modalkit.benchmarks.bench.cross_check import cross_check
from modalkit.benchmarks.bench.results import Cell, Figure
from modalkit.benchmarks.load import BenchError, Endpoint, Load
from modalkit.benchmarks.load.capacity import instant_server
from tests.benchmarks.bench.conftest import Bench

needs_wrk = pytest.mark.skipif(
    shutil.which("wrk") is None and "CI" not in os.environ, reason="wrk is not installed (apt-get install wrk)"
)
LOAD = Load(clients=2, seconds=1, warm_up_s=0)


def own(items_per_s: float) -> Cell:
    return Cell(
        variant={}, load="", mode="sync", open=False, clients=2, rate_per_s=None,
        figures={"items_per_s": Figure(items_per_s)}, answered=1, errors={}, accuracy=None, limited=[], client={},
    )  # fmt: skip


@needs_wrk
def test_wrk_sends_the_same_requests_and_both_figures_are_shown(
    bench: Bench, service: str, results: Callable[[], Any]
) -> None:
    done = bench(service, "--key", "secret", "--tool", "wrk", "--seconds", "1", "--length-mix", "3:1,5:1")
    found = results()["cross_check"]
    assert found["items_per_s"] > 0, done.output
    assert found["own_items_per_s"] == results()["cells"][-1]["figures"]["items_per_s"]["mean"]
    assert found["p50_ms"] <= found["p99_ms"]
    assert "Cross-check by wrk (2 clients)" in done.output


@needs_wrk
def test_figures_that_differ_do_not_agree() -> None:
    with instant_server() as url:
        found = cross_check("wrk", Endpoint(url), [{"text": 'ü "quoted" \\ \n'}], LOAD, own(1.0))
    assert found["ratio"] > 2
    assert not found["agrees"]


@needs_wrk
def test_answers_that_are_no_success_are_no_figure(service: str) -> None:
    with pytest.raises(BenchError, match="answers that were no success"):
        cross_check("wrk", Endpoint(f"{service}/sync/predict"), [{"text": "a"}], LOAD, own(1.0))


def test_aiperf_takes_no_lists() -> None:
    with pytest.raises(BenchError, match="use wrk for lists"):
        cross_check("aiperf", Endpoint("http://h", {"$each": "$item"}), [{"text": "a"}], LOAD, own(1.0))


def test_an_unknown_tool_is_refused_before_anything_runs(bench: Bench) -> None:
    done = bench("http://127.0.0.1:1", "--tool", "ab")
    assert "--tool 'ab': give one of wrk, aiperf" in str(done.exception)


def test_an_open_loop_cannot_be_checked(bench: Bench) -> None:
    done = bench("http://127.0.0.1:1", "--rate", "5", "--tool", "wrk")
    assert "drives a closed loop" in str(done.exception)
