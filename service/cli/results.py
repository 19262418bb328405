"""Writes results, one for each item in the order of the input, to a file that takes its name at the end.

Until then they are in a file beside it, as JSON lines. Its first line says which run they are of, for --resume.
"""

import csv
import fcntl
import gzip
import hashlib
import json
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum
from itertools import islice
from pathlib import Path
from typing import IO, Annotated, Any, TextIO, cast

import typer

from modalkit.pipelines.files import naming_full_disk, replacing
from modalkit.service.cli.common import notices
from modalkit.service.cli.records import InputError, require_parquet

JSON_LINES_SUFFIXES = ("", ".json", ".jsonl", ".ndjson")
ROWS_PER_WRITE = 10_000
INPUT_DIGEST_BYTES = 2**20

OutputOption = Annotated[
    Path | None,
    typer.Option("--output", "-o", help="A .jsonl, .csv or .parquet file for results; standard output if left out."),
]
KeepColumnsOption = Annotated[
    bool, typer.Option("--keep-columns", help="Write the columns (or keys) of the input before each result.")
]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Go on with the output of an interrupted run.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace an output file that exists.")]


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
    written: int = 0
    """How many results this run has written."""

    def write(self, result: Mapping[str, Any]) -> None:
        """Add a result."""
        self.stream.write(json.dumps(result, ensure_ascii=False) + "\n")
        self.written += 1


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


def identity_of(path: Path) -> str:
    """What tells an input file from others: its name, its size and the digest of its beginning."""
    if str(path) == "-":
        return "standard input"
    with path.open("rb") as file:
        digest = hashlib.sha256(file.read(INPUT_DIGEST_BYTES)).hexdigest()
    return f"{path.name} of {path.stat().st_size} bytes, SHA-256 of the first MiB {digest[:12]}"


def interrupted_run(path: Path, run: Mapping[str, Any], *, resume: bool, force: bool) -> dict[str, Any]:
    """What the first line beside the output at `path` says of the run that was interrupted; empty where there is none.

    `run` has the input and the options of this run. Raises `InputError` where the output exists, unless `force` is set;
    where another run goes on; and where one was interrupted, unless `resume` is set and that run had the same input and
    options.
    """
    partial = _partial_of(path)
    if not partial.parent.is_dir():
        raise InputError(f"there is no folder {partial.parent}: make it, or choose another output")
    if not partial.exists():
        if path.is_file() and path.stat().st_size and not force:
            raise InputError(f"{path} exists already: choose another output, or replace it with --force")
        return {}
    with partial.open("rb") as stream:
        _lock(stream, partial)  # until it is read
        first = stream.readline()
    if not resume:
        raise InputError(
            f"{partial} is from a run that was interrupted: go on with --resume, or remove it to begin anew"
        )
    if not first.endswith(b"\n"):
        return {}  # it was killed before it had sent anything
    found: Any = None
    with suppress(ValueError):
        found = json.loads(first)
    if not isinstance(found, dict):
        raise InputError(f"{partial} is from no run: move it away, or choose another output")
    for name, value in run.items():
        if found.get(name) != value:
            before, now = (_in_words(name, given) for given in (found.get(name), value))
            raise InputError(
                f"{partial} is from a run {before}, and this run is {now}: repeat the command that was interrupted, or "
                "remove the file to begin anew"
            )
    return found


def _in_words(name: str, value: Any) -> str:
    return f"with {name}" if value is True else f"with {name} {value}" if value else f"without {name}"


def _partial_of(path: Path) -> Path:
    target = path.resolve()
    return target.with_name(f"{target.name}.partial")


def _lock(stream: IO[Any], partial: Path) -> None:
    """Lock a file until it is closed. Raises `InputError` where another run has it."""
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"another run writes {partial}; wait for it, or choose another output") from None


@contextmanager
def result_file(
    path: Path | None, *, fields: Sequence[str], run: Mapping[str, Any], resume: bool = False, force: bool = False
) -> Iterator[ResultWriter]:
    """What writes results to `path`, or to standard output; JSON lines, CSV or Parquet by its name, compressed by .gz.

    Results are written to a file beside it and take the place of `path` when the block ends without an exception: so
    the output may be the input. When the block raises, they stay there, and so does a file without results once the
    writer `is_begun`; with `resume`, the next run adds to them, and `done` says how many there are. `run` has the
    input and the options of this run, which must be the same then. CSV has the `fields` of results and all others that
    they have. A path that is no regular file (a pipe, a terminal) is written directly. Raises `InputError`, also as
    `interrupted_run` does, and ``OSError`` at the start where nothing can be written.
    """
    file_format = output_format(path)
    if path is None:
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape", newline="")
        with naming_full_disk("standard output"):
            yield ResultWriter(sys.stdout)
            sys.stdout.flush()
        return
    if path.exists() and not path.is_file():
        with naming_full_disk(path), path.open("w", encoding="utf-8", newline="") as special:
            yield ResultWriter(special)
        return
    interrupted_run(path, run, resume=resume, force=force)
    partial = _partial_of(path)
    with naming_full_disk(partial), partial.open("a+", encoding="utf-8", newline="") as stream:
        _lock(stream, partial)
        lines = _whole_lines(stream)
        if not lines:
            stream.write(json.dumps(run) + "\n")  # in ASCII: the name of a file may be no UTF-8
            stream.flush()
        writer = ResultWriter(stream, max(0, lines - 1))
        try:
            yield writer
            stream.flush()
            _finish(partial, path.resolve(), file_format, fields)
        except BaseException:
            with suppress(OSError):  # the disk is full: what fits is there
                stream.flush()
            if writer.done or writer.written or writer.is_begun:
                notices.print(f"What was written is in {partial}: --resume goes on with it")
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
    with replacing(target) as new:
        if file_format is OutputFormat.PARQUET:
            _write_parquet(partial, new)
        else:
            opened = gzip.open if target.suffix.lower() == ".gz" else open
            with opened(new, "wt", encoding="utf-8", newline="") as out:
                if file_format is OutputFormat.CSV:
                    _write_csv(partial, out, fields)
                else:
                    with _results(partial) as lines:
                        shutil.copyfileobj(lines, out)
    partial.unlink(missing_ok=True)


@contextmanager
def _results(partial: Path) -> Iterator[TextIO]:
    """The lines of results, behind the first one."""
    with partial.open(encoding="utf-8", newline="\n") as lines:
        lines.readline()
        yield lines


def _rows(partial: Path) -> Iterator[dict[str, Any]]:
    with _results(partial) as lines:
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


def _write_parquet(partial: Path, new: Path) -> None:
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
    with ParquetWriter(new, schema) as writer:
        for table in tables(schema):
            writer.write_table(table)


def _parquet_cell(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else value
