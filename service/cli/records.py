"""Reads items for a model from text files and writes their results."""

import csv
import json
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer
from pydantic import BaseModel, ValidationError
from pydantic_core import from_json, to_json

from modalkit.service.cli.common import one_of
from modalkit.service.errors import ServiceError
from modalkit.service.validation import field_errors, summary

KEEP_BAD_BYTES = "surrogateescape"
"""Bytes that are no UTF-8 become characters that `_record` refuses, so that only their line has an error."""

SPOOL_MEMORY_CHARACTERS = 2**24
"""Results of a CSV file that wait in memory for its header; more are in a temporary file."""
JSON_LINES_SUFFIXES = ("", ".json", ".jsonl", ".ndjson")

_BAD_BYTE = re.compile("[\udc80-\udcff]")


class FileFormat(StrEnum):
    """How a file holds its items: texts, or JSON objects or strings, one a line; or rows below a header line."""

    TXT = "txt"
    JSONL = "jsonl"
    CSV = "csv"


FormatOption = Annotated[
    FileFormat | None,
    typer.Option("--format", "-f", help="The input's format, where its name does not tell.", **one_of(FileFormat)),
]
ColumnOption = Annotated[str | None, typer.Option(help="The CSV column, or JSON key, that holds the text.")]


class InputError(ServiceError):
    """Raised when an input as a whole cannot be read: an unknown format, or a CSV file without the column."""


@dataclass(frozen=True, slots=True)
class Record:
    """One item of an input with its line; `error` says what is wrong where `item` is None.

    `columns` has the columns of its row, or the keys of its JSON object, whether the model has such fields or not.
    """

    line: int
    item: BaseModel | None
    error: str | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)


def read_file(
    path: Path, given: FileFormat | None, input_model: type[BaseModel], column: str | None
) -> Iterator[Record]:
    """The items of a file, in the format as `given` or else by its name; see `read_records`.

    Raises `InputError`, also for an unknown name, and ``OSError``.
    """
    suffix = path.suffix.lower().removeprefix(".")
    try:
        file_format = given or FileFormat("jsonl" if suffix == "ndjson" else suffix)
    except ValueError:
        raise InputError(f"cannot tell the format of {path} by its name; say --format txt, jsonl or csv") from None
    with path.open(encoding="utf-8-sig", errors=KEEP_BAD_BYTES, newline="") as lines:
        yield from read_records(lines, file_format, input_model, column)


def read_records(
    lines: Iterable[str], file_format: FileFormat, input_model: type[BaseModel], column: str | None
) -> Iterator[Record]:
    """The items of a text file, or of other lines; an invalid one is a `Record` with an error. Raises `InputError`.

    A plain text becomes the model's field `text`, or its only field. `column` names the column of a CSV file (the key
    of a JSON object) that holds the text; without it, all columns that the model has fields for are taken.
    """
    fields = list(input_model.model_fields)
    text_field = fields[0] if len(fields) == 1 else "text"
    if file_format is FileFormat.CSV:
        yield from _csv_records(lines, input_model, text_field, column)
        return
    for line, text in enumerate((text.rstrip("\r\n") for text in lines), start=1):
        if file_format is FileFormat.TXT:
            yield _record(line, {text_field: text}, input_model)
            continue
        try:
            value = from_json(text)
        except ValueError as error:
            yield Record(line, None, f"not JSON: {error}")
            continue
        if isinstance(value, str):
            yield _record(line, {text_field: value}, input_model)
        elif column is not None and isinstance(value, dict):
            yield _record(line, {text_field: value[column]} if column in value else {}, input_model, value)
        else:
            yield _record(line, value, input_model)


def _record(line: int, value: Any, input_model: type[BaseModel], columns: Any = None) -> Record:
    """The record of an item; `columns` has what its line holds, where that is more than the item."""
    columns = value if columns is None else columns
    columns = columns if isinstance(columns, dict) else {}
    for name, text in value.items() if isinstance(value, dict) else ():
        if isinstance(text, str) and _BAD_BYTE.search(text):
            return Record(line, None, f"{name}: is not UTF-8; convert the input to UTF-8", columns)
    try:
        return Record(line, input_model.model_validate(value), columns=columns)
    except ValidationError as error:
        return Record(line, None, summary(field_errors(error.errors(include_url=False), input_model)), columns)


def _csv_records(
    lines: Iterable[str], input_model: type[BaseModel], text_field: str, column: str | None
) -> Iterator[Record]:
    reader = csv.DictReader(lines)
    header = list(reader.fieldnames or ())
    fields = [text_field] if column is not None else [*input_model.model_fields] or [text_field]
    columns = {field: column or field for field in fields if (column or field) in header}
    if not columns:
        wanted = ", ".join(repr(column or field) for field in fields)
        raise InputError(f"the CSV header has no column {wanted}; it has {header}: name the text's with --column")
    while True:
        first_line = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield Record(first_line, None, f"not CSV: {error}")
        else:
            given = {field: row[name] for field, name in columns.items() if row[name] is not None}
            yield _record(first_line, given, input_model, {name: row[name] for name in header if row[name] is not None})


def kept_columns(record: Record, output_model: type[BaseModel]) -> dict[str, Any]:
    """The columns of a record as they are written beside its result; `input_NAME` where results have a field NAME.

    What is not UTF-8 is replaced, and numbers that JSON does not have are null.
    """
    fields = output_model.model_fields
    plain = {
        _readable(f"input_{name}" if name in fields else name): _readable(value)
        for name, value in record.columns.items()
    }
    kept: dict[str, Any] = from_json(to_json(plain, inf_nan_mode="null"))
    return kept


def _readable(value: Any) -> Any:
    return _BAD_BYTE.sub("\N{REPLACEMENT CHARACTER}", value) if isinstance(value, str) else value


Writer = Callable[[Mapping[str, Any]], object]


def output_format(path: Path | None) -> FileFormat:
    """The format of results by the name of their file: CSV, or JSON lines. Raises `InputError` for any other name."""
    suffix = "" if path is None else path.suffix.lower()
    if suffix == ".csv":
        return FileFormat.CSV
    if path is None or suffix in JSON_LINES_SUFFIXES or (path.exists() and not path.is_file()):
        return FileFormat.JSONL
    raise InputError(
        f"cannot write {suffix} files: results are JSON lines or CSV; call the output {path.stem}.jsonl or "
        f"{path.stem}.csv, and convert that"
    )


@contextmanager
def result_writer(stream: TextIO, file_format: FileFormat, output_model: type[BaseModel]) -> Iterator[Writer]:
    """A function that writes one result to `stream`: a JSON object a line, or a row of a CSV file.

    The header of a CSV file has the fields of `output_model` and all others that results have, so the file is written
    when the block ends, with or without an exception.
    """
    if file_format is FileFormat.JSONL:
        yield lambda result: stream.write(json.dumps(result, ensure_ascii=False) + "\n")
        return
    columns: dict[str, None] = {}
    with tempfile.SpooledTemporaryFile(SPOOL_MEMORY_CHARACTERS, "w+", encoding="utf-8") as spool:

        def write(result: Mapping[str, Any]) -> None:
            columns.update(dict.fromkeys(result))
            spool.write(json.dumps(result, ensure_ascii=False) + "\n")

        try:
            yield write
        finally:
            rows = csv.DictWriter(stream, list(columns | dict.fromkeys(output_model.model_fields)), lineterminator="\n")
            rows.writeheader()
            spool.seek(0)
            for line in spool:
                rows.writerow({name: _cell(value) for name, value in json.loads(line).items()})


def _cell(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else value
