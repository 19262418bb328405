"""The batches of modalkit beside those of razors-edge-batching-scheduler, in simulation; prints JSON.

Runs in the environment that has the package: ``make bench-peers`` starts it.
"""

import json
from collections.abc import Callable
from functools import partial
from typing import Annotated

import numpy as np
import typer

from modalkit.benchmarks.simulate.devices import MODALKIT, backlog_rate, offline_rate, planner, simulate
from modalkit.benchmarks.simulate.engine import Rule
from modalkit.benchmarks.simulate.razors_edge import STRATEGIES, RazorsEdge
from modalkit.benchmarks.simulate.tables import load_table
from modalkit.benchmarks.simulate.workload import ClosedLoop, OpenLoop, draw_sizes, poisson

DEVICES = ("cpu-2-cores", "t4-torchscript")
NOISE = 0.05
CALLERS = 64
LOAD = 0.7
SEED = 1


def main(requests: Annotated[int, typer.Option(help="Requests of each simulation.")] = 4_000) -> None:
    """Print the figures of each rule on each device; rates as shares of the best offline loop."""
    found: dict[str, dict[str, float]] = {}
    for device in DEVICES:
        table = load_table(device)
        capacity = offline_rate(table)
        rules: dict[str, Callable[[], Rule]] = {MODALKIT: partial(planner, table, NOISE)}
        rules |= {f"razors-edge, {strategy}": partial(RazorsEdge, table, strategy) for strategy in STRATEGIES}
        dice = np.random.default_rng(SEED)
        sizes, arrivals_s = draw_sizes(requests, dice), poisson(LOAD * capacity, requests, dice)
        for name, make in rules.items():
            closed = simulate(make(), ClosedLoop(CALLERS, sizes), table, NOISE, SEED)
            opened = simulate(make(), OpenLoop(arrivals_s, sizes), table, NOISE, SEED)
            latencies_ms = (opened.finished_s - opened.arrivals_s) * 1000
            figures = found.setdefault(name, {})
            figures[f"{device}: backlog"] = backlog_rate(make(), table, requests, NOISE) / capacity
            figures[f"{device}: {CALLERS} callers"] = requests / float(np.nanmax(closed.finished_s)) / capacity
            figures[f"{device}: p99 at {LOAD:.0%}, ms"] = float(np.quantile(latencies_ms, 0.99))
    print(json.dumps(found))


if __name__ == "__main__":
    typer.run(main)
