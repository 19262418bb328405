"""Interactive requests beside a long backlog of jobs: how each affects the other."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from modalkit.batching import Priority
from modalkit.benchmarks.simulate.devices import Device, planner
from modalkit.benchmarks.simulate.engine import Run, Simulation
from modalkit.benchmarks.simulate.workload import OpenLoop, draw_sizes, poisson
from modalkit.benchmarks.tables import terminal_table

RATES = (0.08, 0.25, 0.4)
"""Interactive requests, as shares of the device's capacity: about 20, 60 and 100 a second on the measured CPU."""


@dataclass(frozen=True, slots=True)
class Mix:
    """One rate of interactive requests on one device."""

    device: str
    rate: float
    """Interactive requests per second."""
    p99_alone_s: float
    """Without jobs."""
    p99_s: float
    """Beside a backlog of jobs."""
    throughput: float
    """Interactive requests and jobs per second together, as a share of the rate of jobs alone."""


def mix(device: Device, share: float, interactive: int, seed: int = 1) -> Mix:
    """Send `interactive` requests beside a backlog that takes longer than they do."""
    rate = share * device.capacity
    random = np.random.default_rng(seed)
    arrivals_s = poisson(rate, interactive, random)
    sizes = draw_sizes(interactive, random)
    alone = _run(device, arrivals_s, sizes, 0, seed)
    jobs = round(1.2 * device.capacity * float(arrivals_s[-1]))
    both = _run(device, arrivals_s, sizes, jobs, seed)
    end_s = float(arrivals_s[-1])
    only_jobs = _run(device, arrivals_s[:0], sizes[:0], jobs, seed)
    return Mix(
        device=device.table.name,
        rate=rate,
        p99_alone_s=_p99_s(alone),
        p99_s=_p99_s(both),
        throughput=float((both.finished_s <= end_s).sum()) / float((only_jobs.finished_s <= end_s).sum()),
    )


def mix_table(mixes: Sequence[Mix]) -> Table:
    """A line for each device and rate."""
    rows = []
    for one in mixes:
        alone_ms, both_ms = 1000 * one.p99_alone_s, 1000 * one.p99_s
        figures = (f"{one.rate:.0f}", f"{alone_ms:.1f}", f"{both_ms:.1f}", f"{both_ms / alone_ms:.2f}")
        rows.append([one.device, *figures, f"{one.throughput:.2f}"])
    columns = ("device", "requests/s", "p99 alone [ms]", "p99 [ms]", "ratio", "throughput beside jobs alone")
    return terminal_table(columns, rows, title="Interactive requests beside a backlog of jobs")


def _run(device: Device, arrivals_s: NDArray[np.float64], sizes: NDArray[np.int64], jobs: int, seed: int) -> Run:
    times_s = np.concatenate([np.zeros(jobs), arrivals_s])
    bulk_sizes = draw_sizes(jobs, np.random.default_rng(seed + 1))
    priorities = [Priority.BULK] * jobs + [Priority.INTERACTIVE] * len(arrivals_s)
    source = OpenLoop(times_s, np.concatenate([bulk_sizes, sizes]), priorities)
    rule = planner(device.table, device.noise)
    return Simulation(rule, source, device.table.seconds, noise=device.noise, seed=seed).run()


def _p99_s(run: Run) -> float:
    seconds = (run.finished_s - run.arrivals_s)[~run.is_bulk]
    return float(np.quantile(seconds, 0.99))
