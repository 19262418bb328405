"""``modalkit submit`` against a real service, which is killed, as is the command."""

import gzip
import json
import signal
import time
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import anyio
import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from modalkit.service.cli.batch_client import BatchRun
from modalkit.service.cli.jobs_client import AwayError, JobsClient, JobsError
from modalkit.service.cli.records import Record
from modalkit.service.cli.results import ResultWriter
from tests.support.command_line import Modalkit, forked, serving
from tests.support.killed_server import KilledServer
from tests.support.length_model import POISON

ROWS = 2000
GATED = """
app_settings:
  async_config: {store_path: jobs.db}
  batch_config: {calibration: {enabled: false}}
model_settings:
  model_entries:
    lengths: {pipeline: "tests.support.fault_pipelines:Gated"}
"""


BARE_TEXTS = """
from pydantic import RootModel, field_validator
from modalkit import InferenceOutputModel, InferencePipeline

class Text(RootModel[str]):
    @field_validator("root")
    @classmethod
    def known(cls, text):
        return 1 / 0 if text == "boom" else text

class Pipeline(InferencePipeline):
    input_model = Text

    def run_inference(self, input_list):
        return [InferenceOutputModel(meta={"text": item.root}) for item in input_list]
"""


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def until(reached: Callable[[], bool], what: str) -> None:
    """Ask again and again until something in another process has happened."""
    deadline = time.monotonic() + 90
    while not reached():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def test_a_killed_service_and_an_interrupted_command_lose_nothing_and_repeat_nothing(
    folder: Path, environment: dict[str, str], modalkit: Modalkit
) -> None:
    """The service dies by `kill -9` while jobs run; the command by Ctrl-C later; then it goes on."""
    (folder / "modalkit.yaml").write_text(GATED)
    texts = [f"row {number:04}" for number in range(ROWS)]  # of one size, so that they run in their order
    texts[700], texts[1990] = "gate aaa", "gate bbb"
    pq.write_table(pa.table({"id": list(range(ROWS)), "review": texts}), folder / "in.parquet")
    with KilledServer(folder) as server:
        command = ["submit", "in.parquet", "--column", "review", "--url", server.url, "--wait", "-o", "out.jsonl"]
        command.append("--keep-columns")

        def written() -> int:
            return sum(path.read_bytes().count(b"\n") for path in folder.glob("out.jsonl.partial"))

        with forked(command, folder, environment) as submitting:
            until(lambda: written() > 300, "no results were written")
            server.kill()
            (folder / "aaa").touch()
            server.start()
            until(lambda: written() > 800, "no results were written after the service came back")
            submitting.send_signal(signal.SIGINT)
            _, said = submitting.communicate()
            assert submitting.wait() != 0
            assert "--resume goes on with it" in said
            assert "trying again for 300 s (--patience)" in said
            assert f"{server.url} answers again, after " in said
        assert not (folder / "out.jsonl").exists()
        refused = modalkit(*command)
        assert refused.returncode == 2
        assert "go on with --resume, or remove it" in refused.stderr
        other = modalkit(*command, "--resume", "--column", "id")
        assert other.returncode == 2
        assert "is from a run with --column review, and this run is with --column id: repeat" in other.stderr
        (folder / "bbb").touch()
        resumed = modalkit(*command, "--resume")
        assert resumed.returncode == 0, resumed.stderr
        (stored,) = httpx.get(f"{server.url}/jobs?limit=1").json()["jobs"]
        batch = httpx.get(f"{server.url}/batches/{stored['batch_id']}").json()
    assert (batch["jobs"], batch["statuses"]["succeeded"]) == (ROWS, ROWS)
    written_rows = lines_of(folder / "out.jsonl")
    assert [(row["id"], row["review"], row["text"]) for row in written_rows] == [
        (number, text, text) for number, text in enumerate(texts)
    ]
    assert list(folder.glob("*.partial")) == []


def test_a_run_that_is_interrupted_before_its_first_result_is_resumed_as_the_same_batch(
    folder: Path, environment: dict[str, str], modalkit: Modalkit
) -> None:
    (folder / "modalkit.yaml").write_text(GATED)
    (folder / "in.txt").write_text("gate aaa\nrow\n")
    with serving(folder, environment) as (_, client):
        command = ["submit", "in.txt", "--url", str(client.base_url), "--wait", "-o", "out.jsonl"]
        with forked(command, folder, environment) as submitting:
            until(lambda: len(client.get("/jobs").json()["jobs"]) == 2, "no jobs were stored")
            submitting.send_signal(signal.SIGINT)
            _, said = submitting.communicate()
        assert "--resume goes on with it" in said
        (folder / "aaa").touch()
        assert modalkit(*command, "--resume").returncode == 0
        assert len(client.get("/jobs").json()["jobs"]) == 2
    assert [row["text"] for row in lines_of(folder / "out.jsonl")] == ["gate aaa", "row"]


