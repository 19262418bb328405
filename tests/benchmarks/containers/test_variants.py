"""A service under load, in this process, what goes wrong with one, and what is written of a matrix."""

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import pytest
from rich.console import Console

from modalkit.batching import BatchRecord
from modalkit.benchmarks.bench.report import show, write_files
from modalkit.benchmarks.bench.results import Cell, Results
from modalkit.benchmarks.bench.server_side import Setup
from modalkit.benchmarks.containers import variants
from modalkit.benchmarks.containers.variants import (
    BATCH_LIMIT_VARIABLE,
    Matrix,
    OpenTarget,
    Target,
    Variant,
    VariantResult,
    measure_variant,
    parse_matrix,
)
from modalkit.benchmarks.corpus import mixed_length_texts
from modalkit.benchmarks.load import BenchError, Load
from modalkit.service.calls.engine import CallOptions
from modalkit.service.errors import RemoteCallError
from modalkit.service.settings import Settings
from tests.benchmarks.containers.here import opening_here
from tests.support.length_model import POISON

TEXTS = ["short", "a text that is rather longer"]


def matrix_of(*clients: int, seconds: float = 0.2, keeps_records: bool = False) -> Matrix:
    loads = [Load(clients=count, seconds=seconds, warm_up_s=0.05) for count in clients]
    return Matrix(variants=[Variant("here", 8)], loads=loads, keeps_records=keeps_records)


def measured(open_target: OpenTarget, matrix: Matrix, texts: Sequence[str] = TEXTS) -> VariantResult:
    items = [{"text": text} for text in texts]
    return anyio.run(measure_variant, matrix.variants[0], matrix, open_target, items)


def measured_here(model: str, matrix: Matrix, texts: Sequence[str] = TEXTS) -> VariantResult:
    return measured(opening_here(model), matrix, texts)


@pytest.mark.usefixtures("configured")
def test_each_number_of_callers_has_its_figures_and_records() -> None:
    result = measured_here("nothing", matrix_of(4, 40, keeps_records=True))
    assert result.cold_start_s is not None
    assert result.cold_start_s > 0
    assert [cell.load for cell in result.cells] == ["4 clients", "40 clients"]
    for cell in result.cells:
        assert not cell.errors
        assert cell.figures["p50_ms"].mean <= cell.figures["p99_ms"].mean
        assert cell.gpus[0]["name"]
        # Neither the first answer nor the warm-up counts.
        records: Any = cell.records
        assert sum(record.count for record in records) == cell.answered > 0
        assert cell.server is not None
        assert max(map(int, cell.server.batch_sizes)) <= 8


@pytest.mark.usefixtures("configured")
def test_a_real_model_on_texts_of_mixed_lengths_pads_and_predicts() -> None:
    (cell,) = measured_here("sentiment", matrix_of(16, seconds=0.5), mixed_length_texts(200)).cells
    assert cell.server is not None
    assert 0 < (cell.server.padding_share or 0) < 1
    assert cell.server.stages_s["predict"] > 0
    assert str(cell.server.engine).count("/") == 1
    assert 0 < (cell.server.utilisation or 0) <= 1
    assert not cell.records


@pytest.mark.usefixtures("configured")
def test_items_that_fail_are_counted_by_why_beside_those_that_succeed() -> None:
    (cell,) = measured_here("lengths", matrix_of(8), ["fine", POISON]).cells
    assert cell.answered > 0
    assert list(cell.errors) == ["ValueError: this batch is poisoned"]


@pytest.mark.usefixtures("configured")
@pytest.mark.parametrize(
    ("model", "text", "why"), [("lengths", "x" * 2000, "text"), ("unloadable", "a", "the weights are not there")]
)
def test_a_container_that_does_not_start_or_takes_no_texts_is_told(model: str, text: str, why: str) -> None:
    result = measured_here(model, matrix_of(8), [text])
    (cell,) = result.cells
    assert (cell.load, result.cold_start_s) == ("start", None)
    assert why in next(iter(cell.errors))


class FakeContainer:
    """Answers its first `calls_that_succeed` calls, hangs or fails for the others, and runs no batch by itself."""

    def __init__(self, calls_that_succeed: float = float("inf"), *, hangs: bool = False) -> None:
        self.client = self
        self.left, self.hangs = calls_that_succeed, hangs

    async def call(self, model_name: str, entries: Sequence[Any], options: CallOptions) -> Sequence[Mapping[str, Any]]:
        self.left -= 1
        if self.left < 0 and self.hangs:
            await anyio.sleep_forever()
        if self.left < 0:
            raise RemoteCallError("the call to Modal failed: gone")
        await anyio.lowlevel.checkpoint()
        return [{"status": "success"} for _ in entries]

    async def report(self) -> tuple[str, Setup, Sequence[BatchRecord]]:
        return "made up", Setup(None, 1), []


