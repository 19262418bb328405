"""Writes results, one for each item in the order of the input, to a file that takes its name at the end."""

import csv
import fcntl
import gzip
import json
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from itertools import islice
from pathlib import Path
from typing import IO, Annotated, Any, TextIO, cast
from uuid import uuid4

import typer

from modalkit.service.cli.common import notices
from modalkit.service.cli.records import InputError, require_parquet

JSON_LINES_SUFFIXES = ("", ".json", ".jsonl", ".ndjson")
ROWS_PER_WRITE = 10_000
PARTIAL = ".partial"


OutputOption = Annotated[
    Path | None,
    typer.Option("--output", "-o", help="A .jsonl, .csv or .parquet file for results; standard output if left out."),
]
KeepColumnsOption = Annotated[
    bool, typer.Option("--keep-columns", help="Write the columns (or keys) of the input before each result.")
]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Go on with the output of an interrupted run.")]


class OutputFormat(StrEnum):
    """How results are written."""

    JSONL = "jsonl"
    CSV = "csv"
    PARQUET = "parquet"


@dataclass(slots=True)
class ResultWriter:
    """Writes results as JSON, one a line."""

    stream: TextIO
    done: int = 0
    """How many results there are from a run that was interrupted."""
    is_begun: bool = False
    """Whether there is something to go on with, though no result was written yet."""

    def write(self, result: Mapping[str, Any]) -> None:
        """Add a result."""
        self.stream.write(json.dumps(result, ensure_ascii=False) + "\n")


def output_format(path: Path | None) -> OutputFormat:
    """The format of results by the name of their file, without .gz. Raises `InputError` for any other name."""
    if path is None or (path.exists() and not path.is_file()):
        return OutputFormat.JSONL
    suffix = (path.with_suffix("") if path.suffix.lower() == ".gz" else path).suffix.lower()
    if suffix in JSON_LINES_SUFFIXES:
        return OutputFormat.JSONL
    if suffix == ".parquet":
        require_parquet(path)
    if suffix in (".csv", ".parquet"):
        return OutputFormat(suffix.removeprefix("."))
    raise InputError(
        f"cannot write {suffix} files: results are JSON lines, CSV or Parquet; call the output {path.stem}.jsonl, "
        f"{path.stem}.csv or {path.stem}.parquet"
    )


def refuse_leftovers(path: Path, *, resume: bool) -> list[Path]:
    """The file of an interrupted run beside the output, or none. Raises `InputError` unless it is to be resumed."""
    target = path.resolve()
    beside = target.parent.iterdir() if target.parent.is_dir() else ()
    own, compressed = f"{target.name}.", f"{target.name}.gz."  # the second are files of another output
    names = [each.name for each in beside if each.name.startswith(own) and not each.name.startswith(compressed)]
    found = [target.with_name(name) for name in sorted(names) if name.endswith(PARTIAL)]
    if found and not resume:
        raise InputError(
            f"{found[0]} is from a run that was interrupted: go on with --resume, or remove it to begin anew"
        )
    if len(found) > 1:
        raise InputError(f"several runs were interrupted: {', '.join(map(str, found))}; remove all but one of them")
    return found


