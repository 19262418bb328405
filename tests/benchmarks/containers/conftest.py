from pathlib import Path

import pytest

CONFIGURATION = """
model_settings:
  model_entries:
    nothing: {pipeline: "modalkit.benchmarks.nothing:NothingPipeline"}
    sentiment: {pipeline: "modalkit.pipelines.sentiment:SentimentPipeline", model_path: bundled}
    lengths: {pipeline: "tests.support.length_model:LengthPipeline"}
    unloadable: {pipeline: "tests.support.length_model:UnloadablePipeline"}
"""


@pytest.fixture
def configured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working folder with the configuration of models that do nothing, work, and cannot be loaded."""
    (tmp_path / "modalkit.yaml").write_text(CONFIGURATION)
    monkeypatch.chdir(tmp_path)
