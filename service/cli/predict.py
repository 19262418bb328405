"""``modalkit predict``: run a model over many items, through the scheduler at full speed."""

import shutil
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from io import TextIOWrapper
from itertools import chain, count, islice
from pathlib import Path
from typing import Annotated, Any, TextIO

import anyio
import typer
from anyio import to_thread
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from modalkit.batching import Failure, Outcome, Priority, SchedulerStatistics
from modalkit.batching.task_groups import plain_task_group
from modalkit.pipelines import InferenceOutputModel, InferencePipeline
from modalkit.service.cli.common import ColumnOption, ConfigFiles, FormatOption, ModelOption, model_source, notices
from modalkit.service.cli.records import (
    KEEP_BAD_BYTES,
    FileFormat,
    Record,
    Writer,
    format_of,
    make_writer,
    read_records,
)
from modalkit.service.errors import OutputNotJsonError, describe_error
from modalkit.service.outputs import output_object
from modalkit.service.settings import Settings
from modalkit.service.worker import InferenceWorker, short_lived_worker

MAX_CHUNK_ITEMS = 4096
MAX_CHUNKS = 2
SHOWN_ERRORS = 20


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


def _result(record: Record, outcomes: Iterator[Outcome[InferenceOutputModel]]) -> Mapping[str, Any]:
    """The result of a record as it is written; `outcomes` has the next one for each valid record."""
    if record.item is None:
        return {"status": "error", "error": record.error}
    outcome = next(outcomes)
    error: Exception
    try:
        if not isinstance(outcome, Failure):
            return output_object(outcome.value)
        error = outcome.error
    except OutputNotJsonError as not_json:
        error = not_json
    return {"status": "error", "error": describe_error(error)}


def predict(
    texts: Annotated[list[str] | None, typer.Argument(help="Texts to run.")] = None,
    input_path: Annotated[
        Path | None,
        typer.Option("--input", "-i", help="A .txt, .jsonl or .csv file; - is standard input.", allow_dash=True),
    ] = None,
    output_path: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Where results go; standard output if left out."),
    ] = None,
    file_format: FormatOption = None,
    column: ColumnOption = None,
    config: ConfigFiles = None,
    model: ModelOption = None,
) -> None:
    """Run a model over texts and write one result for each, in the same order.

    Results are JSON, one a line; CSV where the output file is called .csv. A line that cannot be read, or fails, gets
    an error in its place, is reported with its number on standard error, and makes the exit code 1. The output file
    takes its name at the end, and may be that of the input.

    [bold]Examples[/bold]

    modalkit predict "What a lovely day!" "It could be worse."

    modalkit predict --input reviews.csv --column review --output scored.csv

    cat lines.txt | modalkit predict > scored.jsonl
    """
    if texts and input_path is not None:
        raise typer.BadParameter("give texts or --input, not both")
    if not texts and input_path is None and sys.stdin.isatty():
        raise typer.BadParameter("there is nothing to read: give texts, --input FILE, or pipe lines in")
    settings = Settings.load(config)
    source = model_source(settings, model)
    with ExitStack() as files:
        records, total = _open_input(files, texts, input_path, file_format, source.input_model, column)
        out: TextIO = _use_utf8(sys.stdout)
        if output_path is not None:
            out = files.enter_context(whole_file(output_path))
        is_csv = output_path is not None and output_path.suffix.lower() == ".csv"
        with notices.status(f"Loading {source.model_name} ..."):
            pipeline = source.load()
        writer = make_writer(out, FileFormat.CSV if is_csv else FileFormat.JSONL, source.output_model)
        run = _Run(writer, _progress(files, total), settings)
        anyio.run(run.score, pipeline, records)
        out.flush()
    run.report(single=bool(texts))
    if run.failed:
        raise typer.Exit(1)


def _open_input(
    files: ExitStack,
    texts: list[str] | None,
    path: Path | None,
    file_format: FileFormat | None,
    input_model: Any,
    column: str | None,
) -> tuple[Iterator[Record], int | None]:
    """The records, and their number where it is known before they are read."""
    if texts:
        return read_records(texts, FileFormat.TXT, input_model, None), len(texts)
    if path is None or str(path) == "-":
        return read_records(_use_utf8(sys.stdin), file_format or FileFormat.TXT, input_model, column), None
    chosen = format_of(path, file_format)
    with path.open("rb") as counted:
        lines = sum(chunk.count(b"\n") for chunk in iter(lambda: counted.read(2**20), b""))
    stream = files.enter_context(path.open(encoding="utf-8-sig", errors=KEEP_BAD_BYTES, newline=""))
    records = read_records(stream, chosen, input_model, column)
    # The first record is read now, so that a CSV file without the column is refused before the model is loaded.
    return chain(list(islice(records, 1)), records), lines


