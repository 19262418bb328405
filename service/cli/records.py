"""Reads items from files of several formats, compressed by gzip or not."""

import csv
import gzip
import io
import re
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from enum import StrEnum
from itertools import chain, islice
from pathlib import Path
from typing import Annotated, Any, BinaryIO, TextIO, cast

import typer
from pydantic import BaseModel
from pydantic_core import from_json, to_json

from modalkit.batching.errors import users_error
from modalkit.pipelines.extras import install_command
from modalkit.service import validation
from modalkit.service.cli.common import one_of
from modalkit.service.errors import UsageError, describe_error

KEEP_BAD_BYTES = "surrogateescape"
"""Bytes that are no UTF-8 become characters that are refused later, so that only their line has an error."""
GZIP_MAGIC = b"\x1f\x8b"
DEFAULT_FIELD = "text"
ITSELF = ""
"""The only field of a model whose items are no objects, as those of a `RootModel` of texts: the text is the item."""
MAX_CELL_CHARACTERS = 16 * 2**20
"""Limit of a cell of CSV: the default of `request_config.max_item_bytes`."""
ROWS_PER_READ = 1000
SHOWN_KEYS = 10

_TEXTS = ("string", "integer", "number", "boolean")
"""Types of a JSON schema that a text can be validated as."""
_BAD_BYTE = re.compile("[\udc80-\udcff]")
_NOT_UTF8 = "is not UTF-8; convert the input to UTF-8"


class FileFormat(StrEnum):
    """How a file holds its items: texts, or JSON objects or strings, one a line; or rows with named columns."""

    TXT = "txt"
    JSONL = "jsonl"
    CSV = "csv"
    PARQUET = "parquet"


FormatOption = Annotated[
    FileFormat | None,
    typer.Option("--format", "-f", help="The input's format, where its name does not tell.", **one_of(FileFormat)),
]
ColumnOption = Annotated[str | None, typer.Option(help="The column, or JSON key, that holds the text.")]


class InputError(UsageError):
    """Raised when an input as a whole cannot be read: an unknown format, or a file without the column."""


@dataclass(frozen=True, slots=True)
class Record:
    """One item of an input with its place; `error` says what is wrong where there is no item.

    `line` counts the lines of the file from 1, as an editor does: the header of CSV and blank lines count too, and an
    item of several lines has the number of its first. Of Parquet, which has no lines, it is the row, from 1.
    `columns` has the columns of its row, or the keys of its JSON object, whether the model has such fields or not.
    """

    line: int
    item: Any
    error: str | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)
    unit: str = "line"

    @property
    def place(self) -> str:
        """The place in words, as messages name it: ``line 7``, or ``row 7`` of Parquet."""
        return f"{self.unit} {self.line}"


def validated(records: Iterable[Record], input_model: type[BaseModel]) -> Iterator[Record]:
    """These records with their items as instances of a model; one that is invalid has an error."""
    for record in records:
        if record.error is not None:
            yield record
            continue
        try:
            checked = replace(record, item=validation.validated(input_model, record.item))
        except BaseException as error:  # noqa: BLE001  # a user's own validators may raise anything
            checked = replace(record, item=None, error=describe_error(users_error(error)))
        yield checked


def fields_of(schema: Mapping[str, Any]) -> list[str]:
    """The keys of a model's items by its JSON schema; `ITSELF` where the items are texts or numbers."""
    definition = schema.get("$ref", "").removeprefix("#/$defs/")  # as of a model that has fields of its own kind
    schema = schema.get("$defs", {}).get(definition, schema)
    takes_texts = any(each.get("type") in _TEXTS for each in (schema, *schema.get("anyOf", ())))
    return [*schema.get("properties", [ITSELF] if takes_texts else ())]


def format_of(path: Path) -> FileFormat:
    """The format of a file by its name. Raises `InputError`."""
    suffix = path.with_suffix("").suffix if path.suffix.lower() == ".gz" else path.suffix
    name = suffix.lower().removeprefix(".")
    try:
        return FileFormat({"ndjson": "jsonl", "pq": "parquet"}.get(name, name))
    except ValueError:
        raise InputError(
            f"cannot tell the format of {path} by its name; say --format txt, jsonl, csv or parquet"
        ) from None


def open_input(
    path: Path, given: FileFormat | None, fields: Sequence[str], column: str | None
) -> tuple[Iterator[Record], int | None]:
    """The items of a file, or of standard input for ``-``, and their number where it is known before they are read.

    The first item is read at once, so that an input without the column is refused before anything is done.
    Raises `InputError` and ``OSError``.
    """
    if str(path) == "-":
        records, count = _read_standard_input(given, fields, column), None
    else:
        records, count = read_file(path, given, fields, column), _rows_of(path, given)
    return chain(list(islice(records, 1)), records), count


