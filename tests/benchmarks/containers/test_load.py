"""A service under load, in this process, and what goes wrong with one."""

import math
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from importlib import metadata
from typing import Any

import anyio
import modal
import pytest
from pydantic_core import to_jsonable_python

from modalkit.batching import BatchRecord, Priority, SchedulerStatistics
from modalkit.batching.policy import DispatchReason
from modalkit.benchmarks.containers.load import ERRORS_IN_A_ROW, OpenTarget, Target, measure_variant
from modalkit.benchmarks.containers.matrix import Cell, Figures, Load, Variant, VariantResult
from modalkit.benchmarks.containers.measured import plain_record
from modalkit.benchmarks.corpus import mixed_length_texts
from modalkit.service.calls.engine import CallOptions
from modalkit.service.errors import RemoteCallError
from tests.benchmarks.containers.here import opening_here
from tests.support.length_model import POISON

TEXTS = ["short", "a text that is rather longer"]


def load(*concurrency: int, **options: Any) -> Load:
    return Load(concurrency=concurrency, **{"duration_s": 0.2, "warm_up_s": 0.05, **options})


def measure_here(model: str, load: Load, texts: Sequence[str] = TEXTS, limit: int = 8) -> VariantResult:
    return anyio.run(measure_variant, Variant("here", limit), load, opening_here(model), texts)


def figures_in(cell: Cell) -> Figures:
    assert cell.error is None
    assert cell.figures is not None
    return cell.figures


@pytest.mark.usefixtures("configured")
def test_it_runs_where_modals_client_is_no_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in Modal's containers, which get it as files."""
    known = metadata.Distribution.from_name

    def from_name(name: str) -> metadata.Distribution:
        if name == "modal":
            raise metadata.PackageNotFoundError(name)
        return known(name)

    monkeypatch.setattr(metadata.Distribution, "from_name", from_name)
    result = measure_here("nothing", load(4))
    assert result.error is None
    assert result.versions is not None
    assert result.versions["modal"] == modal.__version__


@pytest.mark.usefixtures("configured")
def test_each_number_of_callers_has_its_figures() -> None:
    result = measure_here("nothing", load(4, 40, keeps_records=True))
    assert result.error is None
    assert result.cold_start_s > 0
    assert result.device is not None
    assert result.versions is not None
    assert {"modalkit", "modal", "torch"} <= result.versions.keys()
    assert [cell.concurrency for cell in result.cells] == [4, 40]
    for cell in result.cells:
        figures = figures_in(cell)
        assert not figures.errors
        assert figures.items_per_s == pytest.approx(figures.answered / figures.elapsed_s)
        assert 0 < figures.latency_p50_s <= figures.latency_p95_s <= figures.latency_p99_s
        parts_s = figures.queue_s + figures.batch_s + figures.rest_s
        assert parts_s == pytest.approx(figures.latency_mean_s)
        # Neither the first answer nor the warm-up counts.
        assert sum(size * batches for size, batches in figures.batch_sizes.items()) == figures.answered
        assert sum(record["count"] for record in cell.records) == figures.answered
        assert max(figures.batch_sizes) <= 8


@pytest.mark.usefixtures("configured")
def test_a_real_model_on_texts_of_mixed_lengths_pads_and_predicts() -> None:
    cell = measure_here("sentiment", load(16, duration_s=0.5), mixed_length_texts(200)).cells[0]
    figures = figures_in(cell)
    assert not figures.errors
    assert 0 < figures.padding_share < 1
    assert 0 < figures.predict_share <= 1
    assert figures.batch_s > 0
    assert not cell.records


@pytest.mark.usefixtures("configured")
def test_items_that_fail_are_counted_by_why_beside_those_that_succeed() -> None:
    figures = figures_in(measure_here("lengths", load(8), ["fine", POISON]).cells[0])
    assert figures.answered > 0
    assert list(figures.errors) == ["ValueError: this batch is poisoned"]
    assert figures.failed > 0


@pytest.mark.usefixtures("configured")
def test_a_model_that_rejects_what_is_sent_is_told_at_the_start() -> None:
    result = measure_here("lengths", load(8), ["x" * 2000])
    assert not result.cells
    assert result.error is not None
    assert "text" in result.error
    assert math.isnan(result.cold_start_s)


@pytest.mark.usefixtures("configured")
def test_a_container_that_does_not_start_is_told() -> None:
    result = measure_here("unloadable", load(8))
    assert result.error is not None
    assert "the weights are not there" in result.error


