"""``modalkit check``: try the configuration without serving it."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from traceback import format_exception
from typing import Annotated

import anyio
import typer
from pydantic_core import to_json
from rich.console import Console
from rich.table import Table

from modalkit.batching import BatchRecord, Failure, Outcome
from modalkit.pipelines import EngineChoice, InferenceOutputModel, InferencePipeline, RejectItem
from modalkit.service.cli.common import EXIT_FAILURE, EXIT_USAGE, AsJson, ConfigFiles, notices, try_api_keys
from modalkit.service.errors import OutputNotJsonError, ServiceError, describe_with_line
from modalkit.service.loading import NO_MODELS, LoadError, ModelSource, load_queue_backend
from modalkit.service.made_up_items import MadeUpItems, NoItemsError, make_up_items
from modalkit.service.outputs import output_json
from modalkit.service.settings import BatchConfig, Settings
from modalkit.service.worker import short_lived_worker

BATCH_COUNT = 4
ITEM_SIZE = 16
HOW_TO_GIVE_SAMPLES = (
    "to give samples, implement sample_items(n, size) in the pipeline, or give the fields of its input_model examples, "
    'as in text: str = Field(examples=["one", "two"])'
)


_FAULTS_OF_ITEMS = (ArithmeticError, AssertionError, LookupError, RejectItem, TypeError, ValueError)
"""What pipelines raise for items with other values than they need; other errors have other causes."""


class BatchFailedError(ServiceError):
    """Raised when the batch of a model failed, its outputs cannot be written as JSON, or its sample_items failed."""


@dataclass(frozen=True)
class _Report:
    """What was found of a model: `seconds` of loading, the `batch` in words, and the error, or why none was tried."""

    seconds: float
    batch: str
    engine: EngineChoice | None = None
    not_tried: str | None = None
    error: ServiceError | None = None


def check(
    config: ConfigFiles = None,
    show_traceback: Annotated[
        bool, typer.Option("--traceback", help="Print the whole traceback of each error of a model.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Load the configuration and every model, run a small batch through each, and print what would be served.

    The items of a batch are those of the pipeline's sample_items, else examples, defaults and small values of its
    input_model, or a text where it declares no fields. Outputs are written as JSON, as an answer would be. A model for
    which no item can be made is loaded only, and a warning says so. Exit codes: 0, 1 if a batch failed, 2 if a model
    could not be loaded.

    [bold]Examples[/bold]

    modalkit check

    modalkit check --traceback

    modalkit check --json

    MODALKIT_APP_SETTINGS__BATCH_CONFIG__MAX_BATCH_SIZE=64 modalkit check --config production.yaml
    """
    settings = Settings.load(config)
    if not settings.model_settings.model_entries:
        raise LoadError(NO_MODELS)
    backend = load_queue_backend(settings.app_settings.queue_config)
    try_api_keys(settings.app_settings.auth_config)
    sources = [ModelSource(settings, model_name) for model_name in settings.model_settings.model_entries]
    reports: list[_Report] = []
    for source in sources:
        with notices.status(f"Loading {source.model_name} ..."):
            report = _try(source)
        reports.append(report)
        if report.not_tried is not None:
            notices.print(
                f"modalkit: warning: {source.model_name}: NOTHING WAS TRIED: {report.not_tried}; {HOW_TO_GIVE_SAMPLES}",
            )
        if report.error is not None:
            notices.print(f"modalkit: error: {report.error}")
            if show_traceback:
                notices.print("".join(format_exception(report.error.__cause__ or report.error)))
    service = _service(settings, "none" if backend is None else type(backend).__name__)
    if as_json:
        models = [_as_json(source, report) for source, report in zip(sources, reports, strict=True)]
        typer.echo(to_json({"models": models, "service": service}))
    else:
        _print_tables(sources, reports, service)
    errors = [report.error for report in reports if report.error is not None]
    if errors:
        raise typer.Exit(EXIT_USAGE if any(isinstance(error, LoadError) for error in errors) else EXIT_FAILURE)


def _as_json(source: ModelSource, report: _Report) -> dict[str, object]:
    return {
        "model": source.model_name,
        "pipeline": source.pipeline_class.__name__,
        "loaded_s": report.seconds,
        "batch": report.batch,
        "engine": report.engine and report.engine.model_dump(),
        "not_tried": report.not_tried,
        "error": report.error and str(report.error),
    }


def _print_tables(sources: Sequence[ModelSource], reports: Sequence[_Report], service: Mapping[str, str]) -> None:
    models = Table("model", "pipeline", "loaded in", "batch", title="Models", title_justify="left")
    for source, report in zip(sources, reports, strict=True):
        models.add_row(source.model_name, source.pipeline_class.__name__, f"{report.seconds:.1f} s", report.batch)
    settings = Table("setting", "value", title="Service", title_justify="left")
    for name, value in service.items():
        settings.add_row(name, value)
    output = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)
    output.print(models)
    for source, report in zip(sources, reports, strict=True):
        if report.engine is not None:
            output.print(f"{source.model_name}: engine {report.engine}")
    output.print(settings)


