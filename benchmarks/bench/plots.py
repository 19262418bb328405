"""Draws the charts into PNG files, with matplotlib; without it, there are none."""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from modalkit.benchmarks.bench.charts import Chart, charts_of
from modalkit.benchmarks.load import BenchError
from modalkit.pipelines.extras import install_command


def require_matplotlib(what: str) -> None:
    """Raise `BenchError` where matplotlib is not installed: before anything is measured, which takes time."""
    if find_spec("matplotlib") is None:
        raise BenchError(f"{what} needs matplotlib: {install_command('bench')}")


def write_plots(document: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write a PNG file for each chart, where matplotlib is installed."""
    if find_spec("matplotlib") is None:
        return []
    paths = []
    for chart in charts_of(document):
        paths.append(folder / f"{chart.name}.png")
        _draw(chart, paths[-1])
    return paths


def _draw(chart: Chart, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    width = 0.8 / max(1, len(chart.series))
    for index, series in enumerate(chart.series):
        xs, ys = [x for x, _ in series.points], [y for _, y in series.points]
        if chart.bars:
            axes.bar([x + width * (index + 0.5) - 0.4 for x in xs], ys, width, label=series.name)
        else:
            axes.plot(xs, ys, marker="o", markersize=3, label=series.name)
    if chart.bars:
        axes.set_xticks(range(len(chart.bars)), chart.bars)
    if chart.x_ticks:
        axes.set_xticks([place for place, _ in chart.x_ticks], [name for _, name in chart.x_ticks])
    if chart.log_y:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
    else:
        axes.set_ylim(bottom=0)
    axes.set(title=chart.title, xlabel=chart.x_label, ylabel=chart.y_label)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
