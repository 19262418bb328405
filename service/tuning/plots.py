"""Draws how long batches take; needs matplotlib, which the extra ``bench`` installs."""

from collections.abc import Sequence
from importlib.util import find_spec
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING

from modalkit.batching import CostModel
from modalkit.batching.calibration import Measurement
from modalkit.pipelines.extras import install_command
from modalkit.service.errors import UsageError
from modalkit.service.tuning import TuningError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMATS = (".pdf", ".png", ".svg")


def require_drawable(path: Path) -> None:
    """Raise `TuningError` without matplotlib, and `UsageError` for a path that no plot can have, before measuring."""
    if find_spec("matplotlib") is None:
        raise TuningError(f"--plot needs matplotlib, which is not installed: {install_command('bench')}")
    if path.suffix.lower() not in FORMATS:
        raise UsageError(f"--plot {path}: the name must end in one of {', '.join(FORMATS)}")
    if not path.parent.is_dir():
        raise UsageError(f"--plot {path}: there is no folder {path.parent}; create it first")


def draw_costs(path: Path, title: str, measurements: Sequence[Measurement], model: CostModel) -> None:
    """Draw batch seconds against count and against size, measured as points and fitted as lines, into a file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5.5), layout="constrained")
    by_count, by_size = figure.subplots(1, 2, sharey=True)
    figure.suptitle(f"{title}: points are measured, lines are fitted")
    _panel(by_count, measurements, model, along="count")
    _panel(by_size, measurements, model, along="longest")
    by_count.set_ylabel("batch, seconds")
    figure.savefig(path, dpi=120)


def _panel(axes: "Axes", measurements: Sequence[Measurement], model: CostModel, *, along: str) -> None:
    """Draw one line for each value of the other coordinate."""
    from matplotlib import colormaps

    other = "longest" if along == "count" else "count"
    lines: dict[int, list[Measurement]] = {}
    for shape in sorted(measurements, key=attrgetter(along)):
        lines.setdefault(getattr(shape, other), []).append(shape)
    colours = colormaps["viridis"].resampled(len(lines) + 1)
    for index, (value, shapes) in enumerate(sorted(lines.items())):
        places = [getattr(shape, along) for shape in shapes]
        fitted_s = [model.predict_s(shape.count, shape.longest, shape.total) for shape in shapes]
        axes.plot(places, fitted_s, color=colours(index), linewidth=1.2)
        axes.plot(places, [shape.seconds for shape in shapes], "o", color=colours(index), markersize=4, label=value)
    axes.set(yscale="log", xlabel=f"{along} of the batch" if along == "count" else "size of its requests")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3)
    axes.legend(title="size" if along == "count" else "count", fontsize="small")
