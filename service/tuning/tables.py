"""Shows the results of tuning, as tables and sentences on a console."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from modalkit.batching import MeasuredCostModel
from modalkit.batching.calibration import Calibration, Measurement
from modalkit.service.errors import describe_error
from modalkit.service.settings import BatchConfig
from modalkit.service.tuning.choice import ChosenLimits, lone_sizes, nearest_size
from modalkit.service.tuning.measuring import median_error
from modalkit.service.tuning.trial import Trial, TrialPlan

TABLE: dict[str, Any] = {"box": box.SIMPLE, "title_justify": "left"}


def show_measurements(output: Console, measured: Calibration[Any], corrected: Sequence[Measurement]) -> None:
    """Show the time of each measured batch, how many were `corrected`, and which were left out and why."""
    shapes = measured.measurements
    _show_by_count_and_size(output, shapes, "Milliseconds of a batch", lambda shape: shape.seconds * 1000)
    _show_by_count_and_size(output, shapes, "Items a second", lambda shape: shape.count / max(shape.seconds, 1e-9))
    disturbed = sum(before != after for before, after in zip(shapes, corrected, strict=True))
    if disturbed:
        output.print(
            f"{disturbed} of these took far longer than larger ones, because other programs used the device. Below, "
            "they count as no longer than those."
        )
    if measured.too_large_tokens is not None:
        output.print(f"A batch of {measured.too_large_tokens} was out of memory, so larger ones were left out.")
    if measured.failure is not None:
        output.print(
            f"Items of size {measured.failure.size} failed, so larger ones were left out: "
            f"{describe_error(measured.failure.error)}"
        )
    if not measured.is_complete:
        output.print("There was no time for other batches: --max-seconds gives more.")


def show_costs(output: Console, costs: MeasuredCostModel, shapes: Sequence[Measurement]) -> None:
    """Show the fitted costs, and their difference to the measurements."""
    table = Table("paid for each", "seconds", title="Fitted costs", **TABLE)
    for name, cost_s in costs.costs.items():
        table.add_row(name, f"{cost_s:.3g}" if cost_s else "0")
    output.print(table)
    error = median_error(costs, shapes)
    output.print(f"Half of the {len(shapes)} measured batches are within {error:.1%} of these costs.\n")


def show_choice(output: Console, chosen: ChosenLimits, config: BatchConfig) -> None:
    """Show the chosen limits beside the configured ones, with reasons."""
    table = Table("batch_config", "now", "chosen", "why", title="Limits", **TABLE)
    for key, reason in chosen.reasons.items():
        now = getattr(config, key)
        table.add_row(key, _value(now), _value(chosen.values().get(key, now)), reason)
    output.print(table)


def show_trial(output: Console, trial: Trial, plan: TrialPlan, share: str, objective_s: float | None) -> None:
    """Show the results of a trial."""
    output.print(
        f"Tried: {trial.sent} requests of the sizes above at random times, {plan.rate_per_s:.3g} a second ({share})"
    )
    objective = "none" if objective_s is None else f"p99 {duration(objective_s)}"
    output.print(
        f"  p50 {duration(trial.p50_s)}   p99 {duration(trial.p99_s)} (objective: {objective})   "
        f"{trial.items_per_s:.4g} items/s"
    )
    if not trial.is_complete:
        output.print(f"  {trial.failed} failed, {trial.unfinished} were not done in time")


def duration(seconds: float) -> str:
    """Seconds as a readable text."""
    if seconds == math.inf:
        return "unknown"
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1000:.3g} ms"


def _show_by_count_and_size(
    output: Console, shapes: Sequence[Measurement], title: str, figure: Callable[[Measurement], float]
) -> None:
    sizes = lone_sizes(shapes)
    figures = {(shape.count, nearest_size(sizes, shape.longest)): _figure(figure(shape)) for shape in shapes}
    table = Table("count", title=title, **TABLE)
    for size in sizes:
        table.add_column(f"size {size}", justify="right")
    for count in sorted({count for count, _ in figures}):
        table.add_row(str(count), *(figures.get((count, size), "") for size in sizes))
    output.print(table)


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _value(value: float | None) -> str:
    return "null" if value is None else f"{value:g}"
