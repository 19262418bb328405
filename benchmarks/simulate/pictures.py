"""The pictures of docs/batching.md: ``python -m modalkit.benchmarks.simulate pictures docs/pictures``."""

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from modalkit.batching import Batch
from modalkit.benchmarks.simulate.devices import FIXED_WINDOW, MODALKIT, planner
from modalkit.benchmarks.simulate.engine import Rule, Simulation
from modalkit.benchmarks.simulate.rules import FixedWindow
from modalkit.benchmarks.simulate.tables import CPU, CostTable, load_table
from modalkit.benchmarks.simulate.workload import ArrivalKind, IndexedRequest, OpenLoop, draw_sizes

REQUESTS, SEED = 64, 4
DEVICE_TITLES = {"cpu-2-cores": "two CPU cores", "t4-torchscript": "NVIDIA T4", "a100-torchscript": "NVIDIA A100"}
RULES = {MODALKIT: "modalkit", FIXED_WINDOW: "at most 32, or 10 ms, in order of arrival", "no batching": "no batching"}

RanBatch = tuple[float, list[int]]
"""When a batch started, and the sizes of its requests."""


def draw_batches(path: Path) -> None:
    """Draw the batches that two rules form of the same texts, which wait from the start, on two CPU cores."""
    table = load_table(CPU)
    rules: dict[str, Rule] = {
        "in order of arrival, 32 at a time": FixedWindow(32, 0.01),
        "modalkit": planner(table, noise=0.0),
    }
    figure = _figure(9, 4.6)
    rows = figure.subplots(len(rules), 1, sharex=True, sharey=True)
    for axes, (title, rule) in zip(rows, rules.items(), strict=True):
        batches, end_s = _run(rule, table)
        _draw_timeline(axes, batches, table)
        computed = sum(len(sizes) * max(sizes) for _, sizes in batches)
        padding = 1 - sum(sum(sizes) for _, sizes in batches) / computed
        axes.set_title(f"{title}: {end_s:.2f} s, {padding:.0%} padding", loc="left", fontsize=10)
        axes.set_ylabel("tokens of a text")
    rows[-1].set_xlabel("seconds")
    figure.savefig(path, dpi=90)


def _run(rule: Rule, table: CostTable) -> tuple[list[RanBatch], float]:
    batches: list[RanBatch] = []

    def record(now: float, batch: Batch[IndexedRequest]) -> None:
        batches.append((now, [request.size for request in batch.requests]))

    source = OpenLoop(np.zeros(REQUESTS), draw_sizes(REQUESTS, np.random.default_rng(SEED)))
    run = Simulation(rule, source, table.seconds, on_batch=record).run()
    return batches, float(run.finished_s.max())


def _draw_timeline(axes: Any, batches: list[RanBatch], table: CostTable) -> None:
    """Each batch is as wide as it takes time; each of its texts is a bar in it, with its padding in grey."""
    for start_s, sizes in batches:
        width = table.seconds(len(sizes), max(sizes)) / len(sizes)
        starts = start_s + width * np.arange(len(sizes))
        padding = max(sizes) - np.array(sizes)
        axes.bar(starts, sizes, width, align="edge", color="#3465a4")
        axes.bar(starts, padding, width, bottom=sizes, align="edge", color="#c9c9c9")
        axes.axvline(start_s, color="black", linewidth=0.6)


def draw_latencies(path: Path) -> None:
    """Draw p99 over the load by the results of the whole study (`results/results.json`), for three devices."""
    stored = files("modalkit.benchmarks.simulate") / "results" / "results.json"
    devices = {device["device"]: device for device in json.loads(stored.read_text(encoding="utf-8"))["devices"]}
    figure = _figure(9, 3.4)
    for axes, (name, title) in zip(figure.subplots(1, len(DEVICE_TITLES)), DEVICE_TITLES.items(), strict=True):
        for rule, label in RULES.items():
            cells = [
                cell
                for cell in devices[name]["cells"]
                if cell["arrivals"] == ArrivalKind.POISSON and cell["rule"] == rule
            ]
            p99_ms = [cell["summary"]["all"]["p99_s"] * 1000 for cell in cells]
            axes.plot([cell["load"] for cell in cells], p99_ms, marker=".", label=label)
        axes.set(title=title, xlabel="load / capacity", yscale="log", xlim=(0, 1.25))
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("p99 [ms]")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(RULES))
    figure.savefig(path, dpi=90)


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