class FakeContainer:
    """Answers each call after 10 ms of the clock at hand, or as a test has it; `statistics` are made up."""

    def __init__(self) -> None:
        self.client = self
        self.calls = 0
        self.fails_from = math.inf
        self.hangs_from = math.inf
        self.open_s = iter(range(1, 100))
        self.batches = 0

    async def call(self, model_name: str, entries: Sequence[Any], options: CallOptions) -> Sequence[Mapping[str, Any]]:
        self.calls += 1
        await anyio.sleep(math.inf if self.calls >= self.hangs_from else 0.01)
        if self.calls >= self.fails_from:
            raise RemoteCallError("the call to Modal failed: gone")
        self.batches += 1
        return [{"status": "success"} for _ in entries]

    async def report(self) -> Mapping[str, Any]:
        statistics = SchedulerStatistics(
            queued=dict.fromkeys(Priority, 0),
            work_s=dict.fromkeys(Priority, 0.0),
            oldest_s=dict.fromkeys(Priority, 0.0),
            running=0,
            accepted=0,
            succeeded=0,
            failed=0,
            expired=0,
            cancelled=0,
            refused=0,
            batch_sizes={4: self.batches} if self.batches else {},
            real_tokens=30 * self.batches,
            padded_tokens=40 * self.batches,
            busy_s=0.0,
            predict_s=0.004 * self.batches,
            open_s=next(self.open_s),
            stuck_threads=0,
        )
        record = BatchRecord(
            count=4,
            failed=0,
            priority=Priority.INTERACTIVE,
            reason=DispatchReason.FULL,
            real_tokens=30,
            padded_tokens=40,
            waits_s={Priority.INTERACTIVE: [0.001] * 4},
            preprocess_s=0.0,
            predict_s=0.004,
            postprocess_s=0.0,
            total_s=0.005,
            predicted_s=0.005,
            overlapped=False,
        )
        report: Mapping[str, Any] = to_jsonable_python(
            {"device": "made up", "statistics": statistics, "records": [plain_record(record)] if self.batches else []}
        )
        return report


def opening(container: FakeContainer) -> OpenTarget:
    @asynccontextmanager
    async def open_it(_: Variant) -> AsyncIterator[Target]:
        yield container

    def open_target(variant: Variant) -> AbstractAsyncContextManager[Target]:
        return open_it(variant)

    return open_target


def measure(container: FakeContainer, load: Load, virtual_time: tuple[str, dict[str, Any]]) -> VariantResult:
    backend, options = virtual_time
    return anyio.run(
        measure_variant,
        Variant("fake", 4),
        load,
        opening(container),
        TEXTS,
        backend=backend,
        backend_options=options,
    )


def test_the_callers_figures_are_those_of_the_clock(virtual_time: tuple[str, dict[str, Any]]) -> None:
    result = measure(FakeContainer(), load(4, duration_s=1.0), virtual_time)
    figures = figures_in(result.cells[0])
    assert figures.answered == 400
    assert figures.items_per_s == pytest.approx(400)
    assert figures.latency_p50_s == figures.latency_p99_s == pytest.approx(0.01)
    assert (figures.queue_s, figures.batch_s) == (0.001, 0.005)
    assert figures.rest_s == pytest.approx(0.004)
    # trio runs tasks in any order, so some lists go before all callers have come to theirs.
    lists = figures.batch_sizes[4]
    assert 100 <= lists < 400
    assert figures.mean_list_length == pytest.approx(400 / lists, rel=0.05)
    assert figures.padding_share == pytest.approx(0.25)
    assert figures.predict_share == pytest.approx(lists * 0.004)


def test_a_cell_in_which_nothing_succeeds_ends_early_and_the_next_is_measured(
    virtual_time: tuple[str, dict[str, Any]],
) -> None:
    container = FakeContainer()
    container.fails_from = 2
    result = measure(container, load(4, 8, duration_s=3600.0), virtual_time)
    assert [cell.error for cell in result.cells] == ["nothing succeeded: the call to Modal failed: gone"] * 2
    assert container.calls <= 1 + 2 * ERRORS_IN_A_ROW * (4 + 8)  # of the 360,000 that an hour has time for


def test_a_container_that_never_answers_is_given_up(virtual_time: tuple[str, dict[str, Any]]) -> None:
    container = FakeContainer()
    container.hangs_from = 1
    assert measure(container, load(4), virtual_time).error == ("UnmeasurableError: there was no answer within 900 s")


def test_a_cell_whose_last_answers_never_come_is_given_up(virtual_time: tuple[str, dict[str, Any]]) -> None:
    container = FakeContainer()
    container.hangs_from = 10
    cell = measure(container, load(4, duration_s=1.0, warm_up_s=1.0), virtual_time).cells[0]
    assert cell.error == "UnmeasurableError: not everything was answered within 122 s"


def test_figures_of_two_containers_are_not_mixed(virtual_time: tuple[str, dict[str, Any]]) -> None:
    container = FakeContainer()
    container.open_s = iter([1, 9, 2])
    cell = measure(container, load(4), virtual_time).cells[0]
    assert cell.error is not None
    assert "the container was replaced" in cell.error


def test_a_report_of_a_container_that_ran_nothing_is_no_figure(virtual_time: tuple[str, dict[str, Any]]) -> None:
    class Elsewhere(FakeContainer):
        async def report(self) -> Mapping[str, Any]:
            self.batches = 0
            return await super().report()

    cell = measure(Elsewhere(), load(4), virtual_time).cells[0]
    assert cell.error is not None
    assert "another one did" in cell.error
