"""Searches: the capacity of a target, and the highest rate whose 99th percentile keeps a limit.

Of jobs, the capacity is what is delivered, and the percentile that of the time until the delivery.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from modalkit.benchmarks.bench.results import MAX_FAILED_SHARE, Cell
from modalkit.benchmarks.load import Load

FIRST_CLIENTS = 8
MAX_CLIENTS = 1024
MIN_GAIN = 1.05
"""More clients must raise the throughput at least so much."""
CONFIRMATIONS = 2
"""Steps that may not do so before the search ends: one of them may be by chance."""
HIGHEST_SHARE = 1.2
"""Of the capacity; a higher rate is not tried. Closed loops may find too low a capacity."""
RATE_STEPS = 6
FIRST_SHARE = 0.7
KEPT_UP_SHARE = 0.95
"""Of what is due, that is answered in the measured time where a rate is kept up with."""
LOWEST_SHARE = 0.02
"""Of the capacity; a lower rate is not tried."""

Measure = Callable[[Load], Cell]


def find_capacity(measure: Measure, load: Load, list_length: int = 1) -> tuple[list[Cell], dict[str, Any]]:
    """Double the clients until the throughput no longer grows in two steps. Returns all cells, and the finding."""
    cells: list[Cell] = []
    clients, level_steps = FIRST_CLIENTS, 0
    best: Cell | None = None
    while clients <= MAX_CLIENTS:
        cell = measure(replace(load, clients=clients, rate_per_s=None, arrivals="poisson"))
        cells.append(cell)
        grows = best is None or _rate(cell) > MIN_GAIN * _rate(best)
        level_steps = 0 if grows else level_steps + 1
        if best is None or _rate(cell) > _rate(best):
            best = cell
        if level_steps == CONFIRMATIONS or cell.limited:
            break
        clients *= 2
    found = {
        "search": "capacity",
        "variant": cells[0].variant,
        "items_per_s": 0.0 if best is None else _rate(best),
        "load": "" if best is None else best.load,
        "engine": _engine(best),
        "list_length": list_length,
    }
    return cells, found


def find_rate(
    measure: Measure, load: Load, p99_ms: float, capacity_items_per_s: float, list_length: int = 1
) -> tuple[list[Cell], dict[str, Any]]:
    """The highest rate of an open loop with the 99th percentile below the limit, by bisection up to 1.2 x the capacity.

    A rate at which a hundredth of the requests fail, or a twentieth of what was due was not answered, is too high.
    """
    cells: list[Cell] = []
    low, high = 0.0, HIGHEST_SHARE * capacity_items_per_s
    kept: Cell | None = None
    rate = FIRST_SHARE * capacity_items_per_s
    while len(cells) < RATE_STEPS and rate >= LOWEST_SHARE * capacity_items_per_s > 0:
        cell = measure(replace(load, rate_per_s=rate / list_length))
        cells.append(cell)
        if keeps(cell, p99_ms):
            low, kept = rate, cell
        else:
            high = rate
        rate = (low + high) / 2
    cells.sort(key=lambda cell: cell.rate_per_s or 0.0)
    return cells, {
        "search": "rate",
        "p99_limit_ms": p99_ms,
        "variant": cells[0].variant if cells else {},
        "items_per_s": None if kept is None else kept.rate_per_s,
        "p99_ms": None if kept is None else _p99_ms(kept),
        "engine": _engine(kept),
        "capacity_items_per_s": capacity_items_per_s,
    }


def keeps(cell: Cell, limit_ms: float) -> bool:
    """Whether an open loop's requests keep the limit."""
    p99_ms = _p99_ms(cell)
    if p99_ms is None or cell.due_per_s is None:
        return False
    answered, failed = cell.answered, sum(cell.errors.values())
    is_shed = failed > MAX_FAILED_SHARE * (answered + failed)
    # Until their last delivery, jobs take longer than the load, which is no sign that more and more wait.
    in_time = cell.figures.get("delivered_in_time_per_s", cell.figures["items_per_s"])
    return not is_shed and in_time.mean > KEPT_UP_SHARE * cell.due_per_s and p99_ms <= limit_ms


def _engine(cell: Cell | None) -> str | None:
    """What computed the model, where that is known."""
    return None if cell is None or cell.server is None else cell.server.engine


def _rate(cell: Cell) -> float:
    return cell.figures.get("delivered_per_s", cell.figures["items_per_s"]).mean


def _p99_ms(cell: Cell) -> float | None:
    found = cell.figures.get("p99_ms" if cell.delivery is None else "delivery_p99_ms")
    return None if found is None else found.mean
