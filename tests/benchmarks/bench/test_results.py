"""Figures, verdicts and plots."""

import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from prometheus_client.samples import Sample
from scipy import stats

from modalkit.batching import BatchRecord, DispatchReason, Priority
from modalkit.benchmarks.bench import session
from modalkit.benchmarks.bench.charts import charts_of
from modalkit.benchmarks.bench.compare import compared, differences, verdict_of
from modalkit.benchmarks.bench.page import page
from modalkit.benchmarks.bench.plots import write_plots
from modalkit.benchmarks.bench.report import findings, load_table, number
from modalkit.benchmarks.bench.results import Cell, Figure, Results, read_document, timeline_of
from modalkit.benchmarks.bench.server_side import ServerSide, Setup, gpu_use, of_records, server_side
from modalkit.benchmarks.load import BenchError, Measured
from tests.benchmarks.bench.conftest import cell_of


@pytest.fixture
def document() -> dict[str, Any]:
    results = Results(target="a <server>", settings={"repeats": 1})
    results.cells = [
        cell_of("8 clients", {"max_batch_size": "8"}, 100.0),
        cell_of("8 clients", {"max_batch_size": "32"}, 200.0, errors={"HTTP 503": 3}, limited=["it was busy"]),
    ]
    results.searches = [{"search": "capacity", "variant": {}, "items_per_s": 200.0, "load": "8 clients"}]
    results.cross_check = {
        "tool": "wrk", "load": "8 clients", "items_per_s": 90.0, "own_items_per_s": 100.0, "ratio": 0.9,
        "agrees": False, "p50_ms": 1, "p99_ms": 2,
    }  # fmt: skip
    return results.document()


def test_an_interval_is_that_of_students_t() -> None:
    values = [10.0, 12.0, 11.0, 14.0]
    expected = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    found = Figure.of(values)
    assert (found.low, found.high) == pytest.approx(expected, rel=0.005)
    assert Figure.of([3.0]) == Figure(3.0)


@pytest.mark.parametrize(
    ("now", "before", "verdict"),
    [
        ({"mean": 95}, {"mean": 100}, "same"),
        ({"mean": 80}, {"mean": 100}, "worse"),
        ({"mean": 120}, {"mean": 100}, "better"),
        ({"mean": 80, "low": 70, "high": 90}, {"mean": 100, "low": 85, "high": 115}, "same"),
        ({"mean": 80, "low": 78, "high": 82}, {"mean": 100, "low": 98, "high": 102}, "worse"),
    ],
)
def test_a_verdict_needs_a_difference_beyond_tolerance_and_chance(now: Any, before: Any, verdict: str) -> None:
    assert verdict_of(now, before, 0.1, higher=True) == verdict


def test_a_longer_latency_is_worse(document: dict[str, Any]) -> None:
    older = read(document)
    older["cells"][0]["figures"]["p99_ms"]["mean"] = 1.0
    verdicts = {(found.what, found.figure): found.verdict for found in compared(document, older)}
    assert verdicts["max_batch_size 8, sync, 8 clients", "p99_ms"] == "worse"
    assert verdicts["max_batch_size 8, sync, 8 clients", "items_per_s"] == "same"
    assert verdicts["capacity", "items_per_s"] == "same"


def test_more_failures_are_worse_though_the_rest_is_the_same() -> None:
    def measured(failed: int) -> dict[str, Any]:
        errors = {"HTTP 503": failed} if failed else {}
        cells = [cell_of("8 clients", {}, 100.0, answered=1000, errors=errors)]
        return Results(target="x", settings={}, cells=cells).document()

    def verdict(now: int, before: int) -> list[str]:
        found = compared(measured(now), measured(before))
        assert {one.verdict for one in found if "failed" not in one.figure} == {"same"}
        return [one.verdict for one in found if one.figure == "share of items that failed"]

    assert verdict(50, 0) == ["worse"]
    assert verdict(0, 50) == ["better"]
    assert verdict(5, 0) == ["same"]
    assert verdict(0, 0) == []


def test_a_limit_that_no_rate_keeps_any_more_is_worse() -> None:
    def searched(items_per_s: float | None) -> dict[str, Any]:
        found = {"search": "rate", "p99_limit_ms": 50.0, "variant": {}, "items_per_s": items_per_s, "p99_ms": 40.0}
        return Results(target="x", settings={}, searches=[found]).document()

    (worse,) = compared(searched(None), searched(300.0))
    assert (worse.verdict, worse.before, worse.now) == ("worse", 300.0, 0.0)
    (better,) = compared(searched(300.0), searched(None))
    assert better.verdict == "better"
    assert compared(searched(None), searched(None)) == []


