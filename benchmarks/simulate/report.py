"""Shows the results of the studies: tables for a terminal, and JSON."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from modalkit.benchmarks.simulate.devices import MODALKIT
from modalkit.benchmarks.simulate.regret import ALL_ITEMS, CALLERS, FIRST_ITEMS, Regret
from modalkit.benchmarks.simulate.study import CLOSED_LOOP, Cell, DeviceResult, Settings, as_json
from modalkit.benchmarks.simulate.workload import ArrivalKind
from modalkit.benchmarks.tables import terminal_table

LINES_TO_DEPTH = 4  # of JSON: so that each cell of a device has a line
FIRST_TARGET, ALL_TARGET = 0.8, 0.95


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
    load = "callers" if arrivals == CLOSED_LOOP else "load"
    columns = ("rule", load, "/s", "of capacity", "busy", "padding", "batch", "p50 ms", "p99 ms", "p99.9 ms")
    rows = [_row(cell, result.capacity) for cell in result.cells if cell.arrivals == arrivals]
    title = f"{result.device}, {arrivals} (capacity {result.capacity:,.0f}/s)"
    return terminal_table((*columns, "longest", "away"), rows, title=title)


def _row(cell: Cell, capacity: float) -> list[str]:
    summary = cell.summary
    return [
        f"[bold]{cell.rule}[/]" if cell.rule == MODALKIT else cell.rule,
        f"{cell.load:.0f}" if cell.arrivals == CLOSED_LOOP else f"{cell.load:.0%}",
        f"{summary.throughput:,.1f}",
        f"{summary.throughput / capacity:.2f}",
        f"{summary.utilisation:.0%}",
        f"{summary.padding:.1%}",
        f"{summary.mean_batch_size:.1f}",
        *(f"{seconds * 1000:,.1f}" for seconds in (summary.all.p50_s, summary.all.p99_s, summary.all.p999_s)),
        f"{summary.longest_s * 1000:,.0f}",
        f"{summary.turned_away:.0%}",
    ]


def _claims(results: Sequence[DeviceResult]) -> Table:
    columns = ("device", "arrivals", "FIFO /s", "its p99 ms", "our p99 ms", "ratio", "least possible", "ours / that")
    rows = [
        [
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
        ]
        for result in results
        for claim in result.claims
    ]
    title = "At 70 % of the fixed-window FIFO's own capacity, and of ours"
    return terminal_table((*columns, "alone", "our /s", "p99 ms there"), rows, title=title, left=2)


def _promises(results: Sequence[DeviceResult]) -> Table:
    rows = [
        [
            result.device,
            f"{result.promises.bulk_share:.1%}",
            str(result.promises.overtaken),
            f"{result.promises.fresh_backlog:.3f}",
            f"{result.promises.overdue_backlog:.3f}",
            f"{result.promises.overdue_backlog / result.promises.fresh_backlog:.3f}",
        ]
        for result in results
    ]
    columns = ("device", "bulk's share under overload", "overtaken", "backlog, fresh", "an hour old", "ratio")
    return terminal_table(columns, rows, title="Fairness")


def print_regrets(regrets: Sequence[Regret], console: Console) -> None:
    """A line for each structure and mix of sizes, with a mark where a target is missed."""
    rows = [
        [
            regret.structure,
            regret.mix,
            _share(regret.first, FIRST_TARGET),
            _share(regret.all, ALL_TARGET),
            f"{regret.callers:.2f}",
            f"{regret.waiting:.2f}",
            str(regret.batches),
        ]
        for regret in regrets
    ]
    columns = ("structure", "sizes", f"{FIRST_ITEMS} items", f"{ALL_ITEMS} items", f"{CALLERS} callers", "mean wait")
    title = "Throughput from a cold start, as a share of the best fixed batch size"
    console.print(terminal_table((*columns, "batches"), rows, title=title, left=2))
    missed = sum(regret.first < FIRST_TARGET or regret.all < ALL_TARGET for regret in regrets)
    console.print(f"{missed} of {len(regrets)} miss a target (>= {FIRST_TARGET}, >= {ALL_TARGET}).")


def _share(value: float, target: float) -> str:
    return f"{value:.2f}" if value >= target else f"{value:.2f} !"


def write_results(settings: Settings, results: Sequence[DeviceResult], file: Path) -> None:
    """Write everything as JSON."""
    file.write_text(_as_text(as_json(settings, results)) + "\n", encoding="utf-8")


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
