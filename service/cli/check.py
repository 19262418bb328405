"""``modalkit check``: try the configuration without serving it."""

import time
from contextlib import suppress

import anyio
from pydantic import BaseModel, ValidationError
from rich.console import Console
from rich.table import Table

from modalkit.batching import Failure
from modalkit.pipelines import InferencePipeline
from modalkit.service.cli.common import ConfigFiles, notices, try_api_key
from modalkit.service.errors import describe_error
from modalkit.service.loading import LoadError, ModelSource, load_queue_backend
from modalkit.service.settings import Settings
from modalkit.service.worker import short_lived_worker

SMOKE_BATCH = 4
SMOKE_SIZE = 16


def check(config: ConfigFiles = None) -> None:
    """Load the configuration and every model, run a small batch through each, and print what would be served.

    [bold]Examples[/bold]

    modalkit check

    MODALKIT_APP_SETTINGS__BATCH_CONFIG__MAX_BATCH_SIZE=64 modalkit check --config production.yaml
    """
    settings = Settings.load(config)
    backend = load_queue_backend(settings.app_settings.queue_config)
    try_api_key(settings.app_settings.auth_config)
    models = Table("model", "pipeline", "loaded in", "smoke batch", title="Models", title_justify="left")
    engines: list[str] = []
    for model_name in settings.model_settings.model_entries:
        source = ModelSource(settings, model_name)
        with notices.status(f"Loading {model_name} ..."):
            started_s = time.perf_counter()
            pipeline = source.load()
            loaded_s = time.perf_counter() - started_s
            result = anyio.run(_smoke_batch, pipeline, source.input_model, settings)
        models.add_row(model_name, source.pipeline_class.__name__, f"{loaded_s:.1f} s", result)
        if pipeline.engine_choice is not None:
            engines.append(f"{model_name}: engine {pipeline.engine_choice}")
    output = Console(soft_wrap=True, highlight=False)
    output.print(models)
    for line in engines:
        output.print(line, markup=False)
    output.print(_service_table(settings, "none" if backend is None else type(backend).__name__))


async def _smoke_batch(pipeline: InferencePipeline, input_model: type[BaseModel], settings: Settings) -> str:
    async with short_lived_worker(pipeline, settings) as worker:
        items = pipeline.sample_items(SMOKE_BATCH, SMOKE_SIZE)
        if not items and "text" in input_model.model_fields:
            with suppress(ValidationError):  # its items may need more than a text
                items = [input_model.model_validate({"text": "What a lovely day!"})] * SMOKE_BATCH
        if not items:
            return "none: no sample_items, no field text"
        started_s = time.perf_counter()
        for outcome in await worker.predict_many(items):
            if isinstance(outcome, Failure):
                raise LoadError(
                    f"model_settings.model_entries.{worker.model_name}: the smoke batch failed: "
                    f"{describe_error(outcome.error)}"
                )
        return f"{len(items)} items in {(time.perf_counter() - started_s) * 1000:.0f} ms"


def _service_table(settings: Settings, backend: str) -> Table:
    app = settings.app_settings
    batch, jobs, auth = app.batch_config, app.async_config, app.auth_config
    table = Table("setting", "value", title="Service", title_justify="left")
    table.add_row("batches", f"up to {batch.max_batch_size} items, waiting at most {batch.wait_ms:g} ms")
    table.add_row("queue", f"up to {batch.max_queue_size} requests")
    table.add_row("jobs", f"{jobs.store}" + (f" ({jobs.store_path})" if jobs.store == "sqlite" else ""))
    table.add_row("results to", backend)
    anyone = auth.api_key is None and auth.ssm_key is None
    table.add_row("callers", "anyone" if anyone else f"with the API key, in {auth.auth_header!r}")
    return table
