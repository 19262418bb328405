"""``modalkit predict``: run a model over many items, through the scheduler at full speed."""

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import anyio
import typer
from anyio import to_thread
from rich.progress import Progress

from modalkit.batching import BatchRecord, Failure, Outcome, Priority, SchedulerStatistics
from modalkit.batching.task_groups import plain_task_group
from modalkit.pipelines import InferenceOutputModel, InferencePipeline
from modalkit.service.cli.common import (
    EXIT_LINES_FAILED,
    SHOWN_ERRORS,
    ConfigFiles,
    ModelOption,
    model_source,
    notices,
    progress_of_lines,
)
from modalkit.service.cli.records import (
    ColumnOption,
    FileFormat,
    FormatOption,
    Record,
    fields_of,
    kept_columns,
    open_input,
    read_records,
    require_file,
    validated,
)
from modalkit.service.cli.results import (
    ForceOption,
    KeepColumnsOption,
    OutputOption,
    ResultWriter,
    ResumeOption,
    identity_of,
    result_file,
)
from modalkit.service.errors import OutputNotJsonError, describe_error
from modalkit.service.outputs import output_object
from modalkit.service.settings import Settings
from modalkit.service.validation import documented_model
from modalkit.service.worker import InferenceWorker, short_lived_worker

MAX_CHUNK_ITEMS = 4096


def predict(
    texts: Annotated[list[str] | None, typer.Argument(help="Texts to run; - alone is standard input.")] = None,
    input_path: Annotated[
        Path | None,
        typer.Option("--input", "-i", help="A .txt, .jsonl, .csv or .parquet file, or .gz of it; - is standard input."),
    ] = None,
    output_path: OutputOption = None,
    file_format: FormatOption = None,
    column: ColumnOption = None,
    keep_columns: KeepColumnsOption = False,
    resume: ResumeOption = False,
    force: ForceOption = False,
    config: ConfigFiles = None,
    model: ModelOption = None,
) -> None:
    """Run a model over texts and write one result for each, in the same order.

    Results are JSON, one a line; CSV or Parquet where the output file is called so, and compressed where it ends in
    .gz. A line that cannot be read, or fails, gets an error in its place, is reported with its number in the file on
    standard error, and makes the exit code 4. The output file takes its name at the end; until then, results are beside
    it, and --resume goes on with them. A file that exists is replaced with --force only. With --keep-columns, a column
    of the input whose name a result has too is written as input_NAME.

    [bold]Examples[/bold]

    modalkit predict "What a lovely day!" "It could be worse."

    modalkit predict --input reviews.csv --column review --output scored.csv --keep-columns

    cat lines.txt | modalkit predict > scored.jsonl
    """
    if texts == ["-"]:
        texts, input_path = None, input_path or Path("-")
    if texts and input_path is not None:
        raise typer.BadParameter("give texts or --input, not both")
    if not texts and input_path is None and sys.stdin.isatty():
        raise typer.BadParameter("there is nothing to read: give texts, --input FILE, or pipe lines in")
    if resume and output_path is None:
        raise typer.BadParameter("there is no output to go on with: give --output", param_hint="--resume")
    path = input_path or Path("-")
    require_file(path, "--input")
    settings = Settings.load(config)
    with redirect_stdout(sys.stderr):  # what a pipeline prints is no result
        source = model_source(settings, model)
    input_fields = fields_of(documented_model(source.input_model).model_json_schema())
    total: int | None = len(texts or ())
    if texts:
        records = read_records(texts, FileFormat.TXT, input_fields, None)
    else:
        records, total = open_input(path, file_format, input_fields, column)
    fields = list(source.output_model.model_fields)
    begun_by = {
        "command": "predict",
        "input": texts or identity_of(path),
        "--format": file_format,
        "--column": column,
        "--keep-columns": keep_columns,
        "--model": source.model_name,
    }
    writing = result_file(output_path, fields=fields, run=begun_by, resume=resume, force=force)
    with writing as writer, redirect_stdout(sys.stderr):
        with notices.status(f"Loading {source.model_name} ..."):
            pipeline = source.load()
        with progress_of_lines() as progress:
            progress.add_task("Running", total=total, completed=writer.done)
            run = _Run(writer, progress, source.settings, fields if keep_columns else None)
            anyio.run(run.score, pipeline, islice(validated(records, source.input_model), writer.done, None))
    run.report(single=bool(texts))
    if run.failed:
        raise typer.Exit(EXIT_LINES_FAILED)


