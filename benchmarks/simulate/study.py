"""The whole study: each rule on each device, with each arrival process and load."""

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache, partial
from typing import Any

import numpy as np

from modalkit.benchmarks.simulate.bound import least_p99_s
from modalkit.benchmarks.simulate.devices import FIXED_WINDOW, MAX_BATCH_SIZE, MODALKIT, Device, make_device
from modalkit.benchmarks.simulate.fairness import Promises, check
from modalkit.benchmarks.simulate.metrics import Summary, summarize
from modalkit.benchmarks.simulate.workload import ArrivalKind, corpus_sizes

LOADS = (0.05, 0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2)
CALLERS = (1, 16, 64, 256)
QUICK_LOADS = (0.2, 0.7)
QUICK_CALLERS = (16,)
CLAIMED_LOAD = 0.7
QUEUE_ITEMS = 10_000


@dataclass(frozen=True, slots=True)
class Settings:
    """Which simulations run, and how long."""

    devices: Sequence[str]
    requests: int
    noise: float
    seed: int
    loads: Sequence[float] = LOADS
    callers: Sequence[int] = CALLERS


@dataclass(frozen=True, slots=True)
class Cell:
    """One simulation of the study, in an open loop at `load`, or in a closed loop with `load` callers."""

    device: str
    rule: str
    arrivals: str
    load: float
    """The rate of arrivals as a share of the device's capacity; the number of callers in a closed loop."""
    summary: Summary


@dataclass(frozen=True, slots=True)
class Claim:
    """Latencies at 70 % of the capacity of a rule."""

    device: str
    arrivals: str
    fifo_rate: float
    """The capacity of the fixed-window FIFO, in requests per second."""
    fifo_p99_s: float
    p99_s: float
    """That of the planner at the same rate."""
    least_p99_s: float
    """The lower bound for any rule at that rate; see `modalkit.benchmarks.simulate.bound`."""
    alone_p99_s: float
    """The 99th percentile of the seconds of a request alone on an idle device: a lower bound for any rule."""
    own_rate: float
    """The capacity of the planner."""
    p50_at_own_s: float
    """That of the planner at 70 % of its own capacity."""
    p99_at_own_s: float


@dataclass(frozen=True, slots=True)
class DeviceResult:
    """The results of the study on a device."""

    device: str
    source: str
    capacity: float
    settings: dict[str, str]
    backlog_rates: dict[str, float]
    """Requests per second of each rule when all wait from the start."""
    claims: list[Claim]
    promises: Promises
    cells: list[Cell]


CLOSED_LOOP = "closed loop"

cached_device = cache(make_device)


def run_study(settings: Settings, jobs: int) -> list[DeviceResult]:
    """Simulate everything, on `jobs` processes."""
    tasks = [(name, arrivals) for name in settings.devices for arrivals in (*ArrivalKind, CLOSED_LOOP)]
    if jobs == 1:
        parts = [_cells(settings, *task) for task in tasks]
        rests = [_rest(settings, name) for name in settings.devices]
    else:
        with ProcessPoolExecutor(jobs) as pool:
            pending = [pool.submit(_cells, settings, *task) for task in tasks]
            rests = list(pool.map(partial(_rest, settings), settings.devices))
            parts = [future.result() for future in pending]
    results = []
    for name, (backlog_rates, claims, promises) in zip(settings.devices, rests, strict=True):
        device = cached_device(name, settings.noise)
        cells = [cell for part in parts for cell in part if cell.device == name]
        results.append(
            DeviceResult(
                name, device.table.source, device.capacity, device.settings, backlog_rates, claims, promises, cells
            )
        )
    return results


def as_json(settings: Settings, results: Sequence[DeviceResult]) -> dict[str, Any]:
    """Settings and results, in JSON types."""
    return {"settings": asdict(settings), "devices": [asdict(result) for result in results]}


def _cells(settings: Settings, name: str, arrivals: str) -> list[Cell]:
    device = cached_device(name, settings.noise)
    loads = settings.callers if arrivals == CLOSED_LOOP else settings.loads
    return [
        Cell(name, rule, arrivals, load, _run(device, rule, arrivals, load, settings))
        for load in loads
        for rule in device.rules
    ]


def _run(device: Device, rule: str, arrivals: str, load: float, settings: Settings) -> Summary:
    source = (
        device.closed_loop(int(load), settings.requests, settings.seed)
        if arrivals == CLOSED_LOOP
        else device.open_loop(ArrivalKind(arrivals), load * device.capacity, settings.requests, settings.seed)
    )
    return summarize(device.run(rule, source, settings.seed, QUEUE_ITEMS))


def _rest(settings: Settings, name: str) -> tuple[dict[str, float], list[Claim], Promises]:
    device = cached_device(name, settings.noise)
    rates = {rule: device.backlog_rate(rule, settings.requests, settings.seed) for rule in device.rules}
    fifo_rate, own_rate = rates[FIXED_WINDOW], rates[MODALKIT]
    alone_p99_s = float(np.quantile([device.table.seconds(1, size) for size in corpus_sizes().tolist()], 0.99))
    claims = []
    for kind in ArrivalKind:

        def at(rule: str, rate: float, kind: ArrivalKind = kind) -> Summary:
            return _run(device, rule, kind, CLAIMED_LOAD * rate / device.capacity, settings)

        own = at(MODALKIT, own_rate).all
        fifo_p99_s, p99_s = at(FIXED_WINDOW, fifo_rate).all.p99_s, at(MODALKIT, fifo_rate).all.p99_s
        load = device.open_loop(kind, CLAIMED_LOAD * fifo_rate, settings.requests, settings.seed)
        least_s = least_p99_s(device.table, load, MAX_BATCH_SIZE)
        claims.append(
            Claim(name, kind, fifo_rate, fifo_p99_s, p99_s, least_s, alone_p99_s, own_rate, own.p50_s, own.p99_s)
        )
    return rates, claims, check(device, settings.requests, settings.seed)