def test_files_of_all_formats_give_the_same_results_with_errors_in_their_places(
    folder: Path, environment: dict[str, str], modalkit: Modalkit
) -> None:
    texts = ["four", POISON, "five!"]
    rows = [{"text": text, "id": number} for number, text in enumerate(texts)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "in.parquet")
    (folder / "in.csv").write_text("id,text\n" + "".join(f"{row['id']},{row['text']}\n" for row in rows))
    (folder / "in.txt").write_text("\n".join(texts))
    (folder / "in.jsonl.gz").write_bytes(gzip.compress("\n".join(json.dumps(text) for text in texts).encode()))
    with serving(folder, environment) as (_, client):
        url = ("--url", str(client.base_url))
        for name in ("in.parquet", "in.csv", "in.txt", "in.jsonl.gz"):
            done = modalkit("submit", name, *url, "--wait", "-o", "out.jsonl", "--force")
            assert done.returncode == 4, done.stderr
            found = lines_of(folder / "out.jsonl")
            assert [row.get("length") for row in found] == [4, None, 5]
            assert found[1] == {"status": "error", "error": "ValueError: this batch is poisoned"}
        compressed = modalkit("submit", "in.csv", *url, "--wait", "-o", "out.csv.gz", "--keep-columns")
        assert compressed.returncode == 4
        assert gzip.decompress((folder / "out.csv.gz").read_bytes()).decode().splitlines()[:2] == [
            "id,text,status,error,meta,length",
            "0,four,success,,{},4",
        ]
        modalkit("submit", "in.parquet", *url, "--wait", "-o", "out.parquet", "--keep-columns")
        columns = pq.read_table(folder / "out.parquet").to_pydict()
        assert (columns["id"], columns["length"]) == ([0, 1, 2], [4, None, 5])
        (folder / "in.jsonl").write_text(
            '"fine"\nnot json\n\n{"text": 7}\n{"message": {"text": "own"}, "meta": {"k": 1}}\n'
        )
        piped = modalkit("submit", "-", "-f", "jsonl", *url, "--wait", stdin=(folder / "in.jsonl").read_text())
        statuses = [json.loads(line)["status"] for line in piped.stdout.splitlines()]
        assert statuses == ["success", "error", "error", "success"]
        assert "line 2: not JSON" in piped.stderr
        assert "line 4: message.text: " in piped.stderr
        assert "4 lines done" in piped.stderr
        job = client.get("/jobs?limit=1").json()["jobs"][0]
        assert job["meta"] == {"k": 1}


@pytest.mark.parametrize("command", ["predict", "submit"])
def test_texts_are_items_of_a_model_that_takes_bare_texts(
    folder: Path, environment: dict[str, str], modalkit: Modalkit, command: str
) -> None:
    """A validator of the user's may raise anything: that line fails alone."""
    (folder / "my_module.py").write_text(BARE_TEXTS)
    (folder / "modalkit.yaml").write_text("model_settings: {model_entries: {bare: {pipeline: 'my_module:Pipeline'}}}")
    pq.write_table(pa.table({"text": ["one", "boom"], "id": [1, 2]}), folder / "in.parquet")
    (folder / "in.csv").write_text("id,text\n1,one\n2,boom\n")
    (folder / "in.txt").write_text("one\nboom\n")
    (folder / "in.jsonl").write_text('"one"\n"boom"\n')
    with serving(folder, environment) as (_, client):
        for name in ("in.parquet", "in.csv", "in.txt", "in.jsonl"):
            arguments = ("-i", name) if command == "predict" else (name, "--url", str(client.base_url), "--wait")
            done = modalkit(command, *arguments, "-o", "out.jsonl", "--force")
            assert done.returncode == 4, done.stderr
            good, bad = lines_of(folder / "out.jsonl")
            assert (good["status"], good["meta"], bad["status"]) == ("success", {"text": "one"}, "error"), name
            assert "division by zero" in bad["error"], name