@dataclass(slots=True)
class _Chunk:
    """Consecutive records, and their outcomes once `done` is set."""

    records: list[Record]
    outcomes: list[Outcome[InferenceOutputModel]] = field(default_factory=list)
    done: anyio.Event = field(default_factory=anyio.Event)

    async def run(self, worker: InferenceWorker) -> None:
        items = [record.item for record in self.records if record.error is None]
        self.outcomes = await worker.predict_many(items, priority=Priority.BULK)
        self.done.set()


@dataclass(slots=True)
class _Run:
    """One run of a model over many records, and its figures.

    With the fields of its outputs, the columns of the input are kept.
    """

    writer: ResultWriter
    progress: Progress
    settings: Settings
    keeps_beside: Sequence[str] | None = None
    failed: int = 0
    written: int = 0
    elapsed_s: float = 0.0
    statistics: SchedulerStatistics | None = None

    async def score(self, pipeline: InferencePipeline, records: Iterator[Record]) -> None:
        """Run all records, two chunks at a time, and write their results in order."""
        max_queue_size = self.settings.app_settings.batch_config.max_queue_size
        chunk_size = max(1, min(MAX_CHUNK_ITEMS, max_queue_size // 2))
        async with (
            short_lived_worker(pipeline, self.settings, on_batch=self._show_progress) as worker,
            plain_task_group() as task_group,
        ):
            started_s = time.perf_counter()
            chunk: _Chunk | None = None
            while chunk is None or chunk.records:
                before, chunk = chunk, _Chunk(await to_thread.run_sync(lambda: list(islice(records, chunk_size))))
                if before is not None and max_queue_size == 1:
                    await before.done.wait()  # the queue has no room for two
                task_group.start_soon(chunk.run, worker)
                if before is not None:
                    await self._write(before)
            self.elapsed_s = time.perf_counter() - started_s
            self.statistics = worker.statistics()

    async def _write(self, chunk: _Chunk) -> None:
        await chunk.done.wait()
        outcomes = iter(chunk.outcomes)
        for record in chunk.records:
            if record.error is not None:
                self.progress.advance(self.progress.task_ids[0])
            result = _result(record, outcomes)
            kept = {} if self.keeps_beside is None else kept_columns(record, self.keeps_beside)
            self.writer.write({**kept, **result})
            self.written += 1
            if result["status"] == "error":
                self.failed += 1
                if self.failed <= SHOWN_ERRORS:
                    self.progress.console.print(f"{record.place}: {result['error']}")

    def _show_progress(self, batch: BatchRecord) -> None:
        self.progress.advance(self.progress.task_ids[0], batch.count - batch.requeued)

    def report(self, *, single: bool) -> None:
        """Print the figures on standard error."""
        if self.failed > SHOWN_ERRORS:
            notices.print(f"... and {self.failed - SHOWN_ERRORS} more errors, each in its result's place")
        if single or self.statistics is None:
            return
        rate = self.written / self.elapsed_s if self.elapsed_s else 0.0
        notices.print(
            f"{self.written} items in {self.elapsed_s:.1f} s ({rate:.0f} items/s), {self.failed} of them with errors; "
            f"{self.statistics.batches} batches, {self.statistics.mean_batch_size:.1f} items each on average, "
            f"{self.statistics.padding_share:.0%} padding"
        )


def _result(record: Record, outcomes: Iterator[Outcome[InferenceOutputModel]]) -> Mapping[str, Any]:
    """The result of a record as it is written; `outcomes` has the next one for each valid record."""
    if record.error is not None:
        error = record.error
    elif isinstance(outcome := next(outcomes), Failure):
        error = describe_error(outcome.error)
    else:
        try:
            return output_object(outcome.value)
        except OutputNotJsonError as not_json:
            error = describe_error(not_json)
    return {"status": "error", "error": error}
