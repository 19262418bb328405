"""Shows the results of a study: tables for a terminal, JSON, plots."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from modalkit.benchmarks.simulate.devices import MODALKIT
from modalkit.benchmarks.simulate.metrics import Summary
from modalkit.benchmarks.simulate.study import CLOSED_LOOP, Cell, DeviceResult, Settings, as_json
from modalkit.benchmarks.simulate.workload import ArrivalKind

LINES_TO_DEPTH = 4  # of JSON: so that each cell of a device has a line

PLOTTED: dict[str, Callable[[Summary, float], float]] = {
    "throughput / capacity": lambda summary, capacity: summary.throughput / capacity,
    "p50 [ms]": lambda summary, _: summary.all.p50_s * 1000,
    "p99 [ms]": lambda summary, _: summary.all.p99_s * 1000,
    "padding": lambda summary, _: summary.padding,
}


def print_results(results: Sequence[DeviceResult], console: Console) -> None:
    """Print a table for each device and arrival process, the claims and the promises."""
    for result in results:
        for arrivals in (*ArrivalKind, CLOSED_LOOP):
            console.print(_table(result, arrivals))
    console.print(_claims(results))
    console.print(_promises(results))
    summaries = [cell.summary for result in results for cell in result.cells]
    console.print(
        f"{len(summaries)} simulations, {sum(summary.requests for summary in summaries) / 1e6:.2f} million requests, "
        f"{sum(summary.virtual_s for summary in summaries) / 3600:.1f} hours of virtual time"
    )


def _table(result: DeviceResult, arrivals: str) -> Table:
    unit = "callers" if arrivals == CLOSED_LOOP else "load"
    table = Table(title=f"{result.device}, {arrivals} (capacity {result.capacity:,.0f}/s)")
    columns = (
        unit,
        "rule",
        "/s",
        "of capacity",
        "busy",
        "padding",
        "batch",
        "p50 ms",
        "p99 ms",
        "p99.9 ms",
        "longest",
        "away",
    )
    for column in columns:
        table.add_column(column, justify="left" if column == "rule" else "right")
    previous = None
    for cell in result.cells:
        if cell.arrivals == arrivals:
            if previous not in (None, cell.load):
                table.add_section()
            table.add_row(*_row(cell, result.capacity), style="bold" if cell.rule == MODALKIT else None)
            previous = cell.load
    return table


def _row(cell: Cell, capacity: float) -> list[str]:
    summary = cell.summary
    return [
        f"{cell.load:.0f}" if cell.arrivals == CLOSED_LOOP else f"{cell.load:.0%}",
        cell.rule,
        f"{summary.throughput:,.1f}",
        f"{summary.throughput / capacity:.2f}",
        f"{summary.utilisation:.0%}",
        f"{summary.padding:.1%}",
        f"{summary.mean_batch_size:.1f}",
        f"{summary.all.p50_s * 1000:,.1f}",
        f"{summary.all.p99_s * 1000:,.1f}",
        f"{summary.all.p999_s * 1000:,.1f}",
        f"{summary.longest_s * 1000:,.0f}",
        f"{summary.turned_away:.0%}",
    ]


def _claims(results: Sequence[DeviceResult]) -> Table:
    table = Table(title="At 70 % of the fixed-window FIFO's own capacity, and of ours")
    for column in (
        "device",
        "arrivals",
        "FIFO /s",
        "its p99 ms",
        "our p99 ms",
        "ratio",
        "least possible",
        "ours / that",
        "alone",
        "our /s",
        "p99 ms there",
    ):
        table.add_column(column, justify="left" if column in ("device", "arrivals") else "right")
    for claim in (claim for result in results for claim in result.claims):
        table.add_row(
            claim.device,
            claim.arrivals,
            f"{claim.fifo_rate:,.1f}",
            f"{claim.fifo_p99_s * 1000:,.1f}",
            f"{claim.p99_s * 1000:,.1f}",
            f"{claim.p99_s / claim.fifo_p99_s:.2f}",
            f"{claim.least_p99_s * 1000:,.1f}",
            f"{claim.p99_s / claim.least_p99_s:.2f}",
            f"{claim.alone_p99_s * 1000:,.1f}",
            f"{claim.own_rate:,.1f}",
            f"{claim.p99_at_own_s * 1000:,.1f}",
        )
    return table


def _promises(results: Sequence[DeviceResult]) -> Table:
    table = Table(title="Fairness")
    for column in ("device", "bulk's share under overload", "overtaken", "backlog, fresh", "an hour old", "ratio"):
        table.add_column(column, justify="left" if column == "device" else "right")
    for result in results:
        promises = result.promises
        table.add_row(
            result.device,
            f"{promises.bulk_share:.1%}",
            str(promises.overtaken),
            f"{promises.fresh_backlog:.3f}",
            f"{promises.overdue_backlog:.3f}",
            f"{promises.overdue_backlog / promises.fresh_backlog:.3f}",
        )
    return table


def write_results(settings: Settings, results: Sequence[DeviceResult], folder: Path) -> None:
    """Write `results.json` and a plot for each device into `folder`, creating it if needed."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(_as_text(as_json(settings, results)) + "\n", encoding="utf-8")
    for result in results:
        _plot(result, folder / f"{result.device}.png")


def _as_text(value: Any, depth: int = 0) -> str:
    """JSON with one line per part of the study and six digits per number; NaN becomes null."""
    if isinstance(value, float):
        return "null" if math.isnan(value) else f"{value:.6g}"
    if isinstance(value, dict):
        items = [f"{json.dumps(key)}: {_as_text(item, depth + 1)}" for key, item in value.items()]
    elif isinstance(value, list | tuple):
        items = [_as_text(item, depth + 1) for item in value]
    else:
        return json.dumps(value)
    separator = ",\n" if depth < LINES_TO_DEPTH else ", "
    return ("{%s}" if isinstance(value, dict) else "[%s]") % separator.join(items)


def _plot(result: DeviceResult, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, 7), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(ArrivalKind), len(PLOTTED), squeeze=False)
    for row, arrivals in zip(grid, ArrivalKind, strict=True):
        for axes, (title, value) in zip(row, PLOTTED.items(), strict=True):
            for rule in result.backlog_rates:
                cells = [cell for cell in result.cells if cell.arrivals == arrivals and cell.rule == rule]
                axes.plot(
                    [cell.load for cell in cells],
                    [value(cell.summary, result.capacity) for cell in cells],
                    marker=".",
                    linewidth=2.5 if rule == MODALKIT else 1.2,
                    label=rule,
                )
            axes.set(title=f"{arrivals}: {title}", xlabel="load / capacity")
            axes.grid(alpha=0.3)
            if title.endswith("[ms]"):
                axes.set_yscale("log")
    grid[0][0].legend(fontsize="small")
    figure.suptitle(f"{result.device}: capacity {result.capacity:,.0f} requests/s")
    figure.savefig(path, dpi=70)