def test_a_batch_that_was_sent_is_collected_by_its_id(
    folder: Path, environment: dict[str, str], modalkit: Modalkit
) -> None:
    """Though results are there of lines that the second run has not sent yet."""
    lengths = [1 + number % 50 for number in range(2500)]
    (folder / "in.txt").write_text("".join("x" * length + "\n" for length in lengths))
    with serving(folder, environment) as (_, client):
        url = ("--url", str(client.base_url))
        sent = modalkit("submit", "in.txt", *url)
        assert sent.returncode == 0, sent.stderr
        until(lambda: client.get(f"/batches/{sent.stdout.strip()}").json()["finished_at"] is not None, "they wait")
        collected = modalkit("submit", "in.txt", *url, "--batch", sent.stdout.strip(), "--wait")
        assert [json.loads(line)["length"] for line in collected.stdout.splitlines()] == lengths
        assert client.get(f"/batches/{sent.stdout.strip()}").json()["jobs"] == len(lengths)


def test_messages_and_results_of_the_service_have_the_line_of_the_file(
    folder: Path, environment: dict[str, str], modalkit: Modalkit
) -> None:
    """That of the header counts, blank ones do, and the first one of a row of several; of Parquet, it is the row."""
    (folder / "in.csv").write_text(f'id,text\n1,"a\nb"\n\n2,{POISON}\n3,four\n')
    pq.write_table(pa.table({"text": ["four", POISON]}), folder / "in.parquet")
    with serving(folder, environment) as (_, client):
        url = ("--url", str(client.base_url))
        done = modalkit("submit", "in.csv", *url, "--wait", "-o", "out.jsonl", "--batch", "b")
        lines = [json.loads(line)["line"] for line in client.get("/batches/b/results").text.splitlines()]
        of_parquet = modalkit("submit", "in.parquet", *url, "--wait")
    assert [row.get("length") for row in lines_of(folder / "out.jsonl")] == [3, None, 4]
    assert lines == [2, 5, 6]
    assert done.stderr.startswith("line 5: ValueError: this batch is poisoned\n")
    assert of_parquet.stderr.startswith("row 2: ValueError: this batch is poisoned\n")


@pytest.mark.anyio
async def test_the_progress_counts_jobs_that_have_ended_behind_one_that_has_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("modalkit.service.cli.batch_client.COUNTING_INTERVAL_S", 0.001)
    told: list[int] = []
    seen = anyio.Event()

    def progress(*, completed: int) -> None:
        told.append(completed)
        if completed == 2:
            seen.set()

    async def answer(request: httpx.Request) -> httpx.Response:
        if request.method == "POST":
            return httpx.Response(200, text="".join(f'{{"line":{line},"job_id":"j"}}\n' for line in (1, 2, 3)))
        if request.url.path.endswith("/results"):
            await seen.wait()
            results = ({"line": line, "status": "succeeded", "result": {"status": "success"}} for line in (1, 2, 3))
            return httpx.Response(200, text="".join(json.dumps(result) + "\n" for result in results))
        times = {"created_at": "2026-01-01T00:00:00Z", "finished_at": None, "jobs_per_s": 1, "drain_s": None}
        return httpx.Response(
            200, json={"batch_id": "b", "jobs": 3, "statuses": {"succeeded": 2, "running": 1}, **times}
        )

    client = JobsClient.of_service(httpx.URL("http://service"), None, "authorization")
    written = StringIO()
    async with httpx.AsyncClient(transport=httpx.MockTransport(answer), base_url="http://service") as http:
        run = BatchRun(
            client, http, "b", ["text"], {}, {}, {}, ResultWriter(written), None, patience_s=0, on_progress=progress
        )
        with anyio.fail_after(60):
            await run.run(iter([Record(line, {"text": "a"}) for line in (1, 2, 3)]))
    assert told[0] == 2
    assert told[-1] == 3
    assert written.getvalue().count("success") == 3