def read_file(
    path: Path, given: FileFormat | None, fields: Sequence[str] | None, column: str | None
) -> Iterator[Record]:
    """The items of a file, in the format as `given` or else by its name; see `read_records`.

    Raises `InputError`, also for an unknown name and a damaged file, and ``OSError``.
    """
    file_format = given or format_of(path)
    if file_format is FileFormat.PARQUET:
        yield from _parquet_records(path, fields, column)
        return
    with path.open("rb") as file:
        yield from _text_records(file, str(path), file_format, fields, column)


def require_file(path: Path, param_hint: str) -> None:
    """Raise ``typer.BadParameter`` where there is no regular file, nor ``-``: a file is read more than once."""
    if str(path) != "-" and not path.is_file():
        reason = "is no file; give the name of one, or - for standard input" if path.exists() else "does not exist"
        raise typer.BadParameter(f"{path} {reason}", param_hint=param_hint)


def _read_standard_input(given: FileFormat | None, fields: Sequence[str], column: str | None) -> Iterator[Record]:
    """The items of standard input, by default of lines of text. Raises `InputError`."""
    if given is FileFormat.PARQUET:
        raise InputError("Parquet cannot be read from standard input: give the name of a file")
    with open(sys.stdin.fileno(), "rb", closefd=False) as file:  # a descriptor has no path
        for record in _text_records(file, "standard input", given or FileFormat.TXT, fields, column):
            texts = record.item.values() if isinstance(record.item, dict) else [record.item or ""]
            if given is None and record.line == 1 and any(map(_is_json_object, texts)):
                raise InputError(
                    "the first line of standard input is a JSON object: say --format jsonl to read its fields, or "
                    "--format txt to run the line itself as a text"
                )
            yield record


def _is_json_object(text: str) -> bool:
    with suppress(ValueError):
        return isinstance(from_json(text), dict)
    return False


def _rows_of(path: Path, given: FileFormat | None) -> int | None:
    """How many items a file has, about; None where that is not known before it is read."""
    if (given or format_of(path)) is FileFormat.PARQUET:
        with _parquet_file(path) as parquet:
            return int(parquet.metadata.num_rows)
    header = (given or format_of(path)) is FileFormat.CSV
    with path.open("rb") as file:
        if file.read(len(GZIP_MAGIC)) == GZIP_MAGIC:
            return None
        return sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(2**20), b"")) - header


def _text_records(
    file: BinaryIO, name: str, file_format: FileFormat, fields: Sequence[str] | None, column: str | None
) -> Iterator[Record]:
    binary: Any = io.BufferedReader(cast("io.RawIOBase", file))
    if binary.peek(len(GZIP_MAGIC))[: len(GZIP_MAGIC)] == GZIP_MAGIC:
        binary = gzip.GzipFile(fileobj=binary)
    try:
        with io.TextIOWrapper(binary, encoding="utf-8-sig", errors=KEEP_BAD_BYTES, newline="") as text:
            yield from read_records(text, file_format, fields, column)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{name} is damaged: {error}") from error


def read_records(
    lines: Iterable[str] | TextIO, file_format: FileFormat, fields: Sequence[str] | None, column: str | None
) -> Iterator[Record]:
    """The items of lines of text, for a model with these `fields`; a line that cannot be read has an error.

    Blank lines of JSON and of CSV are skipped. A plain text becomes the field `text`, or the only field. `column` names
    the column of a CSV file (the key of a JSON object) that holds the text; without it, all columns that the model has
    fields for are taken, and all columns where `fields` is None. Raises `InputError`.
    """
    if file_format is FileFormat.TXT and column is not None:
        raise InputError(
            f"lines of text have no column {column!r}: say --format csv or --format jsonl, or leave out --column"
        )
    text_field = _text_field(fields)
    if file_format is FileFormat.CSV:
        yield from _csv_records(lines, fields, column)
        return
    for line, text in enumerate((text.rstrip("\r\n") for text in lines), start=1):
        if file_format is FileFormat.TXT:
            yield _record_of(line, {text_field: text})
            continue
        if not text.strip():
            continue
        try:
            value = from_json(text)
        except TypeError:  # raised for a text with characters of `KEEP_BAD_BYTES`
            yield Record(line, None, _NOT_UTF8)
            continue
        except ValueError as error:
            reason = str(error).replace(" at line 1 column", " at column")  # a line is one of many
            yield Record(line, None, f"not JSON: {reason}")
            continue
        if isinstance(value, str):
            yield _record_of(line, {text_field: value})
        elif column is not None and isinstance(value, dict):
            if column in value:
                yield _record_of(line, {text_field: value[column]}, value)
            else:
                yield Record(line, None, f"has no key {column!r}; it has {[*value][:SHOWN_KEYS]}", value)
        else:
            yield Record(line, value, columns=value if isinstance(value, dict) else {})


