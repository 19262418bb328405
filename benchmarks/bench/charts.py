"""What the plots of a run show, for the page and for the PNG files."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import log10
from typing import Any

from modalkit.benchmarks.bench.results import name_of, variant_name

MAX_SERIES = 8
BY_LOAD = "throughput"
"""The plot in which a load is a point, not a line."""


@dataclass(frozen=True, slots=True)
class Series:
    """One line, or the bars, of a chart."""

    name: str
    points: Sequence[tuple[float, float]]
    """With bars, the places are those of the labels."""
    labels: Sequence[str] = ()
    """A word for each point, where a pointer rests on it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """A plot of lines or bars."""

    name: str
    """Of its file."""
    title: str
    note: str
    """What one reads from it."""
    x_label: str
    y_label: str
    series: Sequence[Series]
    bars: Sequence[str] = ()
    """The names of the bars; empty for lines."""
    log_y: bool = False
    x_ticks: Sequence[tuple[float, str]] = ()
    """Places with names, in place of numbers."""


def charts_of(document: Mapping[str, Any]) -> list[Chart]:
    """The plots for which a document has figures; all but the first show `MAX_SERIES` loads at most, and say so."""
    charts = [chart for chart in _all(document["cells"]) if any(series.points for series in chart.series)]
    is_cut = len(document["cells"]) > MAX_SERIES
    return [
        replace(chart, note=f"{chart.note} The first {MAX_SERIES} loads.")
        if is_cut and chart.name != BY_LOAD
        else chart
        for chart in charts
    ]


def _all(cells: Sequence[Mapping[str, Any]]) -> Iterator[Chart]:
    yield Chart(
        name=BY_LOAD,
        title="Throughput against latency",
        note="Each point is a load. To the right and down is better; where a line rises, requests only wait longer.",
        x_label="items per second",
        y_label="p99, ms",
        series=_by_variant(cells),
        log_y=True,
    )
    # 0, 90, 99, 99.9 % in equal distances, as HdrHistogram draws them.
    ticks = [(0.0, "0 %"), (1.0, "90 %"), (2.0, "99 %"), (3.0, "99.9 %")]
    yield Chart(
        name="latency",
        title="Latency distribution",
        note="So many per cent of the requests took no longer. The right end is the tail.",
        x_label="share of the requests",
        y_label="latency, ms",
        series=[
            Series(name_of(cell), [(_nines(share), ms) for share, ms in cell["latency_curve"] if share < 1])
            for cell in cells[:MAX_SERIES]
        ],
        log_y=True,
        x_ticks=ticks,
    )
    yield from _parts(cells)
    yield from _bars(cells, "batch_sizes", "Batch sizes", "requests of a batch, at most", "How full the batches were.")
    yield from _bars(cells, "paddings", "Padding", "share of padding, at most", "What the model computed for nothing.")
    for place, (name, unit) in enumerate((("throughput", "items per second"), ("p99", "p99, ms")), start=1):
        at = 1 if place == 1 else 3
        yield Chart(
            name=f"timeline-{name}",
            title=f"Timeline: {name}",
            note="The last run of each load. A level line is a steady one.",
            x_label="seconds",
            y_label=unit,
            series=[
                Series(name_of(cell), [(row[0], row[at]) for row in cell["timeline"] if row[at] is not None])
                for cell in cells[:MAX_SERIES]
            ],
        )


def _by_variant(cells: Sequence[Mapping[str, Any]]) -> list[Series]:
    series: dict[str, list[tuple[float, float, str]]] = {}
    for cell in cells:
        if {"items_per_s", "p99_ms"} <= cell["figures"].keys():
            loop = "open loop" if cell["open"] else "closed loop"
            name = f"{variant_name(cell['variant'])}, {cell['mode']}, {loop}"
            point = cell["figures"]["items_per_s"]["mean"], cell["figures"]["p99_ms"]["mean"], cell["load"]
            series.setdefault(name, []).append(point)
    return [
        Series(name, [(x, y) for x, y, _ in sorted(points)], [label for *_, label in sorted(points)])
        for name, points in series.items()
    ]


def _nines(share: float) -> float:
    return -log10(max(1 - share, 1e-4))


def _parts(cells: Sequence[Mapping[str, Any]]) -> Iterator[Chart]:
    """Where the time of a request goes, by the server's account."""
    told = [cell for cell in cells if cell["server"] and cell["server"]["queue_s"] is not None][:MAX_SERIES]
    stages = dict.fromkeys(stage for cell in told for stage in cell["server"]["stages_s"])
    parts = ["queue", *stages, *(["rest"] if any(cell["server"]["rest_s"] is not None for cell in told) else [])]

    def ms_of(cell: Mapping[str, Any], part: str) -> float:
        server = cell["server"]
        found = server[f"{part}_s"] if part in ("queue", "rest") else server["stages_s"].get(part)
        return 1000 * (found or 0.0)

    yield Chart(
        name="parts",
        title="Where the time goes",
        note="Means, by the server: of a request in the queue, and of a batch in each stage. The rest of the latency "
        "is HTTP, and that more requests are in the longer batches; of lists and jobs it is not told.",
        x_label="",
        y_label="ms",
        bars=parts,
        series=[Series(name_of(cell), [(i, ms_of(cell, part)) for i, part in enumerate(parts)]) for cell in told],
    )


def _bars(cells: Sequence[Mapping[str, Any]], key: str, title: str, x_label: str, note: str) -> Iterator[Chart]:
    told = [cell for cell in cells if cell["server"] and cell["server"][key]][:MAX_SERIES]
    names = sorted(
        {name for cell in told for name in cell["server"][key]}, key=lambda name: (name == "more", _size(name))
    )
    series = []
    for cell in told:
        total = sum(cell["server"][key].values())
        series.append(Series(name_of(cell), [(i, cell["server"][key].get(n, 0) / total) for i, n in enumerate(names)]))
    yield Chart(
        name=key.replace("_", "-"), title=title, note=note, x_label=x_label, y_label="share of the batches",
        bars=names, series=series,
    )  # fmt: skip


def _size(name: str) -> float:
    return float("inf") if name == "more" else float(name)
