"""The programs of docs/pipelines.md work as it says."""

import json
import pickle
import re
import sys
from base64 import b64encode
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib import import_module
from io import BytesIO
from pathlib import Path
from threading import Thread
from typing import Any, get_args

import numpy as np
import pytest
from anyio import to_thread
from PIL import Image
from transformers import BertForTokenClassification, BertModel, GPT2Config, GPT2LMHeadModel

from modalkit.batching import Failure, Success
from modalkit.pipelines import BatchTooLargeError, InferenceOutputModel, InferencePipeline, RejectItem
from modalkit.service.settings import Settings
from modalkit.testing import client_of, worker_of
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


class Vectorizer:
    """Has what a TfidfVectorizer has: counts words, and divides by how common they are. scikit-learn may be missing."""

    words = ("cat", "sat", "the")
    weights = np.array([1.0, 0.5, 0.1])

    def get_feature_names_out(self) -> Any:
        return np.array(self.words)

    def transform(self, texts: Sequence[str]) -> "Vectorizer":
        self.rows = np.array([[text.split().count(word) for word in self.words] for text in texts]) * self.weights
        return self

    def toarray(self) -> Any:
        return self.rows


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with all files of the guide."""
    for name, content in FILES.items():
        (tmp_path / name).write_text(content)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "vectorizer.pickle").write_bytes(pickle.dumps(Vectorizer()))
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


async def test_tfidf_reads_its_file_and_its_settings(folder: Path) -> None:
    async with client_of("tfidf.yaml") as client:
        answer = await client.post("/sync/predict", json={"text": "the cat sat"})
        assert answer.json()["weights"] == {"cat": 1.0, "sat": 0.5}


async def test_the_tests_of_the_guide_pass(folder: Path) -> None:
    tests = [test for name, test in vars(import_module("test_tfidf")).items() if name.startswith("test_")]
    assert len(tests) == 2
    for test in tests:
        await test()


async def test_an_image_that_cannot_be_read_is_refused_alone(folder: Path) -> None:
    brightness = import_module("brightness").Brightness
    async with worker_of(brightness) as worker:
        outcomes = await worker.predict_many([{"image": picture(255)}, {"image": "?"}, {"image": picture(0)}])
        samples = worker.pipeline.sample_items(2, 1)
        assert all(isinstance(each, Success) for each in await worker.predict_many(samples))
    assert [outcome.value.model_dump()["brightness"] for outcome in outcomes if isinstance(outcome, Success)] == [1, 0]
    assert isinstance(outcomes[1], Failure)
    assert isinstance(outcomes[1].error, RejectItem)
    assert str(outcomes[1].error).startswith("image cannot be read: ")


class Lengths(BaseHTTPRequestHandler):
    """A remote API: the length of each text."""

    def do_POST(self) -> None:
        texts = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        body = json.dumps([[len(text), self.headers["Authorization"]] for text in texts]).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_request(self, *args: object) -> None:
        """Nothing is printed."""


async def test_a_remote_api_is_asked_for_a_whole_batch(folder: Path) -> None:
    remote = import_module("remote").Remote
    with HTTPServer(("127.0.0.1", 0), Lengths) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            async with worker_of(remote, url=f"http://127.0.0.1:{server.server_port}", api_key="k") as worker:
                outcomes = await worker.predict_many([{"text": "a"}, {"text": "bcd"}])
        finally:
            await to_thread.run_sync(server.shutdown)
            thread.join()
    vectors = [outcome.value.model_dump()["vector"] for outcome in outcomes if isinstance(outcome, Success)]
    assert vectors == [[1, "Bearer k"], [3, "Bearer k"]]


def test_the_key_of_the_api_can_be_a_variable(folder: Path) -> None:
    (name,) = re.findall(r"`(MODALKIT_\w+)` gives the key", GUIDE)
    entry = Settings(_config_files=["remote.yaml"], _environ={name: "secret"}).model_settings.model_entries["remote"]
    assert entry.arguments() == {"url": "http://127.0.0.1:9000/embed", "api_key": "secret"}
    assert entry.max_in_flight == 16


async def test_a_text_is_generated_piece_by_piece(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(GPT2LMHeadModel, folder / "gpt", GPT2Config, bos_token_id=2, eos_token_id=3)
    generate = import_module("generate").Generate
    async with worker_of(generate, model_path="gpt", max_new_tokens=4) as worker:
        await import_module("stream").print_pieces(worker, "the cat sat")
        pieces = capsys.readouterr().out.splitlines()
        texts = ["the cat sat", "a longer text about the cat that sat"]
        outcomes = await worker.predict_many([{"text": text} for text in texts])
    assert len(pieces) == 4
    assert pieces[3].startswith(pieces[1])
    assert isinstance(outcomes[0], Success)
    assert outcomes[0].value.model_dump()["text"] == pieces[3]


async def test_models_of_transformers_need_no_class(folder: Path) -> None:
    save_model(BertModel, folder / "models" / "my-encoder")
    save_model(BertForTokenClassification, folder / "models" / "my-tagger", id2label={0: "O", 1: "B-CAT"})
    async with client_of("transformers.yaml") as client:
        answer = await client.post("/sync/predict?model_name=vectors", json={"text": "a cat"})
        assert np.linalg.norm(answer.json()["embedding"]) == pytest.approx(1)
        answer = await client.post("/sync/predict?model_name=names", json={"text": "a cat"})
        assert isinstance(answer.json()["entities"], list)


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


async def test_two_models_are_served_at_once(folder: Path) -> None:
    async with client_of("several.yaml") as client:
        words = await client.post("/sync/predict?model_name=words", json={"text": "one two"})
        bright = await client.post("/sync/predict?model_name=pictures", json={"image": picture(255)})
        unnamed = await client.post("/sync/predict", json={"text": "one two"})
    assert words.json()["words"] == 2
    assert bright.json()["brightness"] == 1
    assert unnamed.json() == words.json()


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