def test_a_verdict_says_when_another_engine_ran() -> None:
    def measured(engine: str | None) -> dict[str, Any]:
        results = Results(
            target="x", settings={}, cells=[cell_of("8 clients", {}, 100.0, server=ServerSide(engine=engine))]
        )
        results.searches = [
            {"search": "capacity", "variant": {}, "items_per_s": 200.0, "load": "8 clients", "engine": engine}
        ]
        return results.document()

    now, before = measured("openvino/bfloat16"), measured("torch/float32")
    change = "(openvino/bfloat16, before torch/float32)"
    assert {found.what for found in compared(now, before)} == {f"sync, 8 clients {change}", f"capacity {change}"}
    for other in (measured("openvino/bfloat16"), measured(None)):
        assert {found.what for found in compared(now, other)} == {"sync, 8 clients", "capacity"}
    assert "openvino/bfloat16" in load_table(now)[1][0]


def read(document: dict[str, Any]) -> dict[str, Any]:
    import json

    copy: dict[str, Any] = json.loads(json.dumps(document))
    return copy


def test_results_of_another_machine_or_of_other_items_are_named() -> None:
    now = Results(target="x", settings={"items": "a.csv", "price_per_hour": 1.0}).document()
    assert differences(now, now) == []
    before = read(now)
    before["machine"]["cores"] = 96
    before["settings"] = {"items": "b.csv"}
    machine, items = differences(now, before)
    assert machine.startswith("The older results are of another machine: ")
    assert "96 cores" in machine
    assert items == "The older results are of other items: b.csv; here a.csv."
    assert items in findings({**now, "differences": [items]})


def test_the_findings_say_what_wins_and_what_to_doubt(document: dict[str, Any]) -> None:
    said = "\n".join(findings(document))
    assert "Capacity: 200 items/s, with 8 clients." in said
    assert "sync, 8 clients: most items/s with max_batch_size 32 (200); lowest p99 with" in said
    assert "wrk (8 clients): 90.0 items/s, here 100: the two do not agree within 5 % (-10.0%)" in said
    assert "3 x HTTP 503" in said
    assert "the load generator was the limit" in said
    assert load_table(document)[0] == ["settings", "load", "items/s", "p50 ms", "p99 ms", "failed", "queue ms"]


def test_the_settings_that_win_a_search_are_named() -> None:
    def rate(size: str, items_per_s: float | None) -> dict[str, Any]:
        return {
            "search": "rate", "p99_limit_ms": 50.0, "variant": {"max_batch_size": size}, "items_per_s": items_per_s,
            "p99_ms": 40.0, "capacity_items_per_s": 400.0,
        }  # fmt: skip

    results = Results(target="x", settings={}, searches=[rate("8", None), rate("32", 300.0), rate("128", 200.0)])
    assert "Highest rate with p99 below 50 ms: 300 items/s, with max_batch_size 32." in findings(results.document())
    results.searches = [rate("8", 300.0)]
    assert not any(line.startswith("Highest") for line in findings(results.document()))


def test_settings_that_refuse_requests_win_no_latency_and_a_winner_has_its_accuracy() -> None:
    results = Results(target="x", settings={})
    results.cells = [
        cell_of("8 clients", {"engine": "fast"}, 300.0, errors={"HTTP 429": 9}, accuracy=0.5),
        cell_of("8 clients", {"engine": "right"}, 100.0, accuracy=1.0),
    ]
    (line,) = [line for line in findings(results.document()) if line.startswith("sync, 8 clients: most")]
    assert "most items/s with engine fast (300, accuracy 50.0%)" in line
    assert "lowest p99 with engine right (100, accuracy 100.0%)" in line
    assert "lowest p99, with engine right, sync, 8 clients" in page(results.document())


