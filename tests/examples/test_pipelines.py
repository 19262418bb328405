"""The programs of docs/pipelines.md work as it says."""

import json
import pickle
import re
import sys
from base64 import b64encode
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib import import_module
from io import BytesIO
from pathlib import Path
from threading import Thread
from typing import Any, get_args

import anyio
import pytest
from anyio import to_thread
from PIL import Image
from sklearn.feature_extraction.text import TfidfVectorizer
from transformers import AutoTokenizer, BertForTokenClassification, BertModel, GPT2Config, GPT2LMHeadModel

from modalkit.batching import Failure, Success
from modalkit.pipelines import AsyncInputModel, BatchTooLargeError, InferenceOutputModel, InferencePipeline, RejectItem
from modalkit.service.loading import LoadError
from modalkit.service.settings import Settings
from modalkit.testing import client_of, worker_of
from tests.support import processes
from tests.support.command_line import MODALKIT
from tests.support.guides import ROOT, blocks, guide
from tests.support.tiny_models import save_model

GUIDE = guide("pipelines.md")
FILES = {
    named[1]: block
    for block in blocks(GUIDE, "python") + blocks(GUIDE, "yaml")
    if (named := re.match(r"# (\w+\.(?:py|yaml))\n", block))
}

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"  # client_of needs it


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with all files of the guide."""
    for name, content in FILES.items():
        (tmp_path / name).write_text(content)
    (tmp_path / "models").mkdir()
    vectorizer = TfidfVectorizer().fit(["the cat sat", "the dog", "the end"])
    (tmp_path / "models" / "vectorizer.pickle").write_bytes(pickle.dumps(vectorizer))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for name in FILES:
        monkeypatch.delitem(sys.modules, name.removesuffix(".py"), raising=False)
    return tmp_path


def picture(level: int) -> str:
    file = BytesIO()
    Image.new("L", (5, 7), level).save(file, "png")
    return b64encode(file.getvalue()).decode()


def test_every_block_is_a_file_that_is_run_here() -> None:
    assert len(FILES) == len(blocks(GUIDE, "python") + blocks(GUIDE, "yaml"))
    source = Path(__file__).read_text()
    assert [name for name in FILES if name.removesuffix(".py") not in source] == []


async def test_the_smallest_one_answers_as_printed(folder: Path) -> None:
    (command,) = [block for block in blocks(GUIDE, "bash") if block.startswith("curl")]
    found = re.match(r"curl http://127.0.0.1:8000(\S+) -d '(.*)'", command)
    assert found is not None
    async with client_of("modalkit.yaml") as client:
        answer = await client.post(found[1], content=found[2])
    assert [answer.text + "\n"] == blocks(GUIDE, "json")


async def test_the_tests_of_the_guide_pass(folder: Path) -> None:
    tests = [test for name, test in vars(import_module("test_tfidf")).items() if name.startswith("test_")]
    assert len(tests) == 2
    for test in tests:
        await test()


async def test_an_image_that_cannot_be_read_is_refused_alone(folder: Path) -> None:
    brightness = import_module("brightness").Brightness
    async with worker_of(brightness) as worker:
        outcomes = await worker.predict_many([{"image": picture(255)}, {"image": "?"}, {"image": picture(0)}])
    assert [outcome.value.model_dump()["brightness"] for outcome in outcomes if isinstance(outcome, Success)] == [1, 0]
    assert isinstance(outcomes[1], Failure)
    assert isinstance(outcomes[1].error, RejectItem)
    assert str(outcomes[1].error) == "image cannot be read"


class Lengths(BaseHTTPRequestHandler):
    """A remote API: the length of each text, and the key of the request."""

    def do_POST(self) -> None:
        texts = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        body = json.dumps([[len(text), self.headers["Authorization"]] for text in texts]).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_request(self, *args: object) -> None:
        """Nothing is printed."""


@pytest.fixture
def remote_api() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Lengths) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/embed"
        server.shutdown()
        thread.join()


def save_models(folder: Path) -> None:
    save_model(BertModel, folder / "my-encoder")
    save_model(BertForTokenClassification, folder / "my-tagger", id2label={0: "O", 1: "B-CAT"})
    save_model(GPT2LMHeadModel, folder / "my-gpt", GPT2Config, bos_token_id=2, eos_token_id=3)
    tokenizer = AutoTokenizer.from_pretrained(folder / "my-gpt")
    tokenizer.eos_token = "[SEP]"
    tokenizer.save_pretrained(folder / "my-gpt")


Files = tuple[str, ...]

EIGHT: list[tuple[str, Files, str, dict[str, str], Callable[[dict[str, Any]], bool]]] = [
    ("modalkit.yaml", ("words.py",), "words", {"text": "one two"}, lambda found: found["words"] == 2),
    ("tfidf.yaml", ("tfidf.py",), "weights", {"text": "the cat"}, lambda found: "cat" in found["weights"]),
    ("transformers.yaml", (), "vectors", {"text": "a cat"}, lambda found: len(found["embedding"]) == 32),
    ("transformers.yaml", (), "names", {"text": "a cat"}, lambda found: isinstance(found["entities"], list)),
    (
        "brightness.yaml",
        ("brightness.py",),
        "pictures",
        {"image": picture(255)},
        lambda found: found["brightness"] == 1,
    ),
    ("remote.yaml", ("remote.py",), "remote", {"text": "abc"}, lambda found: found["vector"] == [3, None]),
    ("generate.yaml", ("generate.py",), "writer", {"text": "the cat"}, lambda found: isinstance(found["text"], str)),
    ("several.yaml", ("words.py", "tfidf.py"), "weights", {"text": "a dog"}, lambda found: "dog" in found["weights"]),
]
"""The configuration and the programs of each pipeline, the model to ask, an item, and what is true of its answer."""


@pytest.mark.parametrize(
    ("configuration", "programs", "model", "item", "is_right"), EIGHT, ids=[f"{each[0]}-{each[2]}" for each in EIGHT]
)
async def test_a_pipeline_of_the_guide_is_short_and_is_checked_and_answers(
    folder: Path,
    remote_api: str,
    configuration: str,
    programs: Files,
    model: str,
    item: dict[str, str],
    is_right: Callable[[dict[str, Any]], bool],
) -> None:
    lines = [line for name in programs for line in FILES[name].splitlines() if line and not line.startswith("#")]
    assert len(lines) <= 25
    save_models(folder / "models")
    (folder / configuration).write_text(FILES[configuration].replace("http://127.0.0.1:9000/embed", remote_api))
    environment = {"PYTHONPATH": str(ROOT), "HOME": str(folder)}
    done = await to_thread.run_sync(
        lambda: processes.run([*MODALKIT, "check", "--config", configuration], cwd=folder, env=environment)
    )
    assert done.returncode == 0, done.stderr
    assert "NOT TRIED" not in done.stdout
    async with client_of(configuration) as client:
        answer = await client.post(
            f"/sync/predict?model_name={model}",
            json={key: text.replace("*", picture(255)) for key, text in item.items()},
        )
        assert answer.status_code == 200, answer.text
    assert is_right(answer.json())


async def test_a_remote_api_is_asked_for_a_whole_batch_with_the_key(folder: Path, remote_api: str) -> None:
    async with worker_of(import_module("remote").Remote, url=remote_api, api_key="k") as worker:
        outcomes = await worker.predict_many([{"text": "a"}, {"text": "bcd"}])
    vectors = [outcome.value.model_dump()["vector"] for outcome in outcomes if isinstance(outcome, Success)]
    assert vectors == [[1, "Bearer k"], [3, "Bearer k"]]


async def test_a_lone_job_waits_for_a_remote_api_that_is_away(folder: Path) -> None:
    async with worker_of(import_module("remote").Remote, url="http://127.0.0.1:9/embed") as worker:
        job_id = await worker.submit(AsyncInputModel(message={"text": "a"}))
        with anyio.fail_after(60):
            while (job := await worker.job(job_id)) is not None and job.retry_at is None:
                assert not job.status.has_ended, job.error
                await anyio.lowlevel.checkpoint()


def test_the_key_of_the_api_can_be_a_variable(folder: Path) -> None:
    (name,) = re.findall(r"`(MODALKIT_\w+)` gives the key", GUIDE)
    entry = Settings(_config_files=["remote.yaml"], _environ={name: "secret"}).model_settings.model_entries["remote"]
    assert entry.arguments() == {"url": "http://127.0.0.1:9000/embed", "api_key": "secret"}
    assert entry.max_in_flight == 16


async def test_texts_are_generated_piece_by_piece_as_transformers_would(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_models(folder)
    texts = ["the cat sat", "a longer text about the cat that sat"]
    async with worker_of(import_module("generate").Generate, model_path="my-gpt", max_new_tokens=6) as worker:
        await import_module("stream").print_pieces(worker, texts[0])
        pieces = capsys.readouterr().out.splitlines()
        outcomes = await worker.predict_many([{"text": text} for text in texts])
        tokenizer, model = worker.pipeline.tokenizer, worker.pipeline.model  # type: ignore[attr-defined]  # of the guide
    found = [outcome.value.model_dump()["text"] for outcome in outcomes if isinstance(outcome, Success)]
    for text, generated in zip(texts, found, strict=True):
        inputs = tokenizer(text, return_tensors="pt")
        ids = model.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=6)
        expected = tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :])
        assert generated == expected.partition("[SEP]")[0]
    assert len(pieces) == 6
    assert pieces[5].startswith(pieces[1])
    assert pieces[5] == found[0]


async def test_a_misspelt_folder_is_an_error_at_once(folder: Path) -> None:
    with pytest.raises(LoadError, match=r"FileNotFoundError: .*my-gtp' \(generate\.py, line \d+, in __init__: f"):
        async with worker_of(import_module("generate").Generate, model_path="my-gtp"):
            pass


def test_the_tables_name_pipelines_their_results_and_their_keys() -> None:
    rows = re.findall(r"^\| `(\w+):(\w+)` \| [^|]+ \| (.+?) \| (.+?) \| ?(.*?) ?\|$", GUIDE, re.MULTILINE)
    assert len(rows) == 5
    for module, name, item, result, keys in rows:
        kind = getattr(import_module(f"modalkit.pipelines.{module}"), name)
        assert set(re.findall(r"`(\w+)`", item)) == set(kind.input_model.model_fields)
        assert set(re.findall(r"`(\w+)`", result)) < set(kind.output_model.model_fields)
        for key, values in re.findall(r"`(\w+)`(?: \(([^)]*)\))?", keys):
            field = kind.entry_model.model_fields[key]
            assert tuple(re.findall(r"`(\w+)`", values)) == (get_args(field.annotation) if values else ())


async def test_a_request_without_a_name_is_for_the_first_model(folder: Path) -> None:
    async with client_of("several.yaml") as client:
        assert (await client.post("/sync/predict", json={"text": "one two"})).json()["words"] == 2


class Failing(InferencePipeline):
    """Fails as the first column of the guide's table of errors says."""

    def preprocess(self, input_list: list[Any]) -> dict[str, Any]:
        for index, item in enumerate(input_list):
            if item.text == "rejected":
                raise RejectItem("why", index=index)
            if item.text == "raised":
                raise LookupError("why")
            if item.text == "memory":
                raise BatchTooLargeError("why")
        return {}

    def predict(self, input_list: list[Any], preprocessed_data: dict[str, Any]) -> dict[str, Any]:
        return {}

    def postprocess(self, input_list: list[Any], raw_output: dict[str, Any]) -> list[Any]:
        in_place = {
            "returned": RejectItem("why"),
            "status": InferenceOutputModel(status="error", error="why"),
            "exception": LookupError("why"),
        }
        outputs = [in_place.get(item.text, InferenceOutputModel()) for item in input_list]
        return outputs[:-1] if any(item.text == "missing" for item in input_list) else outputs


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("rejected", 422),
        ("returned", 422),
        ("status", 422),
        ("exception", 500),
        ("raised", 500),
        ("missing", 500),
        ("memory", 500),
    ],
)
async def test_callers_get_what_the_table_of_errors_says(folder: Path, text: str, status: int) -> None:
    (folder / "failing.yaml").write_text(FILES["modalkit.yaml"].replace("words:WordCount", f"{__name__}:Failing"))
    async with client_of("failing.yaml") as client:
        answer = await client.post("/sync/predict", json={"text": text})
        assert answer.status_code == status
        assert ("0" if text == "missing" else "why") in answer.json()["detail"]
        slots = (await client.post("/batch/predict", json=[{"text": "good"}, {"text": text}, {"text": "well"}])).json()
    assert [slot["status"] for slot in slots] == ["success", "error", "success"]


def test_links_lead_to_files() -> None:
    for target in re.findall(r"\]\(([\w./-]+)\)", GUIDE):
        assert (ROOT / "docs" / target).exists(), target