@contextmanager
def result_file(
    path: Path | None, *, fields: Sequence[str], resume: bool = False, run_id: str | None = None
) -> Iterator[ResultWriter]:
    """What writes results to `path`, or to standard output; JSON lines, CSV or Parquet by its name, compressed by .gz.

    Results are written to a file beside it, with `run_id` in its name, and take the place of `path` when the block ends
    without an exception: so the output may be the input. When the block raises, they stay there, and so does an empty
    file once the writer `is_begun`; with `resume`, the next run adds to them, and `done` says how many there are. CSV
    has the `fields` of results and all others that they have. A path that is no regular file (a pipe, a terminal) is
    written directly. Raises `InputError` and ``OSError`` at the start where nothing can be written.
    """
    file_format = output_format(path)
    if path is None:
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape", newline="")
        yield ResultWriter(sys.stdout)
        sys.stdout.flush()
        return
    if path.exists() and not path.is_file():
        with path.open("w", encoding="utf-8", newline="") as special:
            yield ResultWriter(special)
        return
    refuse_leftovers(path, resume=resume)
    target = path.resolve()
    partial = target.with_name(f"{target.name}{'' if run_id is None else f'.{run_id}'}{PARTIAL}")
    with partial.open("a+", encoding="utf-8", newline="") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"another run writes {partial}; wait for it, or choose another output") from None
        writer = ResultWriter(stream, _whole_lines(stream))
        try:
            yield writer
            stream.flush()
            _finish(partial, target, file_format, fields)
        except BaseException:
            stream.flush()
            if partial.stat().st_size or writer.is_begun:
                notices.print(f"{path} is left as it was; what was written is in {partial}: --resume goes on with it")
            else:
                partial.unlink()
            raise


def _whole_lines(stream: TextIO) -> int:
    """How many lines a stream has; one that was cut is removed."""
    stream.seek(0)
    binary = cast("IO[bytes]", stream.buffer)
    lines = end = 0
    for line in binary:
        if line.endswith(b"\n"):
            lines, end = lines + 1, end + len(line)
    stream.seek(0)
    stream.truncate(end)
    stream.seek(end)
    return lines


def _finish(partial: Path, target: Path, file_format: OutputFormat, fields: Sequence[str]) -> None:
    """Put the results in `partial` in the place of `target`, in its format."""
    whole, is_compressed = partial, target.suffix.lower() == ".gz"
    if file_format is not OutputFormat.JSONL or is_compressed:
        whole = target.with_name(f"{target.name}.{uuid4().hex[:8]}.tmp")
    try:
        if file_format is OutputFormat.PARQUET:
            _write_parquet(partial, whole)
        elif whole is not partial:
            opened = gzip.open if is_compressed else open
            with opened(whole, "wt", encoding="utf-8", newline="") as out:
                if file_format is OutputFormat.CSV:
                    _write_csv(partial, out, fields)
                else:
                    with partial.open(encoding="utf-8", newline="") as lines:
                        shutil.copyfileobj(lines, out)
        if target.exists():
            shutil.copymode(target, whole)
        whole.replace(target)
    except BaseException:
        if whole is not partial:
            whole.unlink(missing_ok=True)
        raise
    partial.unlink(missing_ok=True)


def _rows(partial: Path) -> Iterator[dict[str, Any]]:
    with partial.open(encoding="utf-8", newline="\n") as lines:
        yield from map(json.loads, lines)


def _write_csv(partial: Path, out: TextIO, fields: Sequence[str]) -> None:
    columns: dict[str, None] = {}
    for row in _rows(partial):
        columns.update(dict.fromkeys(row))
    writer = csv.DictWriter(out, list(columns | dict.fromkeys(fields)), lineterminator="\n")
    writer.writeheader()
    for row in _rows(partial):
        writer.writerow({name: _cell(value) for name, value in row.items()})


def _cell(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else value


def _write_parquet(partial: Path, whole: Path) -> None:
    """Write rows as Parquet; objects, which columns of one type do not take, as JSON."""
    import pyarrow as pa
    from pyarrow.parquet import ParquetWriter

    def tables(schema: Any = None) -> Iterator[Any]:
        rows = _rows(partial)
        while some := list(islice(rows, ROWS_PER_WRITE)):
            plain = [{name: _parquet_cell(value) for name, value in row.items()} for row in some]
            names = dict.fromkeys(name for row in plain for name in row)
            columns = {name: [row.get(name) for row in plain] for name in (schema.names if schema else names)}
            yield pa.table(columns, schema=schema)

    schema = pa.schema([])
    for table in tables():
        schema = pa.unify_schemas([schema, table.schema], promote_options="permissive")
    with ParquetWriter(whole, schema) as writer:
        for table in tables(schema):
            writer.write_table(table)


def _parquet_cell(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else value
