"""What the command line says of the engine of a model."""

from pathlib import Path

import pytest

from tests.support.command_line import Modalkit

CONFIGURATION = """
app_settings:
  async_config: {store: memory}
  batch_config: {calibration: {path: kept/costs.json}}
model_settings:
  model_entries:
    sentiment: {engine: ENGINE}
"""


@pytest.mark.parametrize(
    ("engine", "said"),
    [
        ("torch, dtype: float32", "sentiment: engine torch float32, as configured"),
        (
            "onnx, dtype: float16",
            "onnx computes in float32 only on this device (cpu): set dtype or engine to auto",
        ),
    ],
)
def test_check_names_the_engine_or_says_why_it_cannot_run(
    modalkit: Modalkit, folder: Path, engine: str, said: str
) -> None:
    (folder / "modalkit.yaml").write_text(CONFIGURATION.replace("ENGINE", engine))
    done = modalkit("check", MODALKIT_MODEL_SETTINGS__COMMON__DEVICE="cpu")
    assert said in " ".join((done.stdout + done.stderr).split())


def test_tune_measures_engines_and_keeps_the_choice_beside_the_learnt_costs(modalkit: Modalkit, folder: Path) -> None:
    # Every CPU has several of these; of an engine that is named, one without bfloat16 has a single one.
    (folder / "modalkit.yaml").write_text(CONFIGURATION.replace("ENGINE", "auto"))
    done = modalkit("tune", "--engines", "--max-seconds", "2", MODALKIT_MODEL_SETTINGS__COMMON__DEVICE="cpu")
    assert done.returncode == 0, done.stderr
    assert "sentiment: engine " in done.stdout
    assert list((folder / "kept" / "engines").glob("*/choice-*.json"))


def test_a_pipeline_without_engines_says_so(modalkit: Modalkit) -> None:
    done = modalkit("tune", "--engines")
    assert done.returncode == 1
    assert "LengthPipeline has no measure_engines, so there is no engine to choose" in done.stderr