def _use_utf8(stream: TextIO) -> TextIO:
    if isinstance(stream, TextIOWrapper):
        stream.reconfigure(encoding="utf-8", errors=KEEP_BAD_BYTES, newline="")
    return stream


@dataclass(slots=True)
class _Run:
    """One run of a model over many records, and its figures."""

    writer: Writer
    progress: Progress
    settings: Settings
    failed: int = 0
    written: int = 0
    invalid: int = 0
    elapsed_s: float = 0.0
    statistics: SchedulerStatistics | None = None

    async def score(self, pipeline: InferencePipeline, records: Iterator[Record]) -> None:
        """Run all records, a few chunks at a time, and write their results in order."""
        chunk_size = min(MAX_CHUNK_ITEMS, self.settings.app_settings.batch_config.max_queue_size // MAX_CHUNKS)
        async with short_lived_worker(pipeline, self.settings) as worker, plain_task_group() as task_group:
            started_s = time.perf_counter()
            waiting: deque[_Chunk] = deque()
            while chunk_records := await to_thread.run_sync(lambda: list(islice(records, max(1, chunk_size)))):
                chunk = _Chunk(chunk_records)
                self.invalid += sum(record.item is None for record in chunk_records)
                task_group.start_soon(chunk.run, worker)
                waiting.append(chunk)
                if len(waiting) == MAX_CHUNKS:
                    await self._write(waiting.popleft(), worker)
            while waiting:
                await self._write(waiting.popleft(), worker)
            self.elapsed_s = time.perf_counter() - started_s
            self.statistics = worker.statistics()

    async def _write(self, chunk: _Chunk, worker: InferenceWorker) -> None:
        is_done = False
        while not is_done:
            with anyio.move_on_after(0.2):
                await chunk.done.wait()
            is_done = chunk.done.is_set()
            done = worker.statistics()
            self.progress.update(self.progress.task_ids[0], completed=done.succeeded + done.failed + self.invalid)
        outcomes = iter(chunk.outcomes)
        for record in chunk.records:
            result = _result(record, outcomes)
            self.writer(result)
            self.written += 1
            if result["status"] == "error":
                self.failed += 1
                if self.failed <= SHOWN_ERRORS:
                    self.progress.console.print(f"line {record.line}: {result['error']}", markup=False)

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


def _progress(files: ExitStack, total: int | None) -> Progress:
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TaskProgressColumn(show_speed=True),
        TimeRemainingColumn(),
        console=notices,
        transient=True,
        disable=not notices.is_terminal,
    )
    progress.add_task("Running", total=total)
    return files.enter_context(progress)


@contextmanager
def whole_file(path: Path) -> Iterator[TextIO]:
    """A stream whose content replaces the file at `path` when the block ends without an exception.

    Until then the file stays as it was, so it may be the input as well. When the block raises, what was written is kept
    beside the file, and a notice says where. A path that is no regular file (a pipe, a terminal) is written directly.
    Raises ``OSError`` at the start where nothing can be written.
    """
    if path.exists() and not path.is_file():
        with path.open("w", encoding="utf-8", newline="") as special:
            yield special
        return
    target = path.resolve()
    partial, stream = _open_beside(target)
    try:
        with stream:
            if target.exists():
                shutil.copymode(target, partial)
            yield stream
        partial.replace(target)
    except BaseException:
        if partial.stat().st_size:
            notices.print(f"{path} is left as it was; what there is of the results is in {partial}")
        else:
            partial.unlink()
        raise


def _open_beside(target: Path) -> tuple[Path, TextIO]:
    """A new file in the folder of `target`, with the first name that is free."""
    for number in count():
        partial = target.with_name(f"{target.name}.{number}.partial")
        try:
            return partial, partial.open("x", encoding="utf-8", newline="")
        except FileExistsError:
            continue
    raise AssertionError("unreachable: there is always another number")
