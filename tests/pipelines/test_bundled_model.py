"""The model that ships: what it weighs, how good it is, and that it comes without a sound."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import BaseModel

from modalkit.pipelines.classifier_settings import ClassifierEntry
from modalkit.pipelines.loading import BUNDLED_FOLDER, load_checkpoint
from modalkit.pipelines.sentiment import SentimentPipeline, SentimentRequest
from modalkit.pipelines.training.__main__ import evaluate
from modalkit.pipelines.training.data import Sentence

ROOT = Path(__file__).parents[2]


def test_it_weighs_at_most_25_megabytes() -> None:
    assert sum(file.stat().st_size for file in BUNDLED_FOLDER.iterdir()) <= 25_000_000


def test_it_is_as_accurate_as_its_card_says(held_out: list[Sentence]) -> None:
    """By the engine that takes the least time for so many texts."""
    model = SentimentPipeline("sentiment", "models", {"device": "cpu"}, engine="torch-unpadded", dtype="float32")
    figures = evaluate(model, held_out)
    assert figures["all"].count == len(held_out) == 2414
    assert figures["all"].three_way >= 0.73
    assert figures["all"].polarity >= 0.84
    card = (BUNDLED_FOLDER / "README.md").read_text()
    rows = {line.split("|")[1].split("(")[-1].strip(" )"): line for line in card.splitlines() if line.startswith("| ")}
    for name, found in figures.items():
        count, three_way, polar_count, polarity = (cell.strip() for cell in rows[name].split("|")[2:6])
        assert (count, polar_count) == (f"{found.count:,}", f"{found.polar_count:,}")
        # Another processor may round a close call the other way.
        assert float(three_way) == pytest.approx(found.three_way, abs=0.003)
        assert float(polarity) == pytest.approx(found.polarity, abs=0.003)


@pytest.fixture(scope="module")
def items(held_out: list[Sentence]) -> list[BaseModel]:
    return [SentimentRequest(text=sentence.text) for sentence in held_out[:100]]


@pytest.fixture(scope="module")
def expected(bundled: SentimentPipeline, items: list[BaseModel]) -> list[Any]:
    return [answer.model_dump() for answer in bundled.run_inference(items)]


@pytest.mark.parametrize(
    ("engine", "dtype"),
    [("torch", "bfloat16"), ("torch-packed", "float32"), ("openvino", "float32"), ("onnx", "float32")],
)
def test_every_engine_gives_its_labels(
    items: list[BaseModel], expected: list[Any], engines_folder: Path, engine: str, dtype: str
) -> None:
    common = {"device": "cpu", "engines": {"cache_folder": engines_folder}}
    pipeline = SentimentPipeline("sentiment", "models", common, engine=engine, dtype=dtype)
    found = [answer.model_dump() for answer in pipeline.run_inference(items)]
    agree = sum(a["sentiment"] == b["sentiment"] for a, b in zip(expected, found, strict=True))
    assert agree >= 0.99 * len(items)
    assert f"{engine} {dtype}" in pipeline.device_name()
    if dtype == "float32":
        confidences = ([answer["confidence"] for answer in answers] for answers in (expected, found))
        assert next(confidences) == pytest.approx(next(confidences), abs=1e-4)


def test_by_default_it_runs_by_what_is_fastest_with_its_labels(
    items: list[BaseModel], expected: list[Any], engines_folder: Path
) -> None:
    common = {"device": "cpu", "engines": {"cache_folder": engines_folder, "measure_seconds": 2}}
    pipeline = SentimentPipeline("sentiment", "models", common)
    assert pipeline.engine_choice is not None
    assert pipeline.engine_choice.speeds["torch float32"] == 1
    pairs = zip(expected, pipeline.run_inference(items), strict=True)
    assert sum(a["sentiment"] == b.model_dump()["sentiment"] for a, b in pairs) >= 99


def test_torch_in_float32_computes_what_the_model_itself_does(bundled: SentimentPipeline) -> None:
    items: list[BaseModel] = [SentimentRequest(text=text) for text in ("What a lovely day!", "good " * 90)]
    prepared = bundled.preprocess(items)
    model = load_checkpoint(ClassifierEntry(), Path(), torch.device("cpu")).model
    with torch.inference_mode():
        expected = model(**prepared["tensors"]).logits.softmax(dim=-1)
    assert torch.equal(bundled.predict(items, prepared)["probabilities"], expected)


def test_the_test_data_is_the_held_out_tenth(held_out: list[Sentence]) -> None:
    assert all(sentence.held_out for sentence in held_out)
    assert not Sentence("tweets", 1.0, "a sentence that falls on the other side").held_out


def test_loading_and_running_it_prints_nothing(engines_folder: Path) -> None:
    program = (
        "from modalkit.pipelines.sentiment import SentimentPipeline, SentimentRequest;"
        f"common = {{'engines': {{'cache_folder': {str(engines_folder)!r}, 'measure_seconds': 2}}}};"
        "SentimentPipeline('s', '.', common).run_inference([SentimentRequest(text='word ' * 2000)])"
    )
    done = subprocess.run(
        [sys.executable, "-W", "default", "-c", program], check=True, cwd=ROOT, capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == ("", "")
