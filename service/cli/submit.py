"""``modalkit submit``: runs a file through a running service, as one batch of jobs."""

import re
import time
from collections import deque
from contextlib import nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import anyio
import typer
from pydantic import BaseModel, Field

from modalkit.batching import Priority
from modalkit.service.cli.batch_client import BatchRun
from modalkit.service.cli.common import EXIT_LINES_FAILED, NOT_NEGATIVE, ConfigFiles, notices, one_of, progress_of_lines
from modalkit.service.cli.jobs import Key, Url
from modalkit.service.cli.jobs_client import JobsClient
from modalkit.service.cli.records import ColumnOption, FormatOption, fields_of, open_input, require_file
from modalkit.service.cli.reload import DEFAULT_URL
from modalkit.service.cli.results import (
    ForceOption,
    KeepColumnsOption,
    OutputOption,
    ResumeOption,
    identity_of,
    interrupted_run,
    result_file,
)
from modalkit.service.errors import UsageError
from modalkit.service.jobs.model import new_job_id
from modalkit.service.settings import Settings
from modalkit.service.web.options import BATCH_ID_PATTERN


class _ModelSchemas(BaseModel):
    input: dict[str, Any]
    output: dict[str, Any]


class _Description(BaseModel):
    """What is needed of ``/openapi.json``."""

    models: dict[str, _ModelSchemas] = Field(alias="x-models", min_length=1)


def submit(
    path: Annotated[
        Path, typer.Argument(metavar="FILE", help="A .jsonl, .csv, .parquet or .txt file, or .gz; - is standard input.")
    ],
    url: Url = DEFAULT_URL,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for the results, and write them.")] = False,
    output_path: OutputOption = None,
    resume: ResumeOption = False,
    force: ForceOption = False,
    batch: Annotated[str | None, typer.Option(help="The id of the batch of jobs; a new one if left out.")] = None,
    file_format: FormatOption = None,
    column: ColumnOption = None,
    keep_columns: KeepColumnsOption = False,
    model: Annotated[str | None, typer.Option("--model", "-m", help="Which model; the first if left out.")] = None,
    priority: Annotated[Priority, typer.Option(help="The lane of the jobs.", **one_of(Priority))] = Priority.BULK,
    success_queue: Annotated[str | None, typer.Option(help="Where results are sent.")] = None,
    failure_queue: Annotated[str | None, typer.Option(help="Where errors are sent.")] = None,
    patience: Annotated[
        float, typer.Option(help="Seconds to try again while the service is away.", **NOT_NEGATIVE)
    ] = 300,
    key: Key = None,
    config: ConfigFiles = None,
) -> None:
    """Run a file through a running service: each line becomes a job of one batch of jobs.

    Jobs are stored before they run, so the service may die and come back meanwhile, and so may the connection: each
    line runs all the same, and once. With --wait, the results are written in the order of the input, with what
    --keep-columns adds; after Ctrl-C, the same command with --resume goes on. An output that exists is replaced with
    --force only. Without --wait, the id of the batch is printed: the same command with --batch ID sends what is
    missing. A line of JSON with a `message` is a whole job, with `meta` and queues of its own. Exit codes: 0, all
    succeeded; 1, the service refused, or something failed here; 2, wrong usage; 4, some lines have errors; 5, the
    service was away.

    [bold]Examples[/bold]

    modalkit submit reviews.parquet --column review --wait --output scored.jsonl --keep-columns

    zcat lines.jsonl.gz | modalkit submit - --format jsonl --url http://127.0.0.1:9000
    """
    if output_path is not None and not wait:
        raise typer.BadParameter("results are written with --wait only: add it, or leave --output out")
    if resume and output_path is None:
        raise typer.BadParameter("there is no output to go on with: give --output", param_hint="--resume")
    if batch is not None and not re.fullmatch(BATCH_ID_PATTERN, batch):
        raise typer.BadParameter(
            "it must be 1 to 100 letters, digits, dots, hyphens or underscores", param_hint="--batch"
        )
    require_file(path, "FILE")
    begun_by: dict[str, Any] = {
        "command": "submit",
        "input": identity_of(path),
        "--format": file_format,
        "--column": column,
        "--keep-columns": keep_columns,
        "--model": model,
    }
    if batch is not None:
        begun_by["--batch"] = batch
    before = interrupted_run(output_path, begun_by, resume=resume, force=force) if output_path is not None else {}
    batch_id = begun_by["--batch"] = batch or before.get("--batch") or new_job_id()
    header = Settings.load(config).app_settings.auth_config.auth_header
    client = JobsClient.of_service(url or DEFAULT_URL, key, header)
    query = {} if model is None else {"model_name": model}
    schemas = _schemas_of(JobsClient.of_service(url or DEFAULT_URL, key, header), model)
    fields, results = fields_of(schemas.input), fields_of(schemas.output)
    records, total = open_input(path, file_format, fields, column)
    queues = {"success_queue": success_queue, "failure_queue": failure_queue}
    started_s = time.perf_counter()
    writing = result_file(output_path, fields=results, run=begun_by, resume=resume, force=force)
    with writing if wait else nullcontext() as writer, progress_of_lines() as progress:
        done = 0 if writer is None else writer.done
        after = deque(islice(records, done), maxlen=1)  # the last one that has a result
        task = progress.add_task("Running" if wait else "Sending", total=total, completed=done)

        async def run() -> BatchRun:
            async with client.http as http:
                batch_run = BatchRun(
                    client=client,
                    http=http,
                    batch_id=batch_id,
                    fields=fields,
                    job={name: queue for name, queue in queues.items() if queue is not None},
                    query=query,
                    headers={"X-Priority": priority},
                    writer=writer,
                    kept_beside=results if keep_columns else None,
                    patience_s=patience,
                    done=done,
                    on_progress=partial(progress.update, task) if notices.is_terminal else None,
                )
                await batch_run.run(records, after[0].line if after else 0)
                return batch_run

        ran = anyio.run(run)
    _report(ran, time.perf_counter() - started_s, done, waited=wait)
    if ran.failed:
        raise typer.Exit(EXIT_LINES_FAILED)


def _schemas_of(client: JobsClient, model: str | None) -> _ModelSchemas:
    """The schemas of a model's items and results. Raises `JobsError`, and `UsageError` for an unknown model."""
    with client.opened():
        models = client.send(_Description, "GET", "/openapi.json").models
    if model is None:
        return next(iter(models.values()))
    if model not in models:
        raise UsageError(f"{client.name} has no model {model!r}; it has: {', '.join(models)}")
    return models[model]


def _report(ran: BatchRun, elapsed_s: float, before: int, *, waited: bool) -> None:
    """Print the figures on standard error and, where nobody waited, the batch on standard output."""
    lines = ran.written if waited else ran.sent
    rate = lines / elapsed_s if elapsed_s else 0.0
    beside = f", after {before} of the run before" if before else ""
    notices.print(
        f"Batch {ran.batch_id}: {lines} lines {'done' if waited else 'sent'} in {elapsed_s:.1f} s ({rate:.0f} lines/s)"
        f"{beside}, {ran.failed} of them with errors"
    )
    if not waited:
        typer.echo(ran.batch_id)
