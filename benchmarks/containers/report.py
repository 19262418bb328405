"""Shows what was measured: a table, JSON, a plot."""

import platform
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic_core import to_json
from rich import box
from rich.console import Console
from rich.table import Table

from modalkit.benchmarks.bench.plots import require_matplotlib
from modalkit.benchmarks.containers.matrix import Cell, Figures, Matrix, VariantResult

COLUMNS: Mapping[str, Callable[[Figures], str]] = {
    "items/s": lambda cell: f"{cell.items_per_s:,.0f}",
    "p50": lambda cell: _ms(cell.latency_p50_s),
    "p95": lambda cell: _ms(cell.latency_p95_s),
    "p99": lambda cell: _ms(cell.latency_p99_s),
    "queue": lambda cell: _ms(cell.queue_s),
    "batch": lambda cell: _ms(cell.batch_s),
    "rest": lambda cell: _ms(cell.rest_s),
    "a list": lambda cell: f"{cell.mean_list_length:.1f}",
    "a batch": lambda cell: f"{cell.mean_batch_size:.1f}",
    "predict": lambda cell: f"{cell.predict_share:.0%}",
    "padding": lambda cell: f"{cell.padding_share:.1%}",
    "errors": lambda cell: str(cell.failed),
}
PLOTTED: Mapping[str, Callable[[Figures], float]] = {
    "items/s": lambda cell: cell.items_per_s,
    "p95 latency [ms]": lambda cell: cell.latency_p95_s * 1000,
}


class Results:
    """The results so far of a matrix, kept in a folder: `results.json` and `results.png`.

    Raises `BenchError` at once where matplotlib is missing: what was measured has cost money by the time of the plot.
    """

    def __init__(self, matrix: Matrix, what: Mapping[str, Any], folder: Path) -> None:
        require_matplotlib("the plot")
        self._settings = {**what, "matrix": matrix}
        self._folder = folder
        self._results: list[VariantResult] = []

    def add(self, result: VariantResult) -> None:
        """Take in a result, and write all of them: a run that is broken off keeps what it has."""
        self._results.append(result)
        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / "results.json").write_bytes(self.as_json())
        _plot(self._results, self._folder / "results.png")

    def as_json(self) -> bytes:
        """Everything, and what it was measured with; what is not a number is null."""
        document = {
            "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "python": platform.python_version(),
            "settings": self._settings,
            "results": self._results,
        }
        return to_json(document, indent=2, inf_nan_mode="null") + b"\n"

    def print(self, console: Console) -> None:
        """Print a line for each cell, and below what failed."""
        table = Table(
            box=box.SIMPLE_HEAD, padding=0, caption="p50 to rest in ms; queue, batch and rest are the mean latency"
        )
        for heading in ("GPU", "limit", "callers", *COLUMNS, "start s"):
            table.add_column(heading, justify="left" if heading == "GPU" else "right", no_wrap=True)
        for result in self._results:
            for cell in result.cells:
                if cell.figures is not None:
                    table.add_row(*_row(result, cell, cell.figures))
            table.add_section()
        console.print(table)
        for line in _what_failed(self._results):
            console.print(line, markup=False)


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:,.0f}" if seconds >= 0.1 else f"{seconds * 1000:.1f}"


def _row(result: VariantResult, cell: Cell, figures: Figures) -> list[str]:
    first = cell is result.cells[0]
    return [
        result.variant.gpu,
        str(result.variant.max_batch_size),
        str(cell.concurrency),
        *(show(figures) for show in COLUMNS.values()),
        f"{result.cold_start_s:.1f}" if first else "",
    ]


def _what_failed(results: Sequence[VariantResult]) -> list[str]:
    lines = []
    for result in results:
        name = f"{result.variant.gpu}, batches of at most {result.variant.max_batch_size}"
        if result.error is not None:
            lines.append(f"{name}: {result.error}")
        for cell in result.cells:
            errors = {} if cell.figures is None else cell.figures.errors
            lines += [f"{name}, {cell.concurrency} callers: {count} x {error}" for error, count in errors.items()]
            lines += [] if cell.error is None else [f"{name}, {cell.concurrency} callers: {cell.error}"]
    return lines


def _plot(results: Sequence[VariantResult], path: Path) -> None:
    """A column for each GPU, a line for each batch limit."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    gpus = list(dict.fromkeys(result.variant.gpu for result in results))
    figure = Figure(figsize=(1 + 4.5 * len(gpus), 7), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(PLOTTED), len(gpus), squeeze=False, sharex=True, sharey="row")
    for axes_of_gpus, (title, value) in zip(grid, PLOTTED.items(), strict=True):
        for axes, gpu in zip(axes_of_gpus, gpus, strict=True):
            for result in results:
                if result.variant.gpu == gpu:
                    _line(axes, result, value)
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter("{x:g}")
            axes.grid(alpha=0.3)
        # Once, when all lines are there: it ends the scaling of the axis that the panels share.
        axes_of_gpus[0].set_ylim(bottom=0)
        axes_of_gpus[0].set_ylabel(title)
    for axes, gpu in zip(grid[0], gpus, strict=True):
        devices = {result.device for result in results if result.variant.gpu == gpu and result.device is not None}
        axes.set_title(f"{gpu}\n{', '.join(sorted(devices)) or 'not measured'}", fontsize="medium")
        if axes.get_lines():
            axes.legend(title="batches of at most", fontsize="small")
    for axes in grid[-1]:
        axes.set_xlabel("callers")
    figure.savefig(path, dpi=100)


def _line(axes: Any, result: VariantResult, value: Callable[[Figures], float]) -> None:
    measured = [(cell.concurrency, value(cell.figures)) for cell in result.cells if cell.figures is not None]
    if measured:
        axes.plot(*zip(*sorted(measured), strict=True), marker="o", markersize=4, label=result.variant.max_batch_size)