def _text_field(fields: Sequence[str] | None) -> str:
    return fields[0] if fields is not None and len(fields) == 1 else DEFAULT_FIELD


def _record_of(
    line: int, fields: Mapping[str, Any], columns: Mapping[str, Any] | None = None, unit: str = "line"
) -> Record:
    """The record of an item with these fields; `columns` has what its line holds, where that is more."""
    if columns is None:
        columns = {name or DEFAULT_FIELD: text for name, text in fields.items()}
    for name, text in fields.items():
        if isinstance(text, str) and _BAD_BYTE.search(text):
            return Record(line, None, f"{name or DEFAULT_FIELD}: {_NOT_UTF8}", columns, unit)
    return Record(line, fields[ITSELF] if [*fields] == [ITSELF] else fields, columns=columns, unit=unit)


def _columns_of_fields(
    what: str, header: Sequence[str], fields: Sequence[str] | None, column: str | None
) -> dict[str, str]:
    """The column of each field that has one. Raises `InputError` where none has."""
    if fields is None:
        return {name: name for name in header}
    wanted = [_text_field(fields)] if column is not None else [*fields] or [_text_field(fields)]
    named_columns = {field: column or field or DEFAULT_FIELD for field in wanted}
    columns = {field: name for field, name in named_columns.items() if name in header}
    if not columns:
        named = " or ".join(map(repr, named_columns.values()))
        raise InputError(f"the {what} has no column {named}; it has {[*header]}: name the text's with --column")
    return columns


def _csv_records(lines: Iterable[str], fields: Sequence[str] | None, column: str | None) -> Iterator[Record]:
    csv.field_size_limit(MAX_CELL_CHARACTERS)
    rows = _csv_rows(lines)
    _, header = next(rows, (1, []))
    if not header:
        raise InputError("the CSV has no header: its first line must name the columns")
    columns = _columns_of_fields("CSV header", header, fields, column)
    for line, row in rows:
        if row:
            values = dict(zip(header, row, strict=False))  # a row may be short; cells beyond the header are left out
            yield _record_of(line, {field: values[name] for field, name in columns.items() if name in values}, values)


def _csv_rows(lines: Iterable[str]) -> Iterator[tuple[int, list[str]]]:
    """The rows, each with its first line. Raises `InputError`: after an error, it is not known where a row begins."""
    reader = csv.reader(lines)
    first_line = 1
    try:
        for row in reader:
            yield first_line, row
            first_line = reader.line_num + 1
    except csv.Error as error:
        raise InputError(
            f"line {first_line} is not CSV: {error}; close its quotes, or give such long texts as JSON lines"
        ) from error


def _parquet_records(path: Path, fields: Sequence[str] | None, column: str | None) -> Iterator[Record]:
    with _parquet_file(path) as parquet:
        import pyarrow as pa

        columns = _columns_of_fields("Parquet file", parquet.schema_arrow.names, fields, column)
        line = 0
        try:
            for batch in parquet.iter_batches(batch_size=ROWS_PER_READ):
                for row in batch.to_pylist():
                    line += 1
                    given = {field: row[name] for field, name in columns.items() if row[name] is not None}
                    yield _record_of(line, given, row, "row")
        except pa.ArrowException as error:
            raise InputError(f"{path} is damaged: {error}") from error


def require_parquet(path: Path) -> None:
    """Raise `InputError` where the extra for Parquet is missing."""
    try:
        import pyarrow.parquet  # noqa: F401  # to see whether it is there
    except ImportError:
        raise InputError(f"{path}: Parquet needs the extra parquet: {install_command('parquet')}") from None


def _parquet_file(path: Path) -> Any:
    """The open Parquet file. Raises `InputError` for another file, and where the extra is missing."""
    require_parquet(path)
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

    try:
        return ParquetFile(path)
    except pa.ArrowException as error:
        raise InputError(f"{path} is no Parquet file: {error}") from error


def kept_columns(record: Record, output_fields: Iterable[str]) -> dict[str, Any]:
    """The columns of a record as they are written beside its result; `input_NAME` where results have a field NAME.

    What is not UTF-8 is replaced, and numbers that JSON does not have are null.
    """
    fields = frozenset(output_fields)
    plain = {
        _readable(f"input_{name}" if name in fields else name): _readable(value)
        for name, value in record.columns.items()
    }
    kept: dict[str, Any] = from_json(to_json(plain, inf_nan_mode="null", bytes_mode="base64"))
    return kept


def _readable(value: Any) -> Any:
    return _BAD_BYTE.sub("\N{REPLACEMENT CHARACTER}", value) if isinstance(value, str) else value
