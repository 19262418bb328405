"""The searches, on a server that is a formula."""

from dataclasses import replace

import pytest

from modalkit.benchmarks.bench.results import Cell, Figure
from modalkit.benchmarks.bench.search import find_capacity, find_rate, keeps
from modalkit.benchmarks.load import Load

CAPACITY = 400.0


def measure(load: Load) -> Cell:
    """A queue with one server: its latency grows without bounds near its capacity."""
    rate = load.rate_per_s if load.rate_per_s is not None else min(CAPACITY, 20.0 * load.clients)
    p99_ms = 1000 / max(1e-3, CAPACITY - rate)
    figures = {"items_per_s": Figure(min(rate, CAPACITY)), "p99_ms": Figure(p99_ms)}
    return Cell(
        variant={}, load=str(load), mode="sync", open=load.is_open, clients=load.clients, rate_per_s=load.rate_per_s,
        due_per_s=load.rate_per_s, figures=figures, answered=1000, errors={}, accuracy=None, limited=[], client={},
    )  # fmt: skip


def test_the_capacity_is_where_more_clients_bring_no_more() -> None:
    cells, found = find_capacity(measure, Load())
    assert [cell.clients for cell in cells] == [8, 16, 32, 64, 128]
    assert (found["items_per_s"], found["load"]) == (CAPACITY, "32 clients")


def test_one_slow_step_ends_no_search_of_the_capacity() -> None:
    rates = {8: 100.0, 16: 70.0, 32: 150.0, 64: 151.0, 128: 152.0}

    def measure_by_chance(load: Load) -> Cell:
        return replace(measure(load), figures={"items_per_s": Figure(rates[load.clients])})

    _, found = find_capacity(measure_by_chance, Load())
    assert (found["items_per_s"], found["load"]) == (152.0, "128 clients")


def test_a_rate_above_the_capacity_that_was_found_is_tried() -> None:
    _, found = find_rate(measure, Load(), 10.0, 270.0)
    assert found["items_per_s"] == pytest.approx(300, rel=0.03), "closed loops found too low a capacity"


def test_the_highest_rate_that_keeps_a_limit_is_found() -> None:
    cells, found = find_rate(measure, Load(), 10.0, CAPACITY)
    assert len(cells) == 6
    assert found["items_per_s"] == pytest.approx(300, rel=0.03), "at 300 per second the p99 is 10 ms"
    assert found["items_per_s"] <= 300
    assert found["p99_ms"] <= 10


def test_a_limit_that_no_rate_keeps_is_told() -> None:
    _, found = find_rate(measure, Load(), 0.1, CAPACITY)
    assert found["items_per_s"] is None


def test_a_rate_is_kept_up_with_where_what_came_due_by_chance_was_answered() -> None:
    by_chance = replace(measure(Load(rate_per_s=100)), figures={"items_per_s": Figure(80), "p99_ms": Figure(5)})
    assert keeps(replace(by_chance, due_per_s=80.0), limit_ms=10)
    assert not keeps(replace(by_chance, due_per_s=100.0), limit_ms=10)
    assert not keeps(replace(by_chance, due_per_s=87.0), limit_ms=10), "more and more would wait"


def test_a_rate_is_searched_with_the_arrivals_that_were_asked_for() -> None:
    cells, _ = find_rate(measure, Load(arrivals="bursty"), 10.0, CAPACITY)
    assert {cell.load.split()[1] for cell in cells} == {"bursty"}


def test_of_jobs_the_deliveries_are_searched() -> None:
    def measure_jobs(load: Load) -> Cell:
        """All jobs are accepted at once, and delivered as by `measure`."""
        cell = measure(load)
        figures = {
            "items_per_s": Figure(load.rate_per_s or 1000.0 * load.clients),
            "p99_ms": Figure(1.0),
            "delivered_per_s": cell.figures["items_per_s"],
            "delivered_in_time_per_s": cell.figures["items_per_s"],
            "delivery_p99_ms": cell.figures["p99_ms"],
        }
        return replace(cell, figures=figures, delivery={"accepted": 1, "delivered": 1, "duplicates": 0, "lost": 0})

    _, found = find_capacity(measure_jobs, Load())
    assert found["items_per_s"] == CAPACITY
    _, found = find_rate(measure_jobs, Load(), 10.0, CAPACITY)
    assert found["items_per_s"] == pytest.approx(300, rel=0.03)
    assert 1 < found["p99_ms"] <= 10


def test_jobs_that_each_take_a_second_are_kept_up_with() -> None:
    figures = {"items_per_s": 100, "delivered_per_s": 92, "delivered_in_time_per_s": 100, "delivery_p99_ms": 1000}
    cell = replace(
        measure(Load(rate_per_s=100)),
        figures={name: Figure(value) for name, value in figures.items()},
        delivery={"accepted": 1, "delivered": 1, "duplicates": 0, "lost": 0},
    )
    assert keeps(cell, limit_ms=1500)
    assert not keeps(replace(cell, figures={**cell.figures, "delivered_in_time_per_s": Figure(90)}), limit_ms=1500)