def test_the_page_and_the_plots_show_all_charts(document: dict[str, Any], tmp_path: Path) -> None:
    names = [chart.name for chart in charts_of(document)]
    assert names == ["throughput", "latency", "parts", "batch-sizes", "timeline-throughput", "timeline-p99"]
    shown = page(document)
    assert shown.count("<svg") == len(names)
    assert "nan" not in shown.lower().replace("nance", "")
    assert "a &lt;server&gt;" in shown
    assert "<server>" not in shown
    assert [path.name for path in write_plots(document, tmp_path)] == [f"{name}.png" for name in names]
    assert (tmp_path / "latency.png").read_bytes().startswith(b"\x89PNG")


def test_plots_that_leave_loads_out_say_so() -> None:
    results = Results(target="x", settings={}, cells=[cell_of(f"{n} clients", {}, 100.0) for n in range(1, 10)])
    for chart in charts_of(results.document()):
        assert ("The first 8 loads." in chart.note) is (chart.name != "throughput")


def test_results_without_any_answer_are_shown_too() -> None:
    results = Results(target="http://x", settings={})
    results.cells = [
        Cell(
            variant={}, load="1 client", mode="sync", open=False, clients=1, rate_per_s=None,
            figures={"items_per_s": Figure(0.0)}, answered=0, errors={"HTTP 500": 5}, accuracy=None, limited=[],
            client={},
        )
    ]  # fmt: skip
    shown = page(results.document())
    assert "HTTP 500" in shown
    assert "±" not in shown


