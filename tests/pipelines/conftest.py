from pathlib import Path

import pytest

from modalkit.pipelines.sentiment import SentimentPipeline
from modalkit.pipelines.training.data import Sentence


@pytest.fixture(scope="session")
def bundled() -> SentimentPipeline:
    """The bundled model with the exact numbers."""
    return SentimentPipeline("sentiment", "models", {"dtype": "float32"}, engine="torch")


@pytest.fixture(scope="session")
def held_out() -> list[Sentence]:
    """The sentences that the bundled model was not trained on."""
    rows = (Path(__file__).parent / "data" / "held_out.tsv").read_text(encoding="utf-8").split("\n")[:-1]
    return [Sentence(source, float(rating), text) for source, rating, text in (row.split("\t", 2) for row in rows)]
