import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from modalkit.batching import Priority, Request
from modalkit.benchmarks.simulate.__main__ import app
from modalkit.benchmarks.simulate.devices import FIXED_WINDOW, MODALKIT, Device, make_device
from modalkit.benchmarks.simulate.fairness import OrderWatch, check
from modalkit.benchmarks.simulate.rules import as_batch


@pytest.fixture(scope="module")
def cpu() -> Device:
    return make_device("cpu-2-cores", noise=0.05)


def test_the_policy_gets_more_out_of_a_backlog_than_arrival_order_does(cpu: Device) -> None:
    ours, fifo = cpu.backlog_rate(MODALKIT, 2_000), cpu.backlog_rate(FIXED_WINDOW, 2_000)
    assert ours >= 0.95 * cpu.capacity
    assert ours >= 3 * fifo


def test_the_promises_of_fairness_hold_in_simulation(cpu: Device) -> None:
    promises = check(cpu, 1_500, seed=1)
    assert promises.bulk_share == pytest.approx(0.1, abs=0.01)
    assert promises.overtaken == 0
    assert promises.overdue_backlog >= 0.95 * promises.fresh_backlog


def test_the_watch_counts_a_batch_that_overtakes_an_overdue_request() -> None:
    old, young = Request(0, 1, arrival_s=0.0), Request(1, 1, arrival_s=1.0)
    arrivals_s, priorities = [0.0, 1.0], [Priority.INTERACTIVE] * 2
    for now, expected in ((1.5, 0), (2.5, 1)):
        watch = OrderWatch(2.0, arrivals_s, priorities)
        watch(now, as_batch([young]))
        watch(now + 1, as_batch([old]))
        assert watch.overtaken == expected


def test_a_quick_study_prints_its_tables_and_writes_json(tmp_path: Path) -> None:
    arguments = ["--quick", "--requests", "400", "--device", "cpu-2-cores", "--jobs", "1"]
    arguments += ["--out", str(tmp_path / "results.json")]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert "cpu-2-cores, bursty" in result.output
    stored = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert {cell["rule"] for cell in stored["devices"][0]["cells"]} >= {MODALKIT, FIXED_WINDOW}
    assert {cell["summary"]["requests"] for cell in stored["devices"][0]["cells"]} == {400}


def test_sizes_are_counted_as_the_bundled_pipeline_estimates_them(tmp_path: Path) -> None:
    texts, file = tmp_path / "texts.txt", tmp_path / "sizes.json"
    texts.write_text("short\nshort\n\n" + "a much longer text " * 30 + "\n", encoding="utf-8")
    result = CliRunner().invoke(app, ["sizes", str(texts), str(file), "--source", "made up"], catch_exceptions=False)
    assert result.exit_code == 0
    stored = json.loads(file.read_text(encoding="utf-8"))
    assert stored["source"] == "made up"
    assert sorted(stored["counts"].values()) == [1, 2]


def test_an_unknown_device_is_refused_with_those_that_there_are() -> None:
    result = CliRunner().invoke(app, ["--device", "abacus"])
    assert result.exit_code == 2
    assert "abacus" in result.output
