"""``modalkit tune``: measure what batches cost on this machine, and choose limits by it."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import anyio
import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from batching.calibration import Measurement
from pipelines import InferencePipeline
from service.cli.common import ConfigFiles, ModelOption, model_source, notices
from service.cost_tables import CostKey, save_costs
from service.errors import describe_error
from service.settings import BatchConfig, Settings
from service.tuning.choice import ChosenLimits, choose_limits, lone_sizes, predicted_capacity_per_s
from service.tuning.config_file import require_writable, write_limits
from service.tuning.errors import TuningError
from service.tuning.measuring import Measured, fitted_costs, measure, median_error
from service.tuning.plots import draw_costs, require_drawable
from service.tuning.trial import Bench, Trial
from service.worker import batch_policy

LOADS = (0.7, 0.5, 0.35, 0.25)  # of the predicted capacity, each tried where the one before broke the objective
MOST_SENT_PER_S = 1000.0  # by one process that has the model to run as well
LONGEST_TRIAL_S = 5.0
TRIAL_SHARE = 0.2  # of the time for everything, at most
LONE_SHARE = 0.05
PIPED_WIDTH = 1000  # for those who read the tables with a program, nothing is cut or wrapped
TABLE: dict[str, Any] = {"box": box.SIMPLE, "title_justify": "left"}

PlotOption = Annotated[
    Path | None,
    typer.Option("--plot", help="Draw the costs into this .png, .svg or .pdf.", show_default=False, dir_okay=False),
]
WriteOption = Annotated[
    Path | None,
    typer.Option("--write", "-w", help="Write the limits into this YAML file.", show_default=False, dir_okay=False),
]


def tune(
    p99_ms: Annotated[
        float | None,
        typer.Option(help="The latency that 99 of 100 requests are to keep, in milliseconds.", show_default=False),
    ] = None,
    write: WriteOption = None,
    plot: PlotOption = None,
    max_seconds: Annotated[float, typer.Option(help="How long to measure and try, once the model is loaded.")] = 60.0,
    config: ConfigFiles = None,
    model: ModelOption = None,
) -> None:
    """Measure what batches cost on this machine, choose limits by it, and try them on the scheduler.

    Shows what batches of each count and size take, the costs fitted to it, the limits and their reasons, and then what
    made-up requests at 70 % of the predicted capacity get, or at less if the objective asks for it. Without --p99-ms
    the limits serve throughput alone. --write keeps the comments of the file. Costs are kept in calibration.path, where
    the configuration names one.

    [bold]Examples[/bold]

    modalkit tune

    modalkit tune --p99-ms 200 --write modalkit.yaml --plot costs.png
    """
    _require_positive("--p99-ms", p99_ms)
    _require_positive("--max-seconds", max_seconds)
    settings = Settings.load(config)
    source = model_source(settings, model)
    if write is not None:
        require_writable(write)
    if plot is not None:
        require_drawable(plot)
    with notices.status(f"Loading {source.model_name} ..."):
        pipeline = source.load()
    output = Console(highlight=False, markup=False, width=None if Console().is_terminal else PIPED_WIDTH)
    run = _Tuning(output, pipeline, settings, max_seconds)
    if plot is not None:
        run.draw(plot)
    chosen = run.choose(None if p99_ms is None else p99_ms / 1000)
    if write is not None:
        write_limits(write, chosen.values())
        notices.print(f"The limits are in {write}", markup=False)


def _require_positive(option: str, value: float | None) -> None:
    if value is not None and not 0 < value < math.inf:
        raise typer.BadParameter(f"{option} must be a positive number, not {value:g}")


class _Tuning:
    """Measures a pipeline when made, and shows what it finds."""

    def __init__(self, output: Console, pipeline: InferencePipeline, settings: Settings, max_s: float) -> None:
        self._output = output
        self._pipeline = pipeline
        self._config = settings.app_settings.batch_config
        self._max_s = max_s
        self._key = _cost_key(pipeline)
        self._measured = _measure_with_progress(pipeline, self._config, max_s * (1 - TRIAL_SHARE - LONE_SHARE))
        self._shapes = self._measured.measurements
        self._costs = fitted_costs(pipeline, self._shapes)
        if (path := self._config.calibration.path) is not None:
            save_costs(path, self._key, self._costs)
        self._bench = Bench(pipeline, settings, self._costs)
        self._show_measurements()
        self._show_costs()

    def draw(self, path: Path) -> None:
        """Draw what was measured."""
        draw_costs(path, f"{self._pipeline.model_name} on {self._key.device}", self._shapes, self._costs)
        notices.print(f"The plot is in {path}", markup=False)

    def choose(self, objective_s: float | None) -> ChosenLimits:
        """Choose limits, show them, and try them."""
        sizes = lone_sizes(self._shapes)
        middle, lone_s = sizes[len(sizes) // 2], LONE_SHARE * self._max_s
        beside_s = anyio.run(self._bench.seconds_beside_the_batch, middle, lone_s)
        chosen = choose_limits(
            self._shapes,
            self._costs,
            objective_s,
            beside_s=beside_s,
            memory_was_the_limit=self._measured.memory_was_the_limit,
        )
        self._show_choice(chosen)
        tuned = BatchConfig.model_validate(self._config.model_dump() | chosen.values())
        self._try_out(tuned, sizes, objective_s)
        return chosen

    def _try_out(self, config: BatchConfig, sizes: list[int], objective_s: float | None) -> None:
        """Try the limits at ever lower loads, until one keeps the objective."""
        capacity_per_s = predicted_capacity_per_s(self._shapes, self._costs, batch_policy(config))
        for load in LOADS:
            rate_per_s = min(load * capacity_per_s, MOST_SENT_PER_S)
            share = f"{load:.0%} of the predicted capacity"
            if rate_per_s == MOST_SENT_PER_S:
                share = f"the most that is tried; predicted are {capacity_per_s:.3g}"
            trial = self._try_at(rate_per_s, share, config, sizes, objective_s)
            if objective_s is None or trial.p99_s <= objective_s:
                return
        self._output.print(
            "  The objective was not kept at any of these loads: requests queue for more than one batch. Send fewer to "
            "each worker, or allow more."
        )

    def _try_at(
        self, rate_per_s: float, share: str, config: BatchConfig, sizes: list[int], objective_s: float | None
    ) -> Trial:
        duration_s = min(LONGEST_TRIAL_S, TRIAL_SHARE * self._max_s)
        with notices.status("Trying these limits ..."):
            trial = anyio.run(
                partial(self._bench.open_loop, config, sizes, rate_per_s=rate_per_s, duration_s=duration_s)
            )
        self._output.print(
            f"Tried: {trial.sent} requests of the sizes above at random times, {rate_per_s:.3g} a second ({share})"
        )
        objective = "none" if objective_s is None else f"p99 {_duration(objective_s)}"
        self._output.print(
            f"  p50 {_duration(trial.p50_s)}   p99 {_duration(trial.p99_s)} (objective: {objective})   "
            f"{trial.items_per_s:.4g} items/s"
        )
        if trial.failed or trial.unfinished:
            self._output.print(
                f"  {trial.failed} failed, {trial.unfinished} were not done in time; first error: {trial.first_error}"
            )
        return trial

    def _show_measurements(self) -> None:
        measured = self._measured
        self._show_by_count_and_size("Milliseconds of a batch", lambda shape: shape.seconds * 1000)
        self._show_by_count_and_size("Items a second", lambda shape: shape.count / shape.seconds)
        if measured.memory_was_the_limit:
            self._output.print("The next larger batch was out of memory.")
        if measured.time_was_the_limit:
            self._output.print("Larger batches had no time: --max-seconds gives them more.")

    def _show_by_count_and_size(self, title: str, figure: Callable[[Measurement], float]) -> None:
        sizes = lone_sizes(self._shapes)
        figures = {(shape.count, _nearest(sizes, shape.longest)): _figure(figure(shape)) for shape in self._shapes}
        table = Table("count", title=title, **TABLE)
        for size in sizes:
            table.add_column(f"size {size}", justify="right")
        for count in sorted({count for count, _ in figures}):
            table.add_row(str(count), *(figures.get((count, size), "") for size in sizes))
        self._output.print(table)

    def _show_costs(self) -> None:
        table = Table("paid for each", "seconds", title="Fitted costs", **TABLE)
        for name, cost_s in self._costs.costs.items():
            table.add_row(name, f"{cost_s:.3g}" if cost_s else "0")
        self._output.print(table)
        error = median_error(self._costs, self._shapes)
        self._output.print(f"Half of the {len(self._shapes)} measured batches are within {error:.1%} of these costs.\n")

    def _show_choice(self, chosen: ChosenLimits) -> None:
        table = Table("batch_config", "now", "chosen", "why", title="Limits", **TABLE)
        for key, reason in chosen.reasons.items():
            now = getattr(self._config, key)
            table.add_row(key, _value(now), _value(chosen.values().get(key, now)), reason)
        self._output.print(table)


def _cost_key(pipeline: InferencePipeline) -> CostKey:
    try:
        return CostKey.of(pipeline)
    except Exception as error:
        raise TuningError(f"{type(pipeline).__name__}.device_name failed: {describe_error(error)}") from error


def _measure_with_progress(pipeline: InferencePipeline, config: BatchConfig, max_s: float) -> Measured:
    bar = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*bar, console=notices, transient=True, disable=not notices.is_terminal) as progress:
        task = progress.add_task("Warming up ...", total=max_s)

        def show(shape: Measurement) -> None:
            what = f"{shape.count} of size {shape.longest}: {_duration(shape.seconds)}"
            progress.update(task, description=what, completed=progress.tasks[0].elapsed or 0.0)

        return measure(pipeline, config, max_s, show)


def _nearest(sizes: list[int], size: int) -> int:
    return min(sizes, key=lambda other: abs(math.log(other / size)))


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _duration(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1000:.3g} ms"


def _value(value: float | None) -> str:
    return "null" if value is None else f"{value:g}"