def _try(source: ModelSource) -> _Report:
    """Load a model and run a batch."""
    started_s = time.perf_counter()
    try:
        pipeline = source.load()
    except LoadError as error:
        return _Report(time.perf_counter() - started_s, "FAILED to load", error=error)
    loaded_s = time.perf_counter() - started_s
    try:
        return _Report(loaded_s, anyio.run(_run_batch, pipeline, source), pipeline.engine_choice)
    except LoadError as error:
        return _Report(loaded_s, "FAILED to warm up", pipeline.engine_choice, error=error)
    except BatchFailedError as error:
        return _Report(loaded_s, "FAILED", pipeline.engine_choice, error=error)
    except NoItemsError as error:
        return _Report(loaded_s, "NOT TRIED", pipeline.engine_choice, not_tried=str(error))


async def _run_batch(pipeline: InferencePipeline, source: ModelSource) -> str:
    """Run a batch and say how long it took. Raises `LoadError`, `BatchFailedError`, and `NoItemsError` for no items."""
    records = list[BatchRecord]()
    async with short_lived_worker(
        pipeline, source.settings, on_batch=records.append, input_model=source.input_model
    ) as worker:
        made_up = _items(pipeline, source)
        items, are_guessed = made_up.items, made_up.are_guessed
        started_s = time.perf_counter()
        outcomes = await worker.predict_many(items)
        elapsed_s = time.perf_counter() - started_s
    error = next(filter(None, map(_error_of, outcomes)), None)
    if error is None and not all(record.predict_s for record in records):
        raise BatchFailedError(
            f"{source.model_name}: a batch of {len(items)} items failed, and succeeded only in parts: return exactly "
            "one output for each item, in their order, and look for what fails where there are several"
        )
    if error is None:
        return f"{len(items)} items in {elapsed_s * 1000:.0f} ms{', made up' if are_guessed else ''}"
    what = describe_with_line(error)
    may_be_the_items = are_guessed and isinstance(error, _FAULTS_OF_ITEMS)
    if may_be_the_items and not made_up.has_fields:
        raise NoItemsError(
            f"{source.input_model.__name__} declares no fields, and items with a text alone fail: {what}"
        ) from error
    if may_be_the_items and isinstance(error, RejectItem):
        raise NoItemsError(f"the pipeline rejects the items made up from its input_model ({what})") from error
    note = f". The items were made up from the types of its input_model; {HOW_TO_GIVE_SAMPLES}"
    raise BatchFailedError(
        f"{source.model_name}: a batch of {len(items)} items failed: {what}{note if may_be_the_items else ''}"
    ) from error


def _error_of(outcome: Outcome[InferenceOutputModel]) -> Exception | None:
    if isinstance(outcome, Failure):
        return outcome.error
    try:
        output_json(outcome.value)
    except OutputNotJsonError as error:
        return error
    return None


def _items(pipeline: InferencePipeline, source: ModelSource) -> MadeUpItems:
    """Items to try: sample items, else made-up ones. Raises `BatchFailedError`, and `NoItemsError` for none."""
    count = min(BATCH_COUNT, source.settings.app_settings.batch_config.max_queue_size)
    try:
        items = list(pipeline.sample_items(count, ITEM_SIZE))[:count]
    except Exception as error:
        raise BatchFailedError(
            f"{source.model_name}: sample_items({count}, {ITEM_SIZE}) failed: {describe_with_line(error)}"
        ) from error
    return MadeUpItems(items, are_guessed=False, has_fields=True) if items else make_up_items(source.input_model, count)


def _service(settings: Settings, backend: str) -> dict[str, str]:
    """What is served, in words."""
    app = settings.app_settings
    batch, jobs, auth = app.batch_config, app.async_config, app.auth_config
    own = {name: settings.for_model(name).app_settings.batch_config for name in settings.model_settings.model_entries}
    named = f" of {', '.join(auth.keys)}" if auth.keys else ""
    with_key = f"with an API key{named}, in {auth.auth_header!r}"
    return {
        "batches": _limits(batch),
        **{f"batches of {name}": _limits(limits) for name, limits in own.items() if limits != batch},
        "queue": f"up to {batch.max_queue_size} requests",
        "jobs": f"{jobs.store}" + (f" ({jobs.store_path})" if jobs.store == "sqlite" else ""),
        "results to": backend,
        "callers": with_key if auth.asks_for_key else "anyone",
    }


def _limits(batch: BatchConfig) -> str:
    in_flight = "" if batch.max_in_flight is None else f", {batch.max_in_flight} at once"
    return f"up to {batch.max_batch_size} items, waiting at most {batch.wait_ms:g} ms{in_flight}"
