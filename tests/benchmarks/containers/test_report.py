"""What is written of a matrix, whatever became of its parts."""

from collections.abc import Mapping
from pathlib import Path

import pytest
from rich.console import Console

from modalkit.benchmarks.bench.report import show, write_files
from modalkit.benchmarks.bench.results import Results
from modalkit.benchmarks.containers.matrix import Cell, Figures, Variant, VariantResult, parse_matrix
from modalkit.benchmarks.containers.report import add_variant

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
def results() -> Results:
    """A matrix of which a part was measured and a part was not."""
    made = Results(target="modal:sentiment-dev/Model", settings={"matrix": MATRIX})
    cells = [
        Cell(concurrency=512, figures=figures(900.0, {"gone": 3})),
        Cell(concurrency=64, figures=figures(700.0), records=[{"count": 8}]),
    ]
    for result in (
        VariantResult(variant=Variant("T4", 8), device="Tesla T4", cold_start_s=12.5, cells=cells),
        VariantResult(variant=Variant("T4", 32), cells=[Cell(concurrency=64, error="it took [too] long")]),
        VariantResult(variant=Variant("T5", 8), error="there is no T5"),
    ):
        add_variant(made, result)
    return made


def test_everything_is_in_the_document_and_what_is_no_number_is_null(results: Results) -> None:
    document = results.document()
    assert document["settings"]["matrix"]["load"]["concurrency"] == [64, 512]
    first, second, third, fourth = document["cells"]
    assert first["variant"] == {"gpu": "T4", "max_batch_size": "8"}
    assert first["gpus"] == [{"name": "Tesla T4"}]
    assert first["figures"]["p99_ms"]["mean"] == 200
    assert first["server"]["batch_sizes"] == {"4": 50, "8": 100}
    assert second["records"] == [{"count": 8}]
    assert (third["answered"], third["load"]) == (0, "64 callers")
    assert fourth["load"] == "start"
    assert document["cold_start_s"] == {"gpu T4, max_batch_size 8": 12.5, "gpu T4, max_batch_size 32": None}


def test_the_table_has_a_line_for_each_cell_and_names_what_failed(results: Results, tmp_path: Path) -> None:
    document = results.document()
    console = Console(width=160, record=True)
    show(document, (), console)
    said = console.export_text()
    assert "gpu T4, max_batch_size 8, Modal, 512 callers: 3 x gone" in said
    assert "gpu T4, max_batch_size 32, Modal, 64 callers: 1 x it took [too] long" in said
    assert "gpu T5, max_batch_size 8, Modal, start: 1 x there is no T5" in said
    assert "512 callers: most items/s" not in said, "one was measured"
    write_files(document, (), tmp_path / "new" / "folder")
    assert "Tesla T4" in (tmp_path / "new" / "folder" / "results.html").read_text()
