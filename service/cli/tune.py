"""``modalkit tune``: measure what batches cost on this machine, and choose limits by it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from statistics import median
from time import monotonic
from typing import Annotated, Any

import anyio
import typer
from pydantic import BaseModel
from pydantic_core import to_json
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from modalkit.batching import MeasuredCostModel
from modalkit.batching.calibration import Calibration, Measurement, believed_measurements
from modalkit.pipelines import InferencePipeline
from modalkit.pipelines.files import replacing
from modalkit.service.cli.common import POSITIVE, AsJson, ConfigFiles, ModelOption, model_source, notices
from modalkit.service.cli.records import ColumnOption, FileFormat, FormatOption, fields_of, read_file, validated
from modalkit.service.errors import describe_error
from modalkit.service.learnt_costs import CostKey, save_costs
from modalkit.service.pipeline_batches import batch_policy, max_in_flight_of
from modalkit.service.settings import BatchConfig, Settings
from modalkit.service.tuning import TuningError
from modalkit.service.tuning.choice import ChosenLimits, choose_limits, lone_sizes, nearest_size, predicted_capacity
from modalkit.service.tuning.config_file import LIMITS_OF_ALL, require_writable, text_with_limits
from modalkit.service.tuning.measuring import MEASURING_SHARE, fitted_costs, measure
from modalkit.service.tuning.plots import draw_costs, require_drawable
from modalkit.service.tuning.samples import MadeUpSamples, OwnSamples, Samples
from modalkit.service.tuning.trial import Bench, Trial, TrialPlan, require_complete
from modalkit.service.validation import documented_model

LOADS = (0.7, 0.5, 0.35, 0.25)  # shares of the predicted capacity, tried in this order until one keeps the objective
MAX_SENT_PER_S = 1000.0  # the same process sends requests and runs the model
LONE_SHARE = 0.05  # share of --max-seconds for measuring what a request costs beside its batch
MAX_SAMPLES = 10_000
SHOWN_ERRORS = 5
PIPED_WIDTH = 1000  # columns; programs that read the tables get no cut or wrapped lines
TABLE: dict[str, Any] = {"box": box.SIMPLE, "title_justify": "left"}


def tune(
    p99_ms: Annotated[
        float | None,
        typer.Option(help="The latency that 99 of 100 requests are to keep, in milliseconds.", **POSITIVE),
    ] = None,
    write: Annotated[
        Path | None, typer.Option("--write", "-w", help="Write the limits into this YAML file.", dir_okay=False)
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the costs into this .png, .svg or .pdf.", dir_okay=False)
    ] = None,
    max_seconds: Annotated[
        float, typer.Option(help="How long to measure and try, once the model is loaded.", **POSITIVE)
    ] = 60.0,
    engines: Annotated[
        bool, typer.Option("--engines", help="Only measure the engines that can run the model, and keep the choice.")
    ] = False,
    samples: Annotated[
        Path | None,
        typer.Option(
            "--samples",
            "-s",
            help="Measure with the items of this .txt, .jsonl or .csv file, the first 10,000.",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    file_format: FormatOption = None,
    column: ColumnOption = None,
    config: ConfigFiles = None,
    model: ModelOption = None,
    as_json: AsJson = False,
) -> None:
    """Measure what batches cost on this machine, choose limits by it, and try them on the scheduler.

    Shows what batches of each count and size take, the costs fitted to it, the limits and their reasons, and then what
    requests at 70 % of the predicted capacity get, or at less where that is too much. Items are made up by the
    pipeline's sample_items, or read from --samples, as `modalkit predict` reads its input. Without --p99-ms the limits
    serve throughput alone. Only what was measured lowers a limit.

    --engines measures no batches, but every engine and number format that runs the model here, conversions included,
    however long they take within --max-seconds. Later starts use the choice without measuring.

    --write keeps the comments of the file, and changes the limits of the model alone if it has a batch_config of its
    own. Costs are kept in calibration.path, where the configuration names one. When requests of the trial fail or are
    not done in time, nothing is written and the exit code is 1.

    [bold]Examples[/bold]

    modalkit tune

    modalkit tune --p99-ms 200 --write modalkit.yaml --plot costs.png

    modalkit tune --engines --json

    modalkit tune --samples reviews.csv --column review
    """
    settings = Settings.load(config)
    source = model_source(settings, model)
    own = settings.model_settings.model_entries[source.model_name].batch_config is not None
    section = ("model_settings", "model_entries", source.model_name, "batch_config") if own else LIMITS_OF_ALL
    settings = source.settings
    if write is not None:
        require_writable(write, section)
    if plot is not None:
        require_drawable(plot)
    items = None if samples is None else _read_samples(samples, file_format, source.input_model, column)
    with notices.status(f"Loading {source.model_name} ..."):
        pipeline = source.load()
    if engines:
        _measure_engines(pipeline, max_seconds, as_json=as_json)
        return
    try:
        key = CostKey.of(pipeline, settings.app_settings.batch_config)
    except Exception as error:
        raise TuningError(f"{type(pipeline).__name__}.device_name failed: {describe_error(error)}") from error
    own_or_made_up = MadeUpSamples(pipeline) if items is None else OwnSamples(pipeline, items)
    run = _Tuning(pipeline, settings, own_or_made_up, max_seconds, is_quiet=as_json)
    if plot is not None:
        run.draw(plot, f"{pipeline.model_name} on {key.device}")
    chosen = run.choose(None if p99_ms is None else p99_ms / 1000)
    if (path := settings.app_settings.batch_config.calibration.path) is not None:
        save_costs(path, key, run.costs)
    if write is not None:
        with replacing(write.resolve()) as new:
            new.write_text(text_with_limits(write, chosen.values, section), encoding="utf-8")
        notices.print(f"The limits are in {write}")
    if as_json:
        typer.echo(
            to_json({"model": pipeline.model_name, "device": key.device, **run.figures(chosen)}, inf_nan_mode="null")
        )


def _measure_engines(pipeline: InferencePipeline, max_s: float, *, as_json: bool) -> None:
    with notices.status("Measuring engines ..."):
        choice = pipeline.measure_engines(max_s)
    if choice is None:
        raise TuningError(f"{type(pipeline).__name__} has no measure_engines, so there is no engine to choose")
    if as_json:
        typer.echo(to_json({"model": pipeline.model_name, **choice.model_dump()}))
    else:
        typer.echo(f"{pipeline.model_name}: engine {choice}")


def _read_samples(
    path: Path, file_format: FileFormat | None, input_model: type[BaseModel], column: str | None
) -> list[BaseModel]:
    """The items of the file. Raises `TuningError` for lines that are no items, and for a file without items."""
    read = read_file(path, file_format, fields_of(documented_model(input_model).model_json_schema()), column)
    records = list(validated(islice(read, MAX_SAMPLES), input_model))
    errors = [f"{record.place}: {record.error}" for record in records if record.item is None]
    if errors:
        more = f"; and {len(errors) - SHOWN_ERRORS} more" if len(errors) > SHOWN_ERRORS else ""
        raise TuningError(
            f"--samples {path} has lines that are no {input_model.__name__}: {'; '.join(errors[:SHOWN_ERRORS])}{more}. "
            "Correct or remove them"
        )
    if not records:
        raise TuningError(f"--samples {path} holds no items: put one on each line")
    return [record.item for record in records if record.item is not None]


class _Tuning:
    """Measures a pipeline when it is constructed and prints the figures. All steps take about `max_s` seconds."""

    def __init__(
        self, pipeline: InferencePipeline, settings: Settings, samples: Samples, max_s: float, *, is_quiet: bool
    ) -> None:
        width = None if Console().is_terminal else PIPED_WIDTH
        self._output = Console(highlight=False, markup=False, emoji=False, width=width, quiet=is_quiet)
        self._config = settings.app_settings.batch_config
        self._max_in_flight = max_in_flight_of(pipeline, self._config)
        self._max_s = max_s
        self.trial: Trial | None = None
        self.deadline_s = monotonic() + max_s
        bar = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        with Progress(*bar, console=notices, transient=True, disable=not notices.is_terminal) as progress:
            task = progress.add_task("Warming up ...", total=MEASURING_SHARE * max_s)

            def show(shape: Measurement) -> None:
                what = f"{shape.count} of size {shape.longest}: {_duration(shape.seconds)}"
                progress.update(task, description=what, completed=progress.tasks[0].elapsed or 0.0)

            self._measured = measure(pipeline, self._config, max_s, samples=samples, on_shape=show)
        self.shapes = believed_measurements(self._measured.measurements)
        self.costs = fitted_costs(pipeline, self.shapes)
        self._bench = Bench(pipeline, settings, self.costs, samples)
        _show_measurements(self._output, self._measured, self.shapes, self._max_in_flight)
        _show_costs(self._output, self.costs, self.shapes)

    def draw(self, path: Path, title: str) -> None:
        """Draw the costs into a file; this does not count as time for measuring."""
        started_s = monotonic()
        draw_costs(path, title, self.shapes, self.costs)
        notices.print(f"The plot is in {path}")
        self.deadline_s += monotonic() - started_s

    def choose(self, objective_s: float | None) -> ChosenLimits:
        """Choose limits, print them and try them. Raises `TuningError` where the trial is not complete."""
        sizes = lone_sizes(self.shapes)
        chosen = choose_limits(
            self.shapes,
            self.costs,
            objective_s,
            configured=batch_policy(self._config),
            beside_s=self._seconds_beside_a_batch(sizes[len(sizes) // 2]),
            # Where time ran out, the largest batch that fits was not found: the scheduler finds it at run time.
            too_large_tokens=self._measured.too_large_tokens if self._measured.is_complete else None,
        )
        _show_choice(self._output, chosen, self._config)
        self._try_out(BatchConfig.model_validate(self._config.model_dump() | chosen.values), sizes, objective_s)
        return chosen

    def figures(self, chosen: ChosenLimits) -> dict[str, Any]:
        """What was measured, the costs, the limits with their reasons, and the last trial."""
        return {
            "batches": [asdict(shape) for shape in self.shapes],
            "costs": self.costs.costs,
            "limits": chosen.values,
            "reasons": chosen.reasons,
            "trial": self.trial and asdict(self.trial),
        }

    def _seconds_beside_a_batch(self, size: int) -> float:
        lone_s = max(shape.seconds for shape in self.shapes if (shape.count, shape.longest) == (1, size))
        max_s = LONE_SHARE * self._max_s
        # Beside a batch that takes so long, the other costs of a request are negligible.
        return 0.0 if lone_s > max_s else anyio.run(self._bench.seconds_beside_the_batch, size, max_s)

    def _try_out(self, config: BatchConfig, sizes: list[int], objective_s: float | None) -> None:
        """Try the limits at lower and lower loads until one keeps the objective, or the time is over."""
        trial: Trial | None = None
        policy = batch_policy(config)
        for load in LOADS:
            capacity = predicted_capacity(self.shapes, policy, load, self._max_in_flight)
            rate_per_s = min(load * capacity.items_per_s, MAX_SENT_PER_S)
            plan = TrialPlan.within(rate_per_s, capacity.batch_s, self.deadline_s - monotonic())
            if plan is None:
                break
            with notices.status(f"Trying these limits for up to {_duration(plan.duration_s + plan.patience_s)} ..."):
                trial = self.trial = anyio.run(self._bench.open_loop, config, sizes, plan)
            share = f"{load:.0%} of the predicted capacity"
            if load * capacity.items_per_s > MAX_SENT_PER_S:
                share = f"the most that is tried; predicted are {_figure(capacity.items_per_s)}"
            _show_trial(self._output, trial, plan, share, objective_s)
            if trial.failed or (trial.is_complete and (objective_s is None or trial.p99_s <= objective_s)):
                break
        require_complete(
            trial, predicted_capacity(self.shapes, policy, LOADS[0], self._max_in_flight).batch_s, self._max_s
        )
        if trial is not None and objective_s is not None and trial.p99_s > objective_s:
            self._output.print(
                "  The objective was not kept at any load that was tried: requests queue for more than one batch. Send "
                "fewer to each worker, or allow more."
            )


def _show_measurements(
    output: Console, measured: Calibration[Any], believed: Sequence[Measurement], max_in_flight: int
) -> None:
    """Show the time of each measured batch, how many are not `believed`, and which were left out and why."""
    shapes = measured.measurements
    title = "Milliseconds of a batch" + (f", {max_in_flight} at once" if max_in_flight > 1 else "")
    _show_by_count_and_size(output, shapes, title, lambda shape: shape.seconds * 1000)
    rate_of = lambda shape: max_in_flight * shape.count / max(shape.seconds, 1e-9)  # noqa: E731
    _show_by_count_and_size(output, shapes, "Items a second", rate_of)
    slow_once = len(shapes) - len(believed)
    disturbed = sum(shape not in believed for shape in shapes) - slow_once
    if slow_once:
        output.print(
            f"{slow_once} of these ran once and took longer than the same items in smaller batches, as a first run "
            "may. Below, they are left out: --max-seconds gives time for more runs."
        )
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


def _show_costs(output: Console, costs: MeasuredCostModel, shapes: Sequence[Measurement]) -> None:
    """Show the fitted costs, and their difference to the measurements."""
    table = Table("paid for each", "seconds", title="Fitted costs", **TABLE)
    for name, cost_s in costs.costs.items():
        table.add_row(name, f"{cost_s:.3g}" if cost_s else "0")
    output.print(table)
    error = median(
        abs(costs.predict_s(shape.count, shape.longest, shape.total) / shape.seconds - 1) for shape in shapes
    )
    output.print(f"Half of the {len(shapes)} measured batches are within {error:.1%} of these costs.\n")


def _show_choice(output: Console, chosen: ChosenLimits, config: BatchConfig) -> None:
    """Show the chosen limits beside the configured ones, with reasons."""
    table = Table("batch_config", "now", "chosen", "why", title="Limits", **TABLE)
    for key, reason in chosen.reasons.items():
        now = getattr(config, key)
        table.add_row(key, _value(now), _value(chosen.values.get(key, now)), reason)
    output.print(table)


def _show_trial(output: Console, trial: Trial, plan: TrialPlan, share: str, objective_s: float | None) -> None:
    """Show the results of a trial."""
    output.print(
        f"Tried: {trial.sent} requests of the sizes above at random times, {_figure(plan.rate_per_s)} a second "
        f"({share})"
    )
    objective = "none" if objective_s is None else f"p99 {_duration(objective_s)}"
    output.print(
        f"  p50 {_duration(trial.p50_s)}   p99 {_duration(trial.p99_s)} (objective: {objective})   "
        f"{_figure(trial.items_per_s)} items/s"
    )
    if not trial.is_complete:
        output.print(f"  {trial.failed} failed, {trial.unfinished} were not done in time")


def _duration(seconds: float) -> str:
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
