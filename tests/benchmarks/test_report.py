"""The studies give every figure, and the report shows them; what the figures are is not for a test."""

import io
import json
from pathlib import Path

import pytest
import typer
from rich.console import Console

from modalkit.benchmarks.end_to_end import EndToEndStudy
from modalkit.benchmarks.growth import GrowthStudy
from modalkit.benchmarks.in_process import BundledPipeline, corpus_items
from modalkit.benchmarks.jobs import HttpStudy
from modalkit.benchmarks.measurement import Figure, Study
from modalkit.benchmarks.overhead import OverheadStudy
from modalkit.benchmarks.report import as_json, figures_table, read_baseline, regressions, run_study

UNCALIBRATED = {"calibration": {"enabled": False}}  # which would take seconds for each worker


@pytest.mark.parametrize(
    ("study", "rounds"),
    [(OverheadStudy(items=2_000), 2), (GrowthStudy(depths=(40, 80), items=200), 2), (HttpStudy(20), 1)],
)
def test_a_study_measures_every_figure_in_every_round(study: Study, rounds: int) -> None:
    told: list[str] = []
    figures = run_study(study, rounds, told.append)
    assert all(len(figure.rounds) == rounds and figure.value > 0 for figure in figures)
    stages = ["warming up", *(f"round {number} of {rounds}" for number in range(1, rounds + 1))]
    assert told == [f"{study.name}: {stage}" for stage in stages]


def test_the_end_to_end_study_measures_all_that_few_texts_allow(bundled_pipeline: BundledPipeline) -> None:
    study = EndToEndStudy(
        bundled_pipeline, corpus_items(12), open_loop_items=4, idle_calls=2, batch_config=UNCALIBRATED
    )
    figures = run_study(study, 1, lambda _: None)
    missing = [figure.name for figure in figures if not figure.rounds]
    assert missing == [
        "cost error after 100 batches, predict_many",
        "cost error after 100 batches, callers",
        "padding in the tensors, 1,000 or more queued",
        "the same by estimated sizes",
    ]


def test_the_table_tells_which_targets_are_missed() -> None:
    figures = [
        Figure(name="slow", rounds=(3.0, 4.0, 5.0), at_most=2),
        Figure(name="rate", rounds=(100.0,), unit="items/s", at_least=90),
        Figure(name="unknown", rounds=(), at_most=2),
    ]
    console = Console(width=100, file=io.StringIO(), record=True)
    console.print(figures_table("a study", figures))
    slow, rate, unknown = [line for line in console.export_text().splitlines() if any(f.name in line for f in figures)]
    assert all(part in slow for part in ("4 x", "3 .. 5", "<= 2", "missed"))
    assert all(part in rate for part in ("100 items/s", ">= 90", "met"))
    assert "not measured" in unknown
    assert "missed" not in unknown


def test_the_json_holds_every_round_and_what_it_was_measured_on() -> None:
    figures = [Figure(name="slow", rounds=(3.0, 4.0), at_most=2), Figure(name="unknown", rounds=())]
    document = json.loads(as_json({"a study": figures}))
    assert document["studies"]["a study"] == [
        {"name": "slow", "unit": "x", "median": 3.5, "rounds": [3.0, 4.0], "at_most": 2, "met": False},
        {"name": "unknown", "unit": "x", "median": None, "rounds": []},
    ]
    assert document["machine"]["cores"]
    assert document["versions"].keys() >= {"python", "torch"}


def test_a_ratio_that_is_a_tenth_worse_than_in_the_baseline_is_flagged(tmp_path: Path) -> None:
    def measured(*values: float) -> dict[str, list[Figure]]:
        more, less, free, time = values
        return {
            "s": [
                Figure(name="more is better", rounds=(more,), at_least=1),
                Figure(name="less is better", rounds=(less,), at_most=1),
                Figure(name="without a target", rounds=(free,)),
                Figure(name="a time", rounds=(time,), unit="us", at_most=1),
                Figure(name="not measured", rounds=(), at_most=1),
            ]
        }

    path = tmp_path / "baseline.json"
    path.write_text(as_json(measured(2.0, 0.5, 1.0, 7.0)))
    baseline = read_baseline(path)
    assert regressions(measured(1.85, 0.54, 9.0, 99.0), baseline) == []
    assert regressions(measured(1.7, 0.6, 9.0, 99.0), baseline) == [
        "s: more is better: 1.7 after 2 (-15%)",
        "s: less is better: 0.6 after 0.5 (+20%)",
    ]
    with pytest.raises(typer.BadParameter, match="its engine is torch/float32, not auto"):
        read_baseline(path, "auto")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(typer.BadParameter, match="give a file that --json wrote"):
        read_baseline(tmp_path / "other.json")
