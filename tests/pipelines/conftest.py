from pathlib import Path

import pytest

from modalkit.pipelines.sentiment import SentimentPipeline
from modalkit.pipelines.training.data import Sentence, read_sentences


@pytest.fixture(scope="session")
def bundled() -> SentimentPipeline:
    """The bundled model with the exact numbers."""
    return SentimentPipeline("sentiment", "models", {"dtype": "float32"}, engine="torch")


@pytest.fixture(scope="session")
def engines_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where engines are kept: a model is converted once for all tests of a process that may use it so."""
    return tmp_path_factory.mktemp("engines")


@pytest.fixture(scope="session")
def held_out() -> list[Sentence]:
    """The sentences that the bundled model was not trained on."""
    return read_sentences(Path(__file__).parent / "data" / "held_out.tsv")
