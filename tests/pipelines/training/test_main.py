"""The program that makes and measures the model, over a filled cache: nothing is downloaded."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from modalkit.pipelines.sentiment import SentimentPipeline
from modalkit.pipelines.training.__main__ import app, evaluate
from modalkit.pipelines.training.data import fetch_sentences, load_sentences


def run(*arguments: str | Path) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_training_writes_a_model_that_is_served_as_it_is(cache: Path, tmp_path: Path) -> None:
    folder = tmp_path / "made"
    folder.mkdir()
    (folder / "README.md").write_text("a model card")
    output = run("train", "--cache", cache, "--output", folder)
    assert "epoch 4 of 4" in output
    assert "| all | " in output
    assert {file.name for file in folder.iterdir()} == {
        "README.md",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert all(file.stat().st_mode & 0o777 == 0o644 for file in folder.iterdir() if file.suffix != ".md")
    assert json.loads((folder / "tokenizer.json").read_text())["truncation"] is None
    pipeline = SentimentPipeline("made", ".", {}, model_path=str(folder), engine="torch", dtype="float32")
    assert pipeline.labels == ["negative", "neutral", "positive"]
    assert run("evaluate", folder, "--cache", cache) == output[output.index("engine torch") :]


def test_exported_sentences_are_those_held_out(cache: Path, tmp_path: Path) -> None:
    output = tmp_path / "held_out.tsv"
    run("export-held-out", output, "--cache", cache)
    texts = [line.split("\t", 2)[2] for line in output.read_text().splitlines()]
    assert texts == [sentence.text for sentence in load_sentences(fetch_sentences(cache)) if sentence.held_out]


def test_figures_are_given_by_source_and_in_all(bundled: SentimentPipeline, cache: Path) -> None:
    figures = evaluate(bundled, load_sentences(fetch_sentences(cache)))
    assert [figures[name].count for name in ("tweets", "all")] == [90, 360]
    assert figures["all"].polar_count == 240
    assert figures["all"].polarity > 0.9


def test_a_model_of_other_labels_is_refused_by_name(
    bundled: SentimentPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundled, "labels", ["bad", "good"])
    with pytest.raises(ValueError, match="it has bad, good"):
        evaluate(bundled, [])


def test_a_folder_that_holds_no_model_is_a_usage_error(cache: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["evaluate", str(tmp_path), "--cache", str(cache)])
    assert result.exit_code == 2
    assert "cannot load a text classifier" in result.output
    assert "Traceback" not in result.output
