"""The model that ships: what it weighs, how good it is, and that it comes without a sound."""

import subprocess
import sys
from pathlib import Path

import pytest

from modalkit.pipelines.loading import BUNDLED_FOLDER
from modalkit.pipelines.sentiment import SentimentPipeline
from modalkit.pipelines.training.__main__ import evaluate
from modalkit.pipelines.training.data import Sentence

ROOT = Path(__file__).parents[2]


def test_it_weighs_at_most_25_megabytes() -> None:
    assert sum(file.stat().st_size for file in BUNDLED_FOLDER.iterdir()) <= 25_000_000


def test_it_is_as_accurate_as_its_card_says(bundled: SentimentPipeline, held_out: list[Sentence]) -> None:
    figures = evaluate(bundled, held_out)
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


def test_the_test_data_is_the_held_out_tenth(held_out: list[Sentence]) -> None:
    assert all(sentence.held_out for sentence in held_out)
    assert not Sentence("tweets", 1.0, "a sentence that falls on the other side").held_out


def test_loading_and_running_it_prints_nothing() -> None:
    program = (
        "from modalkit.pipelines.sentiment import SentimentPipeline, SentimentRequest;"
        "SentimentPipeline('s', '.', {}).run_inference([SentimentRequest(text='word ' * 2000)])"
    )
    done = subprocess.run(
        [sys.executable, "-W", "default", "-c", program], check=True, cwd=ROOT, capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == ("", "")
