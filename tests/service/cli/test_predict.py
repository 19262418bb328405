"""``modalkit predict`` as a user runs it."""

import csv
import errno
import gzip
import json
import os
import re
from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import BaseModel, Field, RootModel
from rich.progress import Progress

from modalkit.pipelines import AnyInput
from modalkit.pipelines.files import replacing
from modalkit.service.cli.predict import _Run
from modalkit.service.cli.records import ITSELF, FileFormat, InputError, Record, fields_of, read_records, validated
from modalkit.service.cli.results import ResultWriter, identity_of, interrupted_run, result_file
from modalkit.service.settings import Settings
from tests.support.command_line import Modalkit
from tests.support.length_model import POISON, REJECTED, LengthPipeline, Text
from tests.support.odd_model import MUTE, NAN, OBJECT, SURROGATE


def results(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def records_of(lines: list[str]) -> Iterator[Record]:
    return validated(read_records(lines, FileFormat.TXT, ["text"], None), Text)


def test_texts_as_arguments_give_one_result_a_line(installed_modalkit: Modalkit) -> None:
    done = installed_modalkit("predict", "four", "five!")
    assert [result["length"] for result in results(done.stdout)] == [4, 5]
    assert (done.returncode, done.stderr) == (0, "")


def test_lines_of_standard_input_keep_their_order(modalkit: Modalkit) -> None:
    done = modalkit("predict", stdin="".join(f"{'x' * (1 + n * 7919 % 500)}\n" for n in range(9000)))
    assert [result["length"] for result in results(done.stdout)] == [1 + n * 7919 % 500 for n in range(9000)]
    assert done.returncode == 0
    assert done.stderr.startswith("9000 items in ")


def test_a_bad_line_is_reported_with_its_number_and_is_not_fatal(modalkit: Modalkit) -> None:
    done = modalkit("predict", stdin=f"one\n\nthree\n{POISON}\nbad\udcff\nlast")
    assert done.returncode == 4
    assert [result["status"] for result in results(done.stdout)] == [
        *("success", "error", "success"),
        *("error", "error", "success"),
    ]
    reported = done.stderr.splitlines()
    assert reported[0].startswith("line 2: text: ")
    assert reported[1] == "line 4: ValueError: this batch is poisoned"
    assert reported[2].startswith("line 5: text: ")
    assert "6 items" in reported[3]
    assert "3 of them with errors" in reported[3]


def test_a_jsonl_file_holds_objects_or_texts(modalkit: Modalkit, folder: Path) -> None:
    (folder / "in.jsonl").write_text('{"text": "four"}\n"five!"\n \n{"text": \n{"body": "a"}\n7\n\n')
    done = modalkit("predict", "--input", "in.jsonl", "--output", "out.jsonl")
    assert done.returncode == 4
    assert done.stderr.startswith("line 4: not JSON")  # blank lines count, and are no items
    assert done.stdout == ""
    written = results((folder / "out.jsonl").read_text())
    assert [slot.get("length") for slot in written] == [4, 5, None, None, None]
    assert written[2]["error"].startswith("not JSON")
    assert "text: is missing" in written[3]["error"]


def test_a_csv_file_gives_its_column_and_a_csv_output_has_columns(modalkit: Modalkit, folder: Path) -> None:
    (folder / "in.csv").write_text('id,review\n1,"two\nlines, quoted"\n2,four\n3,\n4\n')
    done = modalkit("predict", "-i", "in.csv", "--column", "review", "-o", "out.csv")
    assert done.returncode == 4
    with (folder / "out.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["length"] for row in rows] == ["17", "4", "", ""]
    assert [row["status"] for row in rows] == ["success", "success", "error", "error"]
    assert [line.split(":")[0] for line in done.stderr.splitlines()[:2]] == ["line 5", "line 6"]


def test_a_long_text_of_several_lines_is_one_cell_of_a_csv_file(modalkit: Modalkit, folder: Path) -> None:
    lines = [f"line {number} of the document" for number in range(10_000)]
    with (folder / "in.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["text", "document"], ["four", "\n".join(lines)], ["seventy", "a"]])
    done = modalkit("predict", "-i", "in.csv", "--keep-columns")
    written = [(slot["length"], slot["document"]) for slot in results(done.stdout)]
    assert written == [(4, "\n".join(lines)), (7, "a")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("-i", "in.csv"),
            "the CSV header has no column 'text'; it has ['id', 'review']: name the text's with --column",
        ),
        (("-i", "empty.csv"), "the CSV has no header: its first line must name the columns"),
        (("-i", "open.csv", "--column", "a"), "line 2 is not CSV: field larger than field limit (16777216); close its"),
        (("-i", "in.xlsx"), "cannot tell the format of in.xlsx by its name; say --format txt, jsonl, csv or parquet"),
        (("-i", "in.parquet"), "in.parquet is no Parquet file"),
        (("-i", "cut.jsonl.gz"), "cut.jsonl.gz is damaged"),
        (("-i", "-", "-f", "parquet"), "Parquet cannot be read from standard input"),
        (("--column", "review"), "lines of text have no column 'review': say --format csv or --format jsonl, or leave"),
        (
            ("-i", "in.csv", "--column", "review", "-o", "out.xlsx"),
            "cannot write .xlsx files: results are JSON lines, CSV or Parquet; call the output out.jsonl, out.csv or",
        ),
    ],
)
def test_an_input_or_output_that_cannot_be_used_is_one_message_and_exit_code_2(
    modalkit: Modalkit, folder: Path, arguments: tuple[str, ...], message: str
) -> None:
    (folder / "in.csv").write_text("id,review\n1,a\n")
    for name in ("in.xlsx", "empty.csv"):
        (folder / name).write_text("")
    (folder / "open.csv").write_text('a\n"' + "text\n" * 2**22)
    (folder / "in.parquet").write_text("no Parquet")
    (folder / "cut.jsonl.gz").write_bytes(gzip.compress(b'"four"')[:-9])
    done = modalkit("predict", *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("modalkit: error: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (folder / "out.xlsx").exists()


def test_an_output_in_a_folder_that_does_not_exist_is_one_message(modalkit: Modalkit) -> None:
    done = modalkit("predict", "a text", "-o", "no/such/folder.jsonl")
    assert done.returncode == 2
    assert done.stderr.startswith("modalkit: error: there is no folder ")
    assert "no/such: make it" in done.stderr


@pytest.mark.parametrize("arguments", [("a text", "--input", "in.csv"), ("--format", "xml"), ("-i", "missing.txt")])
def test_wrong_usage_is_exit_code_2(modalkit: Modalkit, arguments: tuple[str, ...]) -> None:
    assert modalkit("predict", *arguments).returncode == 2


@pytest.mark.parametrize("arguments", [("--input", "-"), ("-",)])
def test_a_dash_means_standard_input(modalkit: Modalkit, arguments: tuple[str, ...]) -> None:
    done = modalkit("predict", *arguments, stdin="one text\n")
    assert done.returncode == 0
    assert '"length": 8' in done.stdout


def test_standard_input_that_begins_with_a_json_object_is_read_as_told_only(modalkit: Modalkit) -> None:
    line = '{"text": "four"}\n'
    done = modalkit("predict", "-", stdin=line)
    assert (done.returncode, done.stdout) == (2, "")
    assert "is a JSON object: say --format jsonl to read its fields, or --format txt to run the line" in done.stderr
    assert done.stderr.count("\n") == 1
    lengths = [results(modalkit("predict", "-f", name, stdin=line).stdout)[0]["length"] for name in ("jsonl", "txt")]
    assert lengths == [4, len(line) - 1]


def test_a_configuration_without_a_model_is_exit_code_2(modalkit: Modalkit, folder: Path) -> None:
    (folder / "none.yaml").write_text("model_settings: {model_entries: {}}")
    done = modalkit("predict", "a text", "-c", "none.yaml")
    assert (done.returncode, "model_entries: there is no model; add one" in done.stderr) == (2, True)


def test_an_unknown_model_is_exit_code_2_and_names_those_there_are(modalkit: Modalkit) -> None:
    done = modalkit("predict", "--model", "other", "a text")
    assert done.returncode == 2
    assert done.stderr == "modalkit: error: there is no model 'other'; configured are: lengths\n"


COUNTING = """
from modalkit.inference_pipeline import InferencePipeline
from modalkit.iomodel import InferenceOutputModel


class WordCount(InferencePipeline):
    def preprocess(self, input_list):
        return {"texts": [item.text for item in input_list]}

    def predict(self, input_list, preprocessed_data):
        return {"counts": [len(text.split()) for text in preprocessed_data["texts"]]}

    def postprocess(self, input_list, raw_output):
        counts = raw_output["counts"]
        return [InferenceOutputModel(words=count, **({"long": True} if count > 2 else {})) for count in counts]
"""


ALIASED = """
from pydantic import AliasChoices, BaseModel, ConfigDict, Field
from modalkit import InferenceOutputModel, InferencePipeline


class Review(BaseModel):
    model_config = ConfigDict(extra="forbid")

    text: str = Field(validation_alias=AliasChoices("review", "comment"))


class Words(InferencePipeline):
    input_model = Review

    def run_inference(self, input_list):
        return [InferenceOutputModel(words=len(item.text.split())) for item in input_list]
"""


def csv_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_csv_output_has_the_fields_of_a_pipeline_without_an_output_model(modalkit: Modalkit, folder: Path) -> None:
    (folder / "my_module.py").write_text(COUNTING)
    (folder / "modalkit.yaml").write_text("model_settings: {model_entries: {words: {pipeline: 'my_module:WordCount'}}}")
    done = modalkit("predict", "-o", "out.csv", stdin="one two\none two three\n")
    assert done.returncode == 0, done.stderr
    first, second = csv_rows(folder / "out.csv")
    assert first == {"status": "success", "error": "", "meta": "{}", "words": "2", "long": ""}
    assert (second["words"], second["long"]) == ("3", "True")


def test_a_csv_output_without_any_result_has_a_header(modalkit: Modalkit, folder: Path) -> None:
    assert modalkit("predict", "-o", "out.csv", stdin="").returncode == 0
    assert (folder / "out.csv").read_text() == "status,error,meta,length\n"


def test_what_a_pipeline_prints_is_not_among_the_results(modalkit: Modalkit, folder: Path) -> None:
    printing = COUNTING.replace("    def predict(", "    def __init__(self): print('loaded')\n\n    def predict(")
    printing = printing.replace("        return {", "        print('called')\n        return {")
    (folder / "my_module.py").write_text(f"print('imported'){printing}")
    (folder / "modalkit.yaml").write_text("model_settings: {model_entries: {words: {pipeline: 'my_module:WordCount'}}}")
    done = modalkit("predict", "one two")
    assert [slot["words"] for slot in results(done.stdout)] == [2]
    assert done.stderr.split()[:3] == ["imported", "loaded", "called"]


class Comment(BaseModel):
    text: str = Field(alias="comment")
    answers: list["Comment"] = []


@pytest.mark.parametrize(
    ("model", "fields"),
    [
        (Comment, ["comment", "answers"]),
        (RootModel[Comment], ["comment", "answers"]),
        (RootModel[str], [ITSELF]),
        (RootModel[list[str] | str], [ITSELF]),
        (RootModel[float], [ITSELF]),
        (RootModel[dict[str, str]], []),
        (AnyInput, []),
    ],
)
def test_the_fields_of_a_model_are_those_of_its_schema(model: type[BaseModel], fields: list[str]) -> None:
    assert fields_of(model.model_json_schema()) == fields


def test_texts_and_columns_are_those_of_the_alias_of_a_field(modalkit: Modalkit, folder: Path) -> None:
    (folder / "my_module.py").write_text(ALIASED)
    (folder / "modalkit.yaml").write_text("model_settings: {model_entries: {words: {pipeline: 'my_module:Words'}}}")
    (folder / "in.csv").write_text("id,review\n1,one two\n")
    (folder / "in.jsonl").write_text('"one two"\n{"comment": "one two"}\n{"reveiw": "one two"}\n')
    of_arguments, of_csv = modalkit("predict", "one two"), modalkit("predict", "-i", "in.csv")
    assert results(of_arguments.stdout) == results(of_csv.stdout)
    assert results(of_csv.stdout)[0]["words"] == 2
    *others, misspelt = results(modalkit("predict", "-i", "in.jsonl").stdout)
    assert [slot["words"] for slot in others] == [2, 2]
    assert "reveiw: unknown field; did you mean 'review'?" in misspelt["error"]


def test_columns_of_the_input_can_be_kept(modalkit: Modalkit, folder: Path) -> None:
    (folder / "in.csv").write_bytes(b"id,text,status\n7,four,new\n8,,caf\xe9\n")
    modalkit("predict", "-i", "in.csv", "-o", "out.csv", "--keep-columns")
    first, second = csv_rows(folder / "out.csv")
    assert list(first) == ["id", "text", "input_status", "status", "error", "meta", "length"]
    assert list(first.values()) == ["7", "four", "new", "success", "", "{}", "4"]
    assert (second["id"], second["input_status"], second["status"]) == ("8", "caf\ufffd", "error")


def test_keys_of_a_jsonl_input_can_be_kept(modalkit: Modalkit, folder: Path) -> None:
    (folder / "in.jsonl").write_text('{"id": 7, "body": "four", "x": NaN}\n{"id": 8}\n"five!"\n')
    done = modalkit("predict", "-i", "in.jsonl", "--column", "body", "--keep-columns")
    first, second, third = results(done.stdout)
    assert [*first.items()][:3] == [("id", 7), ("body", "four"), ("x", None)]
    assert first["length"] == 4
    assert (second["id"], second["error"]) == (8, "has no key 'body'; it has ['id']")
    assert (third["text"], third["length"]) == ("five!", 5)


def test_parquet_and_compressed_files_are_read_and_written(modalkit: Modalkit, folder: Path) -> None:
    rows = [{"id": 1, "text": "four", "raw": b"\x00"}, {"id": 2, "text": None, "raw": b"\x01"}]
    pq.write_table(pa.Table.from_pylist(rows), folder / "in.parquet")
    assert modalkit("predict", "-i", "in.parquet", "-o", "out.parquet", "--keep-columns").returncode == 4
    first, second = pq.read_table(folder / "out.parquet").to_pylist()
    assert (first["id"], first["raw"], first["length"], second["id"], second["length"]) == (1, "AA==", 4, 2, None)
    assert "text: is missing" in second["error"]
    (folder / "in.csv.gz").write_bytes(gzip.compress(b"text\nfour\n"))
    assert modalkit("predict", "-i", "in.csv.gz", "-o", "out.jsonl.gz").returncode == 0
    assert [row["length"] for row in results(gzip.decompress((folder / "out.jsonl.gz").read_bytes()).decode())] == [4]


def test_a_run_that_was_interrupted_is_resumed(modalkit: Modalkit, folder: Path) -> None:
    """With a result that was cut in the middle, as by a kill."""
    (folder / "in.txt").write_text("a\nbb\nccc\n")
    (folder / "other.txt").write_text("a\nbb\nddd\n")
    run = {
        "command": "predict",
        "input": identity_of(folder / "in.txt"),
        "--format": None,
        "--column": None,
        "--keep-columns": False,
        "--model": "lengths",
    }

    def interrupted() -> None:
        with result_file(folder / "out.csv", fields=[], run=run) as writer:
            writer.write({"status": "success", "length": "of the first run"})
            writer.stream.write('{"status": "succ')
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    refused = modalkit("predict", "-i", "in.txt", "-o", "out.csv")
    assert (refused.returncode, "go on with --resume, or remove it" in refused.stderr) == (2, True)
    other = modalkit("predict", "-i", "other.txt", "-o", "out.csv", "--resume")
    assert other.returncode == 2
    assert "out.csv.partial is from a run with input in.txt of 9 bytes, " in other.stderr
    other = modalkit("predict", "-i", "in.txt", "-o", "out.csv", "--resume", "--keep-columns")
    assert "is from a run without --keep-columns, and this run is with --keep-columns: repeat" in other.stderr
    resumed = modalkit("predict", "-i", "in.txt", "-o", "out.csv", "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert [row["length"] for row in csv_rows(folder / "out.csv")] == ["of the first run", "2", "3"]
    assert list(folder.glob("*.partial")) == []


@pytest.mark.parametrize("content", [b"no JSON\n", b"[1]\n", b"\xff\n"])
def test_a_file_of_that_name_that_is_from_no_run_is_left_as_it_is(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "out.jsonl.partial").write_bytes(content)
    with pytest.raises(InputError, match="is from no run"):
        interrupted_run(tmp_path / "out.jsonl", {}, resume=True, force=False)
    assert (tmp_path / "out.jsonl.partial").read_bytes() == content


def test_a_second_run_does_not_take_one_that_goes_on_for_interrupted(tmp_path: Path) -> None:
    with (
        result_file(tmp_path / "out.jsonl", fields=[], run={}),
        pytest.raises(InputError, match="another run writes"),
    ):
        interrupted_run(tmp_path / "out.jsonl", {}, resume=False, force=False)


def test_the_name_of_an_input_may_be_no_utf8(modalkit: Modalkit, folder: Path) -> None:
    (folder / "bad\udcff.txt").write_text("four\n")
    done = modalkit("predict", "-i", "bad\udcff.txt", "-o", "out.jsonl")
    assert done.returncode == 0, done.stderr
    assert [row["length"] for row in results((folder / "out.jsonl").read_text())] == [4]


ODD = """
model_settings:
  model_entries:
    odd: {pipeline: "tests.support.odd_model:OddPipeline"}
"""


def test_the_output_may_be_the_input(modalkit: Modalkit, folder: Path) -> None:
    (folder / "a.csv").write_text("text,length\n" + "".join(f"{'x' * n},\n" for n in range(1, 6)))
    (folder / "a.csv").chmod(0o640)
    content = (folder / "a.csv").read_text()
    refused = modalkit("predict", "-i", "a.csv", "-o", "a.csv")
    assert (refused.returncode, (folder / "a.csv").read_text()) == (2, content)
    assert "a.csv exists already: choose another output, or replace it with --force" in refused.stderr
    assert modalkit("predict", "-i", "a.csv", "-o", "a.csv", "--force").returncode == 0
    with (folder / "a.csv").open(newline="") as file:
        assert [row["length"] for row in csv.DictReader(file)] == ["1", "2", "3", "4", "5"]
    assert (folder / "a.csv").stat().st_mode & 0o777 == 0o640
    assert [path.name for path in folder.glob("a.csv*")] == ["a.csv"]


@pytest.mark.parametrize(
    ("configuration", "arguments"),
    [
        ("pipeline: 'tests.support.length_model:UnloadablePipeline'", ()),
        ("pipeline: 'tests.support.length_model:LengthPipeline'", ("--column", "missing")),
    ],
)
def test_a_run_that_fails_leaves_the_output_as_it_was(
    modalkit: Modalkit, folder: Path, configuration: str, arguments: tuple[str, ...]
) -> None:
    (folder / "modalkit.yaml").write_text(f"model_settings: {{model_entries: {{a: {{{configuration}}}}}}}")
    (folder / "in.csv").write_text("text\nfour\n")
    (folder / "out.csv").write_text("of yesterday")
    assert modalkit("predict", "-i", "in.csv", "-o", "out.csv", "--force", *arguments).returncode == 2
    assert (folder / "out.csv").read_text() == "of yesterday"
    assert list(folder.glob("*.partial")) == []


def test_links_and_permissions_of_the_output_stay(tmp_path: Path) -> None:
    target, link = tmp_path / "target.yaml", tmp_path / "link.yaml"
    target.write_text("of yesterday")
    target.chmod(0o640)
    link.symlink_to(target)
    with replacing(link.resolve()) as new:
        new.write_text("of today")
    assert link.is_symlink()
    assert target.stat().st_mode & 0o777 == 0o640
    assert target.read_text() == "of today"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.yaml", "target.yaml"]


def test_what_a_killed_process_left_is_removed_by_the_next_one(tmp_path: Path) -> None:
    killed, running, other = (tmp_path / f"a.{name}.tmp" for name in ("0123abcd", "4567abcd", "mine"))
    for path in (killed, running, other):
        path.touch()
    folder = tmp_path / "a.89abcdef.tmp"
    folder.mkdir()
    for path in (killed, other, folder):
        os.utime(path, (0, 0))
    with replacing(tmp_path / "a") as new:
        new.touch()
    assert sorted(tmp_path.iterdir()) == sorted([tmp_path / "a", running, other, folder])


def test_a_full_disk_is_told_with_the_file(modalkit: Modalkit, tmp_path: Path) -> None:
    done = modalkit("predict", "four", "-o", "/dev/full")
    assert done.returncode == 1
    assert done.stderr.endswith("error: cannot use /dev/full: No space left on device; free some space\n")
    full = OSError(errno.ENOSPC, "No space left on device")
    output = tmp_path / "out.jsonl"
    with pytest.raises(OSError, match=re.escape(f"'{output}.partial'")), result_file(output, fields=[], run={}):
        raise full
    full.filename = None
    with pytest.raises(OSError, match=re.escape(f"'{output}'")), replacing(output):
        raise full


def test_an_output_that_is_no_regular_file_is_written_to_at_once(modalkit: Modalkit) -> None:
    assert modalkit("predict", "four", "-o", "/dev/null").returncode == 0
    assert Path("/dev/null").is_char_device()
    piped = modalkit("predict", "four", "-o", "/dev/stdout")
    assert [result["length"] for result in results(piped.stdout)] == [4]


@pytest.mark.parametrize("output", [(), ("-o", "out.csv"), ("-o", "out.jsonl")])
def test_an_output_that_is_no_json_is_its_own_lines_error(
    modalkit: Modalkit, folder: Path, output: tuple[str, ...]
) -> None:
    (folder / "modalkit.yaml").write_text(ODD)
    done = modalkit("predict", *output, stdin="\n".join(["four", OBJECT, NAN, SURROGATE, MUTE, "five!"]))
    assert done.returncode == 4
    assert [line.split(":")[0] for line in done.stderr.splitlines()[:-1]] == ["line 2", "line 4", "line 5"]
    if "out.csv" in output:
        with (folder / "out.csv").open(newline="") as file:
            written: list[dict[str, Any]] = list(csv.DictReader(file))
    else:
        written = results((folder / "out.jsonl").read_text() if output else done.stdout)
    assert [slot["status"] for slot in written] == ["success", "error", "success", "error", "error", "success"]
    assert not written[2].get("score")


@pytest.mark.anyio
async def test_the_progress_counts_failed_and_invalid_lines_too() -> None:
    lines = ["one", "", POISON, REJECTED, "five!"]
    progress = Progress(disable=True)
    progress.add_task("Running", total=len(lines))
    run = _Run(ResultWriter(StringIO()), progress, Settings())
    await run.score(LengthPipeline(), records_of(lines))
    assert progress.tasks[0].completed == len(lines)


@pytest.mark.anyio
async def test_a_queue_of_one_item_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the next line is read before the scheduler has taken the last one out of its queue."""

    async def read_at_once(read: Callable[[], list[Record]]) -> list[Record]:
        return read()

    monkeypatch.setattr("modalkit.service.cli.predict.to_thread.run_sync", read_at_once)
    settings = Settings.model_validate({"app_settings": {"batch_config": {"max_queue_size": 1, "max_batch_size": 1}}})
    written = StringIO()
    progress = Progress(disable=True)
    progress.add_task("Running")
    lines = ["a", "bb", "ccc"]
    await _Run(ResultWriter(written), progress, settings).score(LengthPipeline(), records_of(lines))
    assert [result["length"] for result in results(written.getvalue())] == [1, 2, 3]


@pytest.mark.anyio
async def test_an_output_that_cannot_be_written_ends_the_run_with_its_own_error() -> None:
    """So that the command tells a closed pipe and a full disk from a mistake of ours."""

    class Closed(StringIO):
        def write(self, _: str) -> int:
            raise BrokenPipeError

    progress = Progress(disable=True)
    progress.add_task("Running")
    with pytest.raises(BrokenPipeError):
        await _Run(ResultWriter(Closed()), progress, Settings()).score(LengthPipeline(), records_of(["one"]))


@pytest.mark.parametrize(
    ("name", "content", "where"),
    [
        ("a.txt", b"caf\xe9\nfine\n", "text: "),
        ("a.csv", b"text\ncaf\xe9\nfine\n", "text: "),
        ("a.jsonl", b'{"text": "caf\xe9"}\n"fine"\n', ""),
    ],
    ids=["txt", "csv", "jsonl"],
)
def test_a_line_that_is_not_utf8_fails_alone_and_says_so(
    modalkit: Modalkit, folder: Path, name: str, content: bytes, where: str
) -> None:
    (folder / name).write_bytes(content)
    ran = modalkit("predict", "-i", name)
    bad, good = map(json.loads, ran.stdout.splitlines())
    assert bad["error"] == f"{where}is not UTF-8; convert the input to UTF-8"
    assert good["status"] == "success"
