"""What is written of a matrix, whatever became of its parts."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
from rich.console import Console

from modalkit.benchmarks.containers.matrix import Cell, Figures, Variant, VariantResult, parse_matrix
from modalkit.benchmarks.containers.report import Results

MATRIX = parse_matrix("T4,T5", "8,32", "64,512", 20.0, keeps_records=True)


def figures(items_per_s: float, errors: Mapping[str, int] | None = None) -> Figures:
    return Figures(
        answered=1000,
        errors=errors or {},
        elapsed_s=20.0,
        items_per_s=items_per_s,
        latency_mean_s=0.05,
        latency_p50_s=0.04,
        latency_p95_s=0.1,
        latency_p99_s=0.2,
        queue_s=0.01,
        batch_s=0.02,
        rest_s=0.02,
        mean_list_length=7.5,
        mean_batch_size=6.25,
        batch_sizes={4: 50, 8: 100},
        predict_share=0.9,
        padding_share=0.125,
    )


@pytest.fixture
def results(tmp_path: Path) -> Results:
    """A matrix of which a part was measured and a part was not."""
    made = Results(MATRIX, {"app": "sentiment-dev"}, tmp_path / "new" / "folder")
    cells = [
        Cell(concurrency=512, figures=figures(900.0, {"gone": 3})),
        Cell(concurrency=64, figures=figures(700.0), records=[{"count": 8}]),
    ]
    made.add(VariantResult(variant=Variant("T4", 8), device="Tesla T4", cold_start_s=12.5, cells=cells))
    made.add(VariantResult(variant=Variant("T4", 32), cells=[Cell(concurrency=64, error="it took [too] long")]))
    made.add(VariantResult(variant=Variant("T5", 8), error="there is no T5"))
    return made


def test_everything_is_in_the_json_and_what_is_no_number_is_null(results: Results, tmp_path: Path) -> None:
    document = json.loads((tmp_path / "new" / "folder" / "results.json").read_text())
    assert document["settings"]["app"] == "sentiment-dev"
    assert document["settings"]["matrix"]["load"]["concurrency"] == [64, 512]
    first, second, third = document["results"]
    assert first["variant"] == {"gpu": "T4", "max_batch_size": 8}
    assert first["device"] == "Tesla T4"
    assert first["cells"][0]["figures"]["batch_sizes"] == {"4": 50, "8": 100}
    assert first["cells"][1]["records"] == [{"count": 8}]
    assert second["cells"][0]["figures"] is None
    assert third["cold_start_s"] is None
    assert third["error"] == "there is no T5"


def test_the_table_has_a_line_for_each_cell_and_names_what_failed(results: Results) -> None:
    console = Console(width=120, record=True)
    results.print(console)
    said = console.export_text()
    assert "…" not in said
    assert ["T4", "8", "512", "900"] in [line.split()[:4] for line in said.splitlines()]
    assert "T4, batches of at most 8, 512 callers: 3 x gone" in said
    assert "T4, batches of at most 32, 64 callers: it took [too] long" in said
    assert "T5, batches of at most 8: there is no T5" in said


def test_a_plot_is_made_of_what_there_is(results: Results, tmp_path: Path) -> None:
    assert (tmp_path / "new" / "folder" / "results.png").read_bytes().startswith(b"\x89PNG")


def test_a_matrix_in_which_everything_failed_is_reported_too(tmp_path: Path) -> None:
    results = Results(MATRIX, {}, tmp_path)
    results.add(VariantResult(variant=Variant("T5", 8), error="there is no T5"))
    assert (tmp_path / "results.png").exists()
