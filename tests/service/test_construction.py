"""Constructors of pipelines: what they are given, and which keys of an entry are refused."""

import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Barrier, BrokenBarrierError
from types import ModuleType
from typing import Any

import pytest
from pydantic import BaseModel

from modalkit.pipelines import InferenceOutputModel, InferencePipeline
from modalkit.service.loading import LoadError, ModelSource
from modalkit.service.settings import Settings, SettingsError
from modalkit.service.worker import InferenceWorker

MODEL = """
model_settings:
  local_model_repository_folder: ./weights
  common: {{device: cpu, dtype: auto, threads: null}}
  model_entries:
    mine:
      pipeline: "{module}:{name}"
      {keys}
"""

NO_MODELS: dict[str, str] = {}


class Base(InferencePipeline):
    """Three stages and no constructor."""

    model_file = ""

    def preprocess(self, input_list: list[BaseModel]) -> dict[str, Any]:
        return {}

    def predict(self, input_list: list[BaseModel], preprocessed_data: dict[str, Any]) -> dict[str, Any]:
        return {}

    def postprocess(self, input_list: list[BaseModel], raw_output: dict[str, Any]) -> list[InferenceOutputModel]:
        return [InferenceOutputModel() for _ in input_list]


class Simple(Base):
    def __init__(self, model_file: str) -> None:
        self.model_file = model_file
        self.seen = (self.model_name, self.all_model_data_folder, self.common_settings["device"])


class ByKeyword(Base):
    def __init__(self, *, model_file: str, threshold: float = 0.5) -> None:
        super().__init__()
        self.model_file = model_file
        self.threshold = threshold


class ByPosition(Base):
    def __init__(self, model_file: str, /) -> None:
        self.model_file = model_file


class Alone(Base):
    def __init__(self, model_file: str) -> None:
        self.model_file = model_file


class WithSome(Base):
    def __init__(self, common_settings: dict[str, Any], model_file: str, model_name: str) -> None:
        self.model_file = model_file
        self.given = (common_settings["device"], model_name)


class Documented(Base):
    def __init__(
        self, model_name: str, all_model_data_folder: str, common_settings: dict[str, Any], **model_entry: Any
    ) -> None:
        super().__init__(model_name, all_model_data_folder, common_settings, **model_entry)
        self.model_file = model_entry["model_file"]


class PassedOn(Base):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.model_file = options["model_file"]


class PassedOnByName(Base):
    def __init__(self, model_file: str, **options: Any) -> None:
        super().__init__(**options)
        self.model_file = model_file


class Renamed(Base):
    def __init__(self, model_file: str) -> None:
        super().__init__("another name")
        self.model_file = model_file


@dataclass
class AsDataclass(Base):
    model_file: str = "default.bin"


class Tuned(Base):
    def __init__(self, model_file: str, engine: str = "auto", dtype: str = "auto") -> None:
        self.model_file = model_file
        self.chosen = (engine, dtype)


class Failing(Base):
    def __init__(self, model_file: str) -> None:
        self.table = NO_MODELS[model_file]


class Sized(Base):
    def item_size(self, item: BaseModel) -> int:
        return 2


class Meeting(Base):
    """Notes whether another constructor runs at the same time."""

    barrier = Barrier(2)

    def __init__(self) -> None:
        self.has_met = True
        try:
            self.barrier.wait(timeout=0.1)
        except BrokenBarrierError:
            self.has_met = False


class Returning(InferencePipeline):
    async def predict_stream(self, input_list: list[BaseModel]) -> list[InferenceOutputModel]:
        return [InferenceOutputModel() for _ in input_list]


class Reserved(Base):
    def __init__(self, devices: str) -> None:
        self.devices = devices


def source_of(kind: type[InferencePipeline], keys: str) -> ModelSource:
    Path("modalkit.yaml").write_text(MODEL.format(module=__name__, name=kind.__name__, keys=keys))
    return ModelSource(Settings.load(environ={}), "mine")


@pytest.mark.parametrize(
    "kind",
    [
        Simple,
        ByKeyword,
        ByPosition,
        WithSome,
        Documented,
        PassedOn,
        PassedOnByName,
        Renamed,
        AsDataclass,
    ],
)
def test_a_constructor_gets_what_it_asks_for_and_need_not_call_that_of_its_base(kind: type[Base]) -> None:
    pipeline = source_of(kind, "model_file: a.bin").load()
    assert isinstance(pipeline, kind)
    assert pipeline.model_file == "a.bin"
    assert (pipeline.model_name, pipeline.all_model_data_folder) == ("mine", "weights")
    assert pipeline.common_settings["device"] == "cpu"
    assert pipeline.model_entry["model_file"] == "a.bin"


def test_the_attributes_are_there_before_the_constructor_runs() -> None:
    pipeline = source_of(Simple, "model_file: a.bin").load()
    assert isinstance(pipeline, Simple)
    assert pipeline.seen == ("mine", "weights", "cpu")


@pytest.mark.anyio
async def test_a_simple_pipeline_runs_in_a_worker_without_a_configuration() -> None:
    async with InferenceWorker(Alone("a.bin")) as worker:
        assert worker.model_name == "Alone"
        assert (await worker.predict({"text": "a"})).status == "success"