def test_another_file_is_no_older_result(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(BenchError, match="holds no results of modalkit bench"):
        read_document(tmp_path / "x.json")


def samples(model: str, values: dict[str, float], engine: str = "torch") -> list[Sample]:
    """Samples of a model; a name may be followed by a label and its value, as ``batch_size_bucket le 4.0``."""
    made = [Sample("modalkit_engine_info", {"model": model, "engine": engine, "dtype": "float32"}, 1.0)]
    for name, value in values.items():
        metric, *label = name.split()
        labels = {"model": model} | ({label[0]: label[1]} if label else {})
        made.append(Sample(f"modalkit_{metric}", labels, value))
    return made


IDLE = {"batch_size_count": 7.0, "busy_seconds_total": 3.0, "open_seconds_total": 9.0}


def test_the_server_is_told_by_how_the_metrics_of_the_models_that_ran_grew() -> None:
    before = samples("busy", {"queue_wait_seconds_sum": 1.0, "queue_wait_seconds_count": 10.0})
    after = samples("busy", {
        "queue_wait_seconds_sum": 1.6,
        "queue_wait_seconds_count": 16.0,
        "batch_size_sum": 6.0,
        "batch_size_count": 3.0,
        "batch_size_bucket le 1.0": 1.0,
        "batch_size_bucket le 4.0": 3.0,
        "batch_size_bucket le +Inf": 3.0,
        "stage_seconds_sum stage predict": 0.3,
        "stage_seconds_count stage predict": 3.0,
        "busy_seconds_total": 1.0,
        "open_seconds_total": 4.0,
        "real_tokens_total": 8.0,
        "padded_tokens_total": 10.0,
    })  # fmt: skip
    before += samples("idle", IDLE, "openvino")
    after += samples("idle", {**IDLE, "open_seconds_total": 13.0}, "openvino")
    found = server_side(before, after, mean_s=0.25)
    assert found is not None
    assert found.queue_s == pytest.approx(0.1)
    assert found.stages_s == {"predict": pytest.approx(0.1)}
    assert found.rest_s == pytest.approx(0.05)
    assert (found.mean_batch_size, found.batch_sizes) == (2, {"1": 1, "4": 2})
    assert found.padding_share == pytest.approx(0.2)
    assert (found.utilisation, found.engine) == (0.25, "torch/float32")
    assert server_side([], [], 0.1) is None
    assert server_side(None, after, 0.1) is None


def test_a_model_that_counts_batches_from_before_is_at_most_busy_all_the_time() -> None:
    ran = {"batch_size_sum": 1.0, "batch_size_count": 1.0, "busy_seconds_total": 5.0, "open_seconds_total": 4.0}
    found = server_side([], samples("busy", ran), mean_s=0.1)
    assert found is not None
    assert found.utilisation == 1


def test_a_worker_is_busy_by_the_batches_that_may_run_at_once() -> None:
    record = BatchRecord(
        count=4, failed=0, priority=Priority.INTERACTIVE, reason=DispatchReason.FULL, real_tokens=8, padded_tokens=10,
        waits_s={Priority.INTERACTIVE: [0.1] * 4}, preprocess_s=0.1, predict_s=0.6, postprocess_s=0.1, total_s=1.0,
        predicted_s=0.8, overlapped=False,
    )  # fmt: skip
    found = of_records([record, record, record], Setup("torch/float32", slots=2), elapsed_s=2.0, mean_s=1.2)
    assert found is not None
    assert (found.utilisation, found.engine) == (0.75, "torch/float32")
    assert found.paddings == {"0.2": 3}
    nearly = replace(record, real_tokens=96, padded_tokens=100)
    found = of_records([nearly], Setup(None, slots=1), elapsed_s=1.0, mean_s=1.2)
    assert found is not None
    assert found.paddings == {"0.1": 1}, "at most, not about"


def timeline_run(ended_s: list[float], items: float) -> Measured:
    rows = [ended_s, [0.1] * len(ended_s), [items] * len(ended_s)]
    return Measured(
        items_per_s=10, requests_per_s=10, answered=20, errors={}, elapsed_s=1.0, due_per_s=20, cpu_share=0,
        late_p99_s=0, processes=1, latencies_s=np.array([]), ended=np.array(rows),
    )  # fmt: skip


def test_a_timeline_has_what_ended_in_each_part() -> None:
    run = timeline_run(np.linspace(0, 0.99, 20).tolist(), items=2)
    assert [row[:3] for row in timeline_of(run)] == [(0.5, 40.0, 100.0), (1.0, 40.0, 100.0)]


@pytest.mark.parametrize(("value", "text"), [(1234.5, "1,234"), (56.78, "56.8"), (1.234, "1.23"), (None, "-")])
def test_numbers_have_three_digits(value: float | None, text: str) -> None:
    assert number(value) == text


def test_the_gpus_are_sampled_where_there_is_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    sampled = threading.Event()

    def utilization(handle: int) -> SimpleNamespace:
        sampled.set()
        return SimpleNamespace(gpu=50)

    stand_in = SimpleNamespace(
        NVMLError=RuntimeError,
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetCount=lambda: 1,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetName=lambda handle: "H200",
        nvmlDeviceGetUtilizationRates=utilization,
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(used=2**30),
    )
    monkeypatch.setitem(sys.modules, "pynvml", stand_in)
    before_s = time.perf_counter()
    with gpu_use() as use:
        assert sampled.wait(60)
    assert use.summary([(before_s, time.perf_counter())]) == [
        {"name": "H200", "utilisation": 0.5, "memory_bytes": 2**30}
    ]
    assert use.summary([(0.0, before_s)]) == [], "what is not measured does not count"


def test_the_utilisation_of_the_gpus_is_in_the_table() -> None:
    gpus = [{"name": "H200", "utilisation": 0.5, "memory_bytes": 1}, {"name": "H200", "utilisation": 0.75}]
    results = Results(target="x", settings={}, cells=[cell_of("8 clients", {}, 100.0, gpus=gpus)])
    headings, (row,) = load_table(results.document())
    assert dict(zip(headings, row, strict=True))["gpu"] == "62.5%"


def test_a_load_that_begins_anew_with_more_processes_is_told_from_its_own_begin(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scraped = iter(range(9))
    monkeypatch.setattr(session, "scrape", lambda *_: next(scraped))
    found = session.Scrapes("http://x", {}, warm_up_s=2.0, end_s=3.0)
    for elapsed_s, before in ((0.1, None), (2.1, 0), (2.9, 0), (0.1, 0), (2.0, 1), (2.5, 1)):
        found.on_progress(elapsed_s)
        assert found.before == before


def test_what_the_server_does_after_the_measured_time_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    scraped = iter(range(9))
    monkeypatch.setattr(session, "scrape", lambda *_: next(scraped))
    found = session.Scrapes("http://x", {}, warm_up_s=2.0, end_s=12.0)
    for elapsed_s in (0.1, 2.1, 11.9, 12.1):
        found.on_progress(elapsed_s)
    assert (found.before, found.at_end(), found.at_end()) == (0, 1, 1)
    steady = session.Scrapes("http://x", {}, warm_up_s=2.0, end_s=12.0)
    for elapsed_s in (2.1, 9.0):
        steady.on_progress(elapsed_s)
    assert (steady.before, steady.at_end()) == (2, 3), "it ended earlier"


def test_a_machine_without_nvml_has_no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with gpu_use() as use:
        pass
    assert use.summary([(0.0, time.perf_counter())]) == []
