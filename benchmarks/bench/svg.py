"""Draws a chart as SVG, in the colours of the page."""

import math
from collections.abc import Iterator, Sequence
from html import escape

from modalkit.benchmarks.bench.charts import Chart, Series
from modalkit.benchmarks.bench.report import number

WIDTH, HEIGHT = 560, 300
LEFT, RIGHT, TOP, BOTTOM = 66, 14, 10, 44
COLOURS = 8
TICKS = 5
MAX_DOTS = 12
"""A line with more points has no dots."""
BAR_ROOM = 0.8
STYLE = (
    "svg{--c0:#0f6e84;--c1:#d9822b}text{font:12px system-ui,sans-serif;fill:#667085}.title{font-size:15px;fill:#1d2430}"
    ".grid{stroke:#8884}@media(prefers-color-scheme:dark){svg{--c0:#5cc3da;--c1:#f0a860}.title{fill:#e8eaee}}"
)
"""Of a picture: the colours of the page."""


class _Axis:
    """Maps values to places, and has round ticks."""

    def __init__(
        self, values: Sequence[float], begin: float, end: float, *, log: bool = False, zero: bool = True
    ) -> None:
        known = [value for value in values if value == value and (value > 0 or not log)] or [1.0]
        low, high = min(known), max(known)
        self._log, self._begin, self._end = log, begin, end
        if log:
            self._low, self._high = math.log10(low), math.log10(high)
            if self._high - self._low < 0.3:  # a nearly level line would fill the height
                self._low, self._high = self._low - 0.15, self._high + 0.15
            self.ticks = self._log_ticks()
        else:
            low = min(low, 0.0) if zero else low
            step = _round_step((high - low) / TICKS or abs(high) or 1.0)
            self._low, self._high = low, max(high, low + step)
            first = math.ceil(low / step - 1e-9)
            self.ticks = [step * place for place in range(first, int(self._high / step + 1e-9) + 1)]

    def _log_ticks(self) -> list[float]:
        ticks = [
            step * 10.0**power
            for power in range(math.floor(self._low), math.ceil(self._high) + 1)
            for step in (1, 2, 5)
            if self._low - 1e-9 <= math.log10(step * 10.0**power) <= self._high + 1e-9
        ]
        return ticks[:: max(1, round(len(ticks) / (TICKS + 2)))]

    def place(self, value: float) -> float:
        """Where a value is, in the units of the drawing."""
        if self._log:
            value = math.log10(value) if value > 0 else self._low
        share = (value - self._low) / ((self._high - self._low) or 1.0)
        return self._begin + share * (self._end - self._begin)


def _round_step(least: float) -> float:
    power = 10.0 ** math.floor(math.log10(least))
    return next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= least * 0.999)


def drawn(chart: Chart) -> str:
    """The chart and its legend."""
    body = "".join(_parts(chart))
    legend = "".join(
        f'<span><i style="background:{_colour(index)}"></i>{escape(series.name)}</span>'
        for index, series in enumerate(chart.series)
    )
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(chart.title)}">{body}</svg>'
        f'<div class="legend">{legend}</div>'
    )


def picture(chart: Chart) -> str:
    """The chart as a file of its own, light or dark as its reader's screen, with its title and the names in it."""
    places = [LEFT + index * (WIDTH - LEFT) // len(chart.series) for index in range(len(chart.series))]
    names = "".join(
        f'<circle cx="{x}" cy="-12" r="5" style="fill:{_colour(index)}"/>'
        f'<text x="{x + 10}" y="-8">{escape(one.name)}</text>'
        for index, (x, one) in enumerate(zip(places, chart.series, strict=True))
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 -52 {WIDTH} {HEIGHT + 52}" width="{WIDTH}"><style>{STYLE}'
        f'</style><text x="0" y="-34" class="title">{escape(chart.title)}</text>{names}{"".join(_parts(chart))}</svg>\n'
    )


def _parts(chart: Chart) -> Iterator[str]:
    points = [point for series in chart.series for point in series.points]
    y_axis = _Axis([y for _, y in points], HEIGHT - BOTTOM, TOP, log=chart.log_y)
    for tick in y_axis.ticks:
        y = y_axis.place(tick)
        yield f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:,g}</text>'
    middle = (TOP + HEIGHT - BOTTOM) / 2
    turned = f'x="12" y="{middle}" text-anchor="middle" transform="rotate(-90 12 {middle})"'
    yield f"<text {turned}>{escape(chart.y_label)}</text>"
    yield f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 4}" text-anchor="middle">{escape(chart.x_label)}</text>'
    if chart.bars:
        yield from _bars(chart, y_axis)
        return
    x_axis = _Axis([x for x, _ in points], LEFT, WIDTH - RIGHT, zero=not chart.x_ticks)
    for tick, name in chart.x_ticks or [(tick, f"{tick:,g}") for tick in x_axis.ticks]:
        yield f'<text x="{x_axis.place(tick):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{name}</text>'
    for index, series in enumerate(chart.series):
        yield from _line(series, index, x_axis, y_axis, chart)


def _line(series: Series, index: int, x_axis: _Axis, y_axis: _Axis, chart: Chart) -> Iterator[str]:
    places = [(x_axis.place(x), y_axis.place(y)) for x, y in series.points]
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    yield f'<path d="{path}" style="stroke:{_colour(index)}"/>'
    if len(places) > MAX_DOTS:
        return
    labels = series.labels or [""] * len(places)
    for (x, y), (_, value), label in zip(places, series.points, labels, strict=True):
        hint = escape(f"{series.name} {label}: {number(value)} ({chart.y_label})")
        dot = f'cx="{x:.1f}" cy="{y:.1f}" r="4" style="fill:{_colour(index)}"'
        yield f"<circle {dot}><title>{hint}</title></circle>"


def _colour(index: int) -> str:
    return f"var(--c{index % COLOURS})"


def _bars(chart: Chart, y_axis: _Axis) -> Iterator[str]:
    room = (WIDTH - LEFT - RIGHT) / len(chart.bars)
    width = room * BAR_ROOM / max(1, len(chart.series))
    bottom = y_axis.place(0.0)
    for place, name in enumerate(chart.bars):
        x = LEFT + room * (place + 0.5)
        yield f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{escape(name)}</text>'
    for index, series in enumerate(chart.series):
        for at, value in series.points:
            name = chart.bars[int(at)]
            x = LEFT + room * (at + 0.5 - BAR_ROOM / 2) + width * index
            top = y_axis.place(value)
            size = f'width="{max(1.0, width - 1):.1f}" height="{max(0.0, bottom - top):.1f}"'
            bar = f'x="{x:.1f}" y="{top:.1f}" {size} rx="2" style="fill:{_colour(index)}"'
            yield f"<rect {bar}><title>{escape(f'{name}, {series.name}')}: {number(value)}</title></rect>"