def test_keys_of_an_engine_reach_the_constructor_and_those_of_modalkit_do_not() -> None:
    keys = "<<: {model_file: a, engine: onnx, dtype: bfloat16, max_in_flight: 2, devices: 'cuda:0', batch_config: {}}"
    pipeline = source_of(Tuned, keys).load()
    assert isinstance(pipeline, Tuned)
    assert pipeline.chosen == ("onnx", "bfloat16")
    assert pipeline.model_entry == {"model_file": "a", "engine": "onnx", "dtype": "bfloat16"}
    assert pipeline.common_settings["device"] == "cuda:0"


def test_the_device_of_an_entry_goes_before_the_common_one() -> None:
    assert source_of(Base, "devices: [cuda:1]").load().common_settings["device"] == "cuda:1"
    assert source_of(Base, "devices: 'cuda:1'").load("cpu").common_settings["device"] == "cpu"
    assert source_of(Base, "").devices() == ["cpu"]
    assert source_of(Base, "devices: [cpu, cpu]").devices() == ["cpu", "cpu"]


@pytest.mark.parametrize(
    ("kind", "keys", "messages"),
    [
        (
            Simple,
            "model_fil: a.bin",
            [
                "mine.model_fil: the constructor of Simple does not take it; did you mean model_file? It takes model_",
                "model_file (modalkit.yaml, line 8)",
                "mine.model_file: is missing: add it, the constructor of Simple needs it. It takes model_file (modal",
                "model_file (modalkit.yaml, line 6)",
            ],
        ),
        (
            ByKeyword,
            "<<: {model_file: a, cache: b}",
            ["mine.cache: the constructor of ByKeyword does not take it. It takes model_file, threshold (optional)"],
        ),
        (Simple, "<<: {model_file: a, batch_confg: {}}", ["mine.batch_confg: ", "did you mean batch_config?"]),
        (
            Base,
            "<<: {model_file: a, batch_confg: {}}",
            [
                "mine.model_file: the constructor of Base does not take it. The class has no __init__: add one",
                "mine.batch_confg: the constructor of Base does not take it; did you mean batch_config? The class has",
            ],
        ),
        (Documented, "<<: {devices: [auto, 'cuda:0']}", ["mine.devices: auto stands for all GPUs"]),
        (Documented, "<<: {devices: 1}", ["mine.devices: must be the name of a device, as in cpu or cuda:0"]),
        (
            Reserved,
            "<<: {devices: cpu}",
            ["mine.devices: modalkit uses this key itself: rename the parameter"],
        ),
    ],
)
def test_a_wrong_key_is_refused_with_what_the_constructor_takes(
    kind: type[Base], keys: str, messages: list[str]
) -> None:
    with pytest.raises(SettingsError) as caught:
        source_of(kind, keys)
    for message in messages:
        assert message in str(caught.value)


def test_a_key_like_one_of_modalkits_is_reported_where_the_constructor_takes_any(
    caplog: pytest.LogCaptureFixture,
) -> None:
    entry = source_of(Documented, "<<: {model_file: a, batch_confg: {}}").load().model_entry
    assert entry == {"model_file": "a", "batch_confg": {}}
    said = "mine.batch_confg: is given to the constructor of Documented; did you mean batch_config? (modalkit.yaml"
    assert said in caplog.text


def test_a_limit_of_tokens_without_the_sizes_of_items_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    source_of(Base, "batch_config: {max_batch_size: 5}")
    source_of(Sized, "batch_config: {max_batch_tokens: 5}")
    assert not caplog.text
    source_of(Base, "batch_config: {max_batch_tokens: 5}")
    said = "mine: batch_config.max_batch_tokens has no effect, because each item has the size 1; implement item_size"
    assert said in caplog.text


def test_a_stream_that_returns_is_refused_when_the_pipeline_is_made() -> None:
    with pytest.raises(LoadError, match=r"Returning\.predict_stream must yield a list with a piece for each item, not"):
        source_of(Returning, "").load()


def test_constructors_that_may_use_transformers_run_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two models that it loads at once, in two threads, spoil each other."""
    monkeypatch.setitem(sys.modules, "transformers", ModuleType("transformers"))
    sources = [source_of(Meeting, "") for _ in range(2)]
    with ThreadPoolExecutor(2) as threads:
        pipelines = list(threads.map(ModelSource.load, sources))
    assert [pipeline.has_met for pipeline in pipelines if isinstance(pipeline, Meeting)] == [False, False]


def test_an_error_of_a_constructor_has_its_class_and_the_users_line() -> None:
    with pytest.raises(LoadError) as caught:
        source_of(Failing, "model_file: a.bin").load()
    line = next(n for n, text in enumerate(Path(__file__).read_text().splitlines(), 1) if "self.table = NO" in text)
    assert "model_settings.model_entries.mine: Failing cannot be loaded: KeyError: 'a.bin'" in str(caught.value)
    assert f"test_construction.py, line {line}, in __init__: self.table = NO_MODELS[model_file])" in str(caught.value)