@pytest.mark.anyio
@pytest.mark.parametrize("status", [404, 200], ids=["of all jobs", "of some jobs"])
async def test_the_removal_of_jobs_whose_results_are_waited_for_ends_the_command(status: int) -> None:
    async def answer(request: httpx.Request) -> httpx.Response:
        if request.method == "POST":
            return httpx.Response(200, text='{"line":1,"job_id":"j"}\n')
        if request.url.path.endswith("/results"):
            return httpx.Response(status)
        times = {"created_at": "2026-01-01T00:00:00Z", "finished_at": "2026-01-01T00:00:01Z"}
        counts = {"batch_id": "b", "jobs": 1, "statuses": {"failed": 1}, "jobs_per_s": 0, "drain_s": None}
        return httpx.Response(200, json=counts | times)

    client = JobsClient.of_service(httpx.URL("http://service"), None, "authorization")
    async with httpx.AsyncClient(transport=httpx.MockTransport(answer), base_url="http://service") as http:
        run = BatchRun(client, http, "b", ["text"], {}, {}, {}, ResultWriter(StringIO()), None, patience_s=0)
        with pytest.raises(JobsError, match="no jobs of batch b from line 1 on any more: they were removed"):
            await run.run(iter([Record(1, {"text": "a"})]))


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])  # as the command has it
async def test_an_answer_of_something_else_counts_as_a_service_that_is_away() -> None:
    client = JobsClient.of_service(httpx.URL("http://service"), None, "authorization")
    page = httpx.MockTransport(lambda _: httpx.Response(200, text="<html>\nWe are back soon.\n</html>\n"))
    async with httpx.AsyncClient(transport=page, base_url="http://service") as http:
        writer = ResultWriter(StringIO())
        run = BatchRun(client, http, "b", ["text"], {}, {}, {}, writer, None, patience_s=0)
        with pytest.raises(AwayError, match="lines could not be sent for 0 s: it answers as no modalkit of this vers"):
            await run.run(iter([Record(1, {"text": "a"})]))
    assert writer.is_begun


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])  # as the command has it
async def test_results_of_lines_that_the_file_does_not_have_are_not_taken_for_those_of_others() -> None:
    """Others have submitted lines 2 and 4 of this batch, or the file was changed; and the job of line 3 was removed."""

    async def answer(request: httpx.Request) -> httpx.Response:
        if request.method == "POST":
            return httpx.Response(200, text='{"line":1,"job_id":"a"}\n{"line":3,"job_id":"c"}\n')
        await anyio.lowlevel.checkpoint()  # as a connection would
        done = {"status": "succeeded", "result": {"status": "success"}}
        return httpx.Response(200, text="".join(json.dumps({"line": line, **done}) + "\n" for line in (1, 2, 4)))

    written = StringIO()
    client = JobsClient.of_service(httpx.URL("http://service"), None, "authorization")
    async with httpx.AsyncClient(transport=httpx.MockTransport(answer), base_url="http://service") as http:
        run = BatchRun(client, http, "b", ["text"], {}, {}, {}, ResultWriter(written), None, patience_s=0)
        with anyio.fail_after(60):
            await run.run(iter([Record(line, {"text": "a"}) for line in (1, 3)]))
    assert [json.loads(line)["status"] for line in written.getvalue().splitlines()] == ["success", "error"]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("missing.csv",), 2, "missing.csv does not exist"),
        (("in.txt", "-o", "out.jsonl"), 2, "with --wait only"),
        (("in.txt", "--resume", "--wait"), 2, "give --output"),
        (("in.txt", "--batch", "a/b"), 2, "1 to 100 letters"),
    ],
)
def test_what_cannot_be_done_is_one_message(
    modalkit: Modalkit, folder: Path, arguments: tuple[str, ...], code: int, said: str
) -> None:
    (folder / "in.txt").write_text("a\n")
    done = modalkit("submit", *arguments)
    assert done.returncode == code
    assert said in " ".join(done.stderr.replace("│", " ").split())


def test_a_key_that_is_missing_or_wrong_usage_is_one_message(
    folder: Path, environment: dict[str, str], modalkit: Modalkit
) -> None:
    (folder / "in.txt").write_text("a\n")
    with serving(folder, environment | {"MODALKIT_APP_SETTINGS__AUTH_CONFIG__API_KEY": "k"}) as (_, client):
        url = ("--url", str(client.base_url))
        done = modalkit("submit", "in.txt", *url, "--wait", "-o", "out.jsonl")
        assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
        assert "give its API key with --key or in MODALKIT_API_KEY" in done.stderr
        for wrong, said in (("--model", "other"), "has no model 'other'"), (("--key", "k\nk"), "has a line break"):
            done = modalkit("submit", "in.txt", *url, "--key", "k", *wrong)
            assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
            assert said in done.stderr
        assert modalkit("submit", "in.txt", *url, "--wait", "--key", "k").returncode == 0
    assert list(folder.glob("out.jsonl*")) == []


def test_a_service_that_is_away_is_one_message(installed_modalkit: Modalkit, folder: Path) -> None:
    (folder / "in.txt").write_text("a\n")
    done = installed_modalkit("submit", "in.txt", "--url", "http://127.0.0.1:1")
    assert done.returncode == 5
    assert "cannot be reached" in done.stderr
    assert done.stderr.count("\n") == 1
