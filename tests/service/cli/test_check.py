"""``modalkit check``: a batch for every model, and what is said of each that fails or cannot be tried."""

import json
import re
from pathlib import Path

import pytest

from tests.support.command_line import Modalkit
from tests.support.guides import ROOT, blocks

MODELS = """
from pydantic import BaseModel, Field

from modalkit.inference_pipeline import InferencePipeline
from modalkit.iomodel import InferenceOutputModel


class Review(BaseModel):
    stars: int = Field(ge=1, le=5)


class Example(BaseModel):
    stars: int = Field(examples=[3])


class Base(InferencePipeline):
    def preprocess(self, input_list):
        return {}

    def predict(self, input_list, preprocessed_data):
        return {}

    def postprocess(self, input_list, raw_output):
        return [InferenceOutputModel(stars=item.stars) for item in input_list]


class Good(Base):
    input_model = Review


class Unknown(Base):
    pass


class Broken(Base):
    input_model = Example

    def predict(self, input_list, preprocessed_data):
        return preprocessed_data["missing"]


class BrokenByGuess(Broken):
    input_model = Review


class TooFew(Base):
    input_model = Example

    def postprocess(self, input_list, raw_output):
        return [InferenceOutputModel(stars=input_list[0].stars)]


class Misspelt(Base):
    input_model = Review

    def run_inference(self, input_list):
        return [lenght(item) for item in input_list]


class Unwritable(Base):
    input_model = Example

    def postprocess(self, input_list, raw_output):
        return [InferenceOutputModel(stars=object()) for _ in input_list]


class Rejecting(Base):
    input_model = Review

    def postprocess(self, input_list, raw_output):
        return [InferenceOutputModel(status="error", error="too few stars") for _ in input_list]


class Cold(Base):
    def warm_up(self):
        start_driver()


class BadSamples(Base):
    def sample_items(self, n, size):
        return [Review(stars=1)] * (n / size)


class BadSamplesLater(BadSamples):
    def warm_up(self):
        pass


def start_driver():
    raise RuntimeError("no driver")
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "my_models.py").write_text(MODELS)
    return tmp_path


def configure(folder: Path, *names: str) -> None:
    entries = ", ".join(f"{name.lower()}: {{pipeline: 'my_models:{name}'}}" for name in names)
    (folder / "modalkit.yaml").write_text(
        f"app_settings: {{async_config: {{store: memory}}}}\nmodel_settings: {{model_entries: {{{entries}}}}}"
    )


def test_a_model_without_sample_items_is_tried_with_items_from_its_schema(modalkit: Modalkit, folder: Path) -> None:
    configure(folder, "Good")
    done = modalkit("check")
    assert (done.returncode, done.stderr) == (0, "")
    assert "4 items in" in done.stdout
    assert "made up" in done.stdout
    limits = {f"MODALKIT_APP_SETTINGS__BATCH_CONFIG__{name}": "2" for name in ("MAX_BATCH_SIZE", "MAX_QUEUE_SIZE")}
    assert "2 items in" in modalkit("check", **limits).stdout


def test_the_word_count_of_the_guide_is_tried(modalkit: Modalkit, folder: Path) -> None:
    page = (ROOT / "docs" / "start.md").read_text()
    (module,) = [block for block in blocks(page, "python") if block.startswith("# my_module.py")]
    (entry,) = [block for block in blocks(page, "yaml") if "my_module" in block]
    (folder / "my_module.py").write_text(module)
    (folder / "modalkit.yaml").write_text(entry)
    done = modalkit("check")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search("words .* WordCount .* 4 items in .*, made up", done.stdout)


@pytest.mark.parametrize(
    ("name", "exit_code", "result", "messages"),
    [
        (
            "Unknown",
            0,
            "NOT TRIED",
            [
                "NOTHING WAS TRIED: AnyInput declares no fields, and items with a text",
                "stars: is missing: add it",
                "sample_items(",
            ],
        ),
        ("Rejecting", 0, "NOT TRIED", ["NOTHING WAS TRIED: the pipeline rejects the items", "too few stars"]),
        (
            "Broken",
            1,
            "FAILED",
            ["a batch of 4 items failed: KeyError: 'missing' (", 'return preprocessed_data["'],
        ),
        ("Misspelt", 1, "FAILED", ["a batch of 4 items failed: NameError: name 'lenght' is not defined (", ")\n"]),
        ("BrokenByGuess", 1, "FAILED", ["KeyError: 'missing'", "The items were made up", "Field(examples="]),
        ("TooFew", 1, "FAILED", ["a batch of 4 items failed, and succeeded only in parts: return exactly one output"]),
        ("Unwritable", 1, "FAILED", ["unwritable: a batch of 4 items failed: the pipeline's output is no JSON"]),
        ("BadSamplesLater", 1, "FAILED", ["sample_items(4, 16) failed: TypeError: ", "in sample_items: return [Rev"]),
        ("BadSamples", 2, "FAILED to warm up", ["warming up BadSamples failed: TypeError: ", "in sample_items: "]),
        ("Cold", 2, "FAILED to warm up", ["warming up Cold failed: RuntimeError: no driver (", "in start_driver: "]),
    ],
)
def test_what_fails_or_was_not_tried_is_said_in_one_message(
    modalkit: Modalkit, folder: Path, name: str, exit_code: int, result: str, messages: list[str]
) -> None:
    configure(folder, name)
    done = modalkit("check")
    assert done.returncode == exit_code, done.stderr
    assert result in done.stdout
    for message in messages:
        assert message in done.stderr
    for line, code in re.findall(r"\(my_models.py, line (\d+), in \w+: (.*?)\)(?:\. |$)", done.stderr, re.MULTILINE):
        assert MODELS.splitlines()[int(line) - 1].strip() == code
    assert len([line for line in done.stderr.splitlines() if "[warning" not in line]) == 1


def test_a_configuration_without_a_model_is_refused(modalkit: Modalkit, folder: Path) -> None:
    (folder / "modalkit.yaml").write_text("model_settings: {model_entries: {}}")
    done = modalkit("check")
    assert (done.returncode, done.stdout) == (2, "")
    assert "there is no model; add one" in done.stderr


def test_limits_of_one_model_are_shown(modalkit: Modalkit, folder: Path) -> None:
    configure(folder, "Good")
    done = modalkit("check", MODALKIT_MODEL_SETTINGS__MODEL_ENTRIES__good__MAX_IN_FLIGHT="2")
    assert re.search("batches of good .* up to 32 items, waiting at most 0 ms, 2 at once", done.stdout)


def test_programs_get_json(modalkit: Modalkit, folder: Path) -> None:
    configure(folder, "Broken", "Good")
    done = modalkit("check", "--json")
    found = json.loads(done.stdout)
    assert {model["model"]: model["error"] is None for model in found["models"]} == {"broken": False, "good": True}
    assert found["models"][1]["loaded_s"] >= 0
    assert found["service"]["batches"] == "up to 32 items, waiting at most 0 ms"
    assert done.returncode == 1


def test_the_other_models_are_tried_after_one_that_failed(modalkit: Modalkit, folder: Path) -> None:
    configure(folder, "Cold", "Broken", "Good", "Unknown")
    done = modalkit("check")
    assert done.returncode == 2
    assert [line.split(": ")[1] for line in done.stderr.splitlines()] == ["error", "error", "warning"]
    assert "4 items in" in done.stdout


def test_the_whole_traceback_is_shown_on_demand(modalkit: Modalkit, folder: Path) -> None:
    configure(folder, "Cold")
    done = modalkit("check", "--traceback")
    assert "Traceback (most recent call last)" in done.stderr
    assert "in start_driver" in done.stderr


def test_a_warm_up_that_fails_is_one_message_of_predict_and_serve_too(modalkit: Modalkit, folder: Path) -> None:
    configure(folder, "Cold")
    predicted = modalkit("predict", "--input", "-", "--format", "jsonl", stdin='{"stars": 1}\n')
    assert predicted.returncode == 2
    assert predicted.stderr.startswith(
        "modalkit: error: model 'cold': warming up Cold failed: RuntimeError: no driver ("
    )
    assert predicted.stderr.count("\n") == 1
    served = modalkit("serve", "--port", "0")
    assert served.returncode == 2
    assert "Model 'cold' failed: model 'cold': warming up Cold failed: RuntimeError: no driver (my_mod" in served.stderr
    assert "Traceback" not in served.stderr


def test_a_misspelt_key_is_refused_before_any_model_is_loaded(modalkit: Modalkit, folder: Path) -> None:
    (folder / "modalkit.yaml").write_text(
        "model_settings:\n  model_entries:\n    a:\n      pipeline: 'my_models:Strict'\n      model_fil: a.bin\n"
    )
    constructor = "\n\nclass Strict(Base):\n    def __init__(self, model_file=None):\n        pass\n"
    (folder / "my_models.py").write_text(MODELS + constructor)
    for command in (["check"], ["serve", "--port", "0"], ["predict", "x"]):
        done = modalkit(*command)
        assert done.returncode == 2
        assert "model_entries.a.model_fil: the constructor of Strict does not take it; did you mean" in done.stderr
        assert "(modalkit.yaml, line 5)" in done.stderr
