"""``modalkit predict``: run a model over many items, through the scheduler at full speed."""

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from io import TextIOWrapper
from itertools import chain, islice
from pathlib import Path
from typing import Annotated, Any, TextIO

import anyio
import typer
from anyio import to_thread
from pydantic import BaseModel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from modalkit.batching import BatchRecord, Failure, Outcome, Priority, SchedulerStatistics
from modalkit.batching.task_groups import plain_task_group
from modalkit.pipelines import InferenceOutputModel, InferencePipeline
from modalkit.service.cli.common import ConfigFiles, ModelOption, model_source, notices, whole_file
from modalkit.service.cli.records import (
    KEEP_BAD_BYTES,
    ColumnOption,
    FileFormat,
    FormatOption,
    Record,
    Writer,
    kept_columns,
    output_format,
    read_file,
    read_records,
    result_writer,
)
from modalkit.service.errors import OutputNotJsonError, describe_error
from modalkit.service.outputs import output_object
from modalkit.service.settings import Settings
from modalkit.service.worker import InferenceWorker, short_lived_worker

MAX_CHUNK_ITEMS = 4096
SHOWN_ERRORS = 20
COLUMNS = (
    TextColumn("{task.description}"),
    BarColumn(),
    MofNCompleteColumn(),
    TaskProgressColumn(show_speed=True),
    TimeRemainingColumn(),
)


def predict(
    texts: Annotated[list[str] | None, typer.Argument(help="Texts to run.")] = None,
    input_path: Annotated[
        Path | None,
        typer.Option("--input", "-i", help="A .txt, .jsonl or .csv file; - is standard input."),
    ] = None,
    output_path: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="A .jsonl or .csv file for the results; standard output if left out."),
    ] = None,
    file_format: FormatOption = None,
    column: ColumnOption = None,
    keep_columns: Annotated[
        bool, typer.Option("--keep-columns", help="Write the columns (or keys) of the input before each result.")
    ] = False,
    config: ConfigFiles = None,
    model: ModelOption = None,
) -> None:
    """Run a model over texts and write one result for each, in the same order.

    Results are JSON, one a line; CSV where the output file is called .csv. A line that cannot be read, or fails, gets
    an error in its place, is reported with its number on standard error, and makes the exit code 1. The output file
    takes its name at the end, and may be that of the input. With --keep-columns, a column of the input whose name a
    result has too is written as input_NAME.

    [bold]Examples[/bold]

    modalkit predict "What a lovely day!" "It could be worse."

    modalkit predict --input reviews.csv --column review --output scored.csv --keep-columns

    cat lines.txt | modalkit predict > scored.jsonl
    """
    if texts and input_path is not None:
        raise typer.BadParameter("give texts or --input, not both")
    if not texts and input_path is None and sys.stdin.isatty():
        raise typer.BadParameter("there is nothing to read: give texts, --input FILE, or pipe lines in")
    written = output_format(output_path)
    settings = Settings.load(config)
    source = model_source(settings, model)
    records, total = _open_input(texts, input_path, file_format, source.input_model, column)
    with nullcontext(_use_utf8(sys.stdout)) if output_path is None else whole_file(output_path) as out:
        with notices.status(f"Loading {source.model_name} ..."):
            pipeline = source.load()
        with (
            Progress(*COLUMNS, console=notices, transient=True, disable=not notices.is_terminal) as progress,
            result_writer(out, written, source.output_model) as writer,
        ):
            progress.add_task("Running", total=total)
            run = _Run(writer, progress, source.settings, source.output_model if keep_columns else None)
            anyio.run(run.score, pipeline, records)
        out.flush()
    run.report(single=bool(texts))
    if run.failed:
        raise typer.Exit(1)


def _open_input(
    texts: list[str] | None,
    path: Path | None,
    file_format: FileFormat | None,
    input_model: type[BaseModel],
    column: str | None,
) -> tuple[Iterator[Record], int | None]:
    """The records, and their number where it is known before they are read."""
    if texts:
        return read_records(texts, FileFormat.TXT, input_model, None), len(texts)
    if path is None or str(path) == "-":
        return read_records(_use_utf8(sys.stdin), file_format or FileFormat.TXT, input_model, column), None
    if not path.is_file():
        raise typer.BadParameter(f"there is no file {path}; check its name", param_hint="--input")
    with path.open("rb") as counted:
        lines = sum(chunk.count(b"\n") for chunk in iter(lambda: counted.read(2**20), b""))
    records = read_file(path, file_format, input_model, column)
    # The first record is read now, so that a CSV file without the column is refused before the model is loaded.
    return chain(list(islice(records, 1)), records), lines


def _use_utf8(stream: TextIO) -> TextIO:
    if isinstance(stream, TextIOWrapper):
        stream.reconfigure(encoding="utf-8", errors=KEEP_BAD_BYTES, newline="")
    return stream


@dataclass(slots=True)
class _Chunk:
    """Consecutive records, and their outcomes once `done` is set."""

    records: list[Record]
    outcomes: list[Outcome[InferenceOutputModel]] = field(default_factory=list)
    done: anyio.Event = field(default_factory=anyio.Event)

    async def run(self, worker: InferenceWorker) -> None:
        items = [record.item for record in self.records if record.item is not None]
        self.outcomes = await worker.predict_many(items, priority=Priority.BULK)
        self.done.set()


@dataclass(slots=True)
class _Run:
    """One run of a model over many records, and its figures.

    With the model's output model, the columns of the input are kept.
    """

    writer: Writer
    progress: Progress
    settings: Settings
    keeps_beside: type[BaseModel] | None = None
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
            if record.item is None:
                self.progress.advance(self.progress.task_ids[0])
            result = _result(record, outcomes)
            kept = {} if self.keeps_beside is None else kept_columns(record, self.keeps_beside)
            self.writer({**kept, **result})
            self.written += 1
            if result["status"] == "error":
                self.failed += 1
                if self.failed <= SHOWN_ERRORS:
                    self.progress.console.print(f"line {record.line}: {result['error']}", markup=False)

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
    if record.item is None:
        error = record.error
    elif isinstance(outcome := next(outcomes), Failure):
        error = describe_error(outcome.error)
    else:
        try:
            return output_object(outcome.value)
        except OutputNotJsonError as not_json:
            error = describe_error(not_json)
    return {"status": "error", "error": error}