def errors_of(container: FakeContainer) -> list[str]:
    @asynccontextmanager
    async def open_it(_: Variant) -> AsyncIterator[Target]:
        yield container

    return [next(iter(cell.errors)) for cell in measured(open_it, matrix_of(4, 8, seconds=0.05)).cells]


def test_a_cell_in_which_nothing_succeeds_is_told_and_the_next_is_measured() -> None:
    assert errors_of(FakeContainer(1)) == ["nothing succeeded: the call to Modal failed: gone"] * 2


def test_batches_that_ran_elsewhere_are_no_figures() -> None:
    why = "another container than the one that was asked ran batches; measure it again"
    assert errors_of(FakeContainer()) == [why] * 2


def test_a_container_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(variants, "START_TIMEOUT_S", 0.01)
    assert errors_of(FakeContainer(0, hangs=True)) == ["there was no answer within 0.01 s"]


def test_a_cell_whose_last_answers_never_come_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(variants, "DRAIN_TIMEOUT_S", 0.01)
    assert errors_of(FakeContainer(1, hangs=True)) == ["not everything was answered within 0.11 s"] * 2


def test_each_gpu_is_measured_with_each_limit_under_each_number_of_callers() -> None:
    matrix = parse_matrix("T4, L4,T4", "8,32", "64,512", 20.0, keeps_records=True)
    assert matrix.variants == [Variant("T4", 8), Variant("T4", 32), Variant("L4", 8), Variant("L4", 32)]
    assert [(load.clients, load.seconds) for load in matrix.loads] == [(64, 20.0), (512, 20.0)]


@pytest.mark.parametrize(
    ("gpus", "batch_sizes", "concurrency", "seconds", "complaint"),
    [
        ("T4,,L4", "8", "64", 1.0, "--gpus 'T4,,L4': give names of GPUs"),
        ("T4", "8,all", "64", 1.0, "--batch-sizes '8,all': give numbers above 0, as 8,32"),
        ("T4", "0", "64", 1.0, "--batch-sizes '0': give numbers above 0, as 8,32"),
        ("T4", "8", "0", 1.0, "--concurrency '0': give numbers above 0, as 64,512"),
        ("T4", "8", "64", 0.0, "seconds must be above 0, not 0"),
    ],
)
def test_what_cannot_be_measured_is_refused_with_the_option(
    gpus: str, batch_sizes: str, concurrency: str, seconds: float, complaint: str
) -> None:
    with pytest.raises(BenchError, match=complaint):
        parse_matrix(gpus, batch_sizes, concurrency, seconds, keeps_records=False)


@pytest.mark.parametrize("name", [BATCH_LIMIT_VARIABLE, BATCH_LIMIT_VARIABLE.lower()])
def test_a_container_has_its_own_limit_and_all_else_as_deployed(name: str) -> None:
    deployed = {name: "16", "MODALKIT_APP_SETTINGS__BATCH_CONFIG__WAIT_MS": "5"}
    batch_config = Settings.load([], Variant("T4", 128).environment(deployed)).app_settings.batch_config
    assert batch_config.max_batch_size == 128
    assert batch_config.wait_ms == 5


@pytest.mark.usefixtures("configured")
def test_the_results_are_shown_and_written_as_those_of_bench(tmp_path: Path) -> None:
    matrix = matrix_of(4, seconds=0.1, keeps_records=True)
    cells: list[Cell] = [*measured_here("nothing", matrix).cells, *measured_here("unloadable", matrix).cells]
    results = Results(target="modal:app/Model", settings={"matrix": matrix})
    results.cells = [replace(cell, gpus=[{"name": "Tesla T4"}]) for cell in cells]
    console = Console(width=160, record=True)
    show(results.document(), (), console)
    assert "gpu here, max_batch_size 8, Modal, start: 1 x" in console.export_text()
    assert results.document()["cells"][0]["records"][0]["count"] >= 1
    write_files(results.document(), (), tmp_path / "new" / "folder")
    assert "Tesla T4" in (tmp_path / "new" / "folder" / "results.html").read_text()
