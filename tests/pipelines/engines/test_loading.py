"""An engine is the one that was asked for, or the fastest that gives the same outputs; nothing else stops a start."""

import faulthandler
import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from modalkit.pipelines import EngineError, EngineSettings, load_engine
from modalkit.pipelines.cpu_threads import cpu_threads
from modalkit.pipelines.engines import choosing, exported, measuring, probe
from modalkit.pipelines.engines.exported import Converted
from modalkit.pipelines.engines.loading import Engine
from modalkit.pipelines.engines.measuring import Race
from modalkit.pipelines.engines.settings import CONVERTED, REFERENCE, Candidate
from modalkit.pipelines.engines.torch_engine import Run
from tests.pipelines.engines.conftest import Batch, batch

EXPLICIT = [
    ("torch", "bfloat16"),
    ("torch-packed", "float32"),
    ("openvino", "float32"),
    ("onnx", "float32"),
]


def with_(settings: EngineSettings, **changes: Any) -> EngineSettings:
    return EngineSettings.model_validate({**settings.model_dump(), **changes})


def logits_of(module: nn.Module, inputs: Batch) -> Tensor:
    with torch.inference_mode():
        found: Tensor = module(**inputs)["logits"]
        return found


@pytest.mark.parametrize(("engine", "dtype"), EXPLICIT)
def test_an_engine_takes_batches_of_any_size(
    module: nn.Module, batches: list[Batch], converted: EngineSettings, engine: str, dtype: str
) -> None:
    expected = logits_of(module, batch(7, 23))
    loaded = load_engine(module, batches, with_(converted, engine=engine, dtype=dtype))
    assert (loaded.choice.engine, loaded.choice.dtype) == (engine, dtype)
    found = loaded(**batch(7, 23))["logits"]
    assert found.dtype is torch.float32
    assert torch.allclose(found, expected, atol=0.02 if dtype == "bfloat16" else 1e-5)


def test_torch_in_float32_gives_the_modules_own_numbers(
    module: nn.Module, batches: list[Batch], settings: EngineSettings
) -> None:
    engine = load_engine(module, batches, with_(settings, engine="torch", dtype="float32"))
    for inputs in (batch(1, 3), batch(33, 8)):
        assert torch.equal(engine(**inputs)["logits"], logits_of(module, inputs))


@pytest.mark.parametrize(
    ("outputs", "names"),
    [(lambda x: x, ["output"]), (lambda x: (x, x), ["output_0", "output_1"]), (lambda x: {"a": x, "b": None}, ["a"])],
)
def test_outputs_have_names(outputs: Callable[[Tensor], object], names: list[str], settings: EngineSettings) -> None:
    class Returning(nn.Module):
        def forward(self, x: Tensor) -> object:
            return outputs(x * 2)

    inputs = {"x": torch.ones(2, 3)}
    found = load_engine(Returning(), [inputs], with_(settings, engine="torch", dtype="float32"))(**inputs)
    assert list(found) == names


def test_auto_takes_what_is_fastest_and_the_next_start_measures_nothing(
    module: nn.Module, batches: list[Batch], converted: EngineSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load_engine(module, batches, converted).choice
    assert set(first.speeds) >= {"torch float32", "torch-packed float32", "openvino float32", "onnx float32"}
    assert first.samples == 60
    assert "outputs compared on 60 samples" in str(first)
    monkeypatch.setattr("modalkit.pipelines.engines.choosing.Race", None)
    again = load_engine(module, batches, converted)
    assert again.choice == first
    assert torch.allclose(again(**batch(5, 5))["logits"], logits_of(module, batch(5, 5)), atol=0.02)


def test_torch_in_bfloat16_is_measured_on_a_cpu_only_where_torch_was_asked_for(
    module: nn.Module, batches: list[Batch], converted: EngineSettings
) -> None:
    assert set(load_engine(module, batches, with_(converted, engine="torch")).choice.speeds) == {
        "torch float32",
        "torch bfloat16",
    }
    assert "torch bfloat16" not in load_engine(module, batches, converted).choice.speeds


def test_other_weights_are_measured_again(
    module: nn.Module, batches: list[Batch], settings: EngineSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    only_torch = with_(settings, engine="torch")
    load_engine(module, batches, only_torch)
    with torch.no_grad():
        next(module.parameters()).add_(1)
    monkeypatch.setattr("modalkit.pipelines.engines.choosing.Race", None)
    with pytest.raises(TypeError, match="not callable"):
        load_engine(module, batches, only_torch)


def test_an_engine_whose_package_is_missing_is_an_error_that_names_it(
    module: nn.Module, batches: list[Batch], settings: EngineSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "openvino" else found(name))
    with pytest.raises(EngineError, match="openvino needs the package openvino: run pip install openvino, or set"):
        load_engine(module, batches, with_(settings, engine="openvino"))
    choice = load_engine(module, batches, with_(settings, measure_seconds=0)).choice
    assert choice.engine == "torch"


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        (
            {"engine": "onnx", "dtype": "bfloat16"},
            r"onnx computes in float32 only on this device \(cpu\): set dtype",
        ),
        ({"engine": "torch-compile"}, r"needs a C\+\+ compiler on a CPU: install g\+\+, or set engine to torch"),
    ],
)
def test_what_an_engine_cannot_do_is_an_error_with_the_remedy(
    module: nn.Module,
    batches: list[Batch],
    settings: EngineSettings,
    monkeypatch: pytest.MonkeyPatch,
    wish: dict[str, str],
    message: str,
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(EngineError, match=message):
        load_engine(module, batches, with_(settings, **wish))


def fail(*_: object) -> None:
    raise ValueError("no such operator")


def crash(*_: object) -> None:
    faulthandler.disable()  # pytest would show the stack
    os.kill(os.getpid(), signal.SIGSEGV)


@pytest.mark.parametrize(("happens", "said"), [(fail, "ValueError: no such operator"), (crash, "ended by SIGSEGV")])
def test_a_broken_conversion_is_a_warning_unless_it_was_asked_for(
    module: nn.Module,
    batches: list[Batch],
    settings: EngineSettings,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    happens: Callable[..., None],
    said: str,
) -> None:
    """The conversion runs in a fork of this process, so it runs the stand-in."""
    monkeypatch.setattr(probe, "convert", happens)
    engine = load_engine(module, batches, settings)
    assert engine.choice.engine in ("torch", "torch-packed")
    assert said in engine.choice.refused["openvino"]
    assert f"Engine onnx cannot run this model: {engine.choice.refused['onnx']}" in caplog.text
    assert engine(**batches[0])
    with pytest.raises(EngineError, match=rf"openvino float32 cannot run this model: .*{said}"):
        load_engine(module, batches, with_(settings, engine="openvino", dtype="float32"))


def test_an_installation_that_is_broken_is_a_warning(
    module: nn.Module,
    batches: list[Batch],
    settings: EngineSettings,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    monkeypatch.setattr(exported, "missing_packages", lambda engine: [])
    choice = load_engine(module, batches, with_(settings, measure_seconds=0)).choice
    assert choice.engine == "torch"
    assert "Engine openvino cannot be used: ModuleNotFoundError" in caplog.text


def test_wrong_numbers_are_refused(
    module: nn.Module, batches: list[Batch], converted: EngineSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = {len(inputs["ids"]): -logits_of(module, inputs) for inputs in batches}

    class Wrong(Converted):
        def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {"logits": answers[len(inputs["ids"])]}

    monkeypatch.setattr(choosing, "Converted", Wrong)
    choice = load_engine(module, batches, with_(converted, dtype="float32")).choice
    assert choice.engine in ("torch", "torch-packed")
    assert "labels agree on" in choice.refused["openvino float32"]


def test_a_large_model_is_not_loaded_twice_nor_read_and_it_says_so(
    module: nn.Module, batches: list[Batch], settings: EngineSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modalkit.pipelines.engines.kept._weights_hash", fail)
    engine = load_engine(module, batches, with_(settings, max_copied_bytes=100))
    assert str(engine.choice).startswith("torch float32, not measured, because the model is not loaded twice")
    assert not (settings.cache_folder or Path()).exists()


def test_a_model_whose_copies_there_is_no_memory_for_is_not_copied_and_it_says_so(
    module: nn.Module, batches: list[Batch], settings: EngineSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choosing, "free_bytes", lambda: 100)
    engine = load_engine(module, batches, settings)
    assert str(engine.choice).startswith(
        "torch float32, not measured, because its copies need 0 MiB, and 0 MiB of memory"
    )
    assert engine(**batches[0])


def test_a_conversion_that_takes_longer_than_the_start_may_goes_on_for_a_later_one(
    module: nn.Module, batches: list[Batch], settings: EngineSettings
) -> None:
    choice = load_engine(module, batches, with_(settings, measure_seconds=0.001)).choice
    assert set(choice.unfinished) == {"openvino", "onnx"}
    assert "still to be measured: openvino, onnx" in str(choice)
    later = load_engine(module, batches, settings).choice
    assert later.unfinished == ()
    assert "onnx float32" in later.speeds


def test_a_start_that_could_compare_too_few_samples_keeps_the_earlier_choice_and_is_not_final(
    module: nn.Module, batches: list[Batch], settings: EngineSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    only_torch = with_(settings, engine="torch")
    good = load_engine(module, batches, only_torch).choice
    with monkeypatch.context() as busy:
        busy.setattr(measuring, "MIN_SAMPLES", 10_000)
        again = load_engine(module, batches, with_(only_torch, use_kept_choice=False, measure_seconds=0.001)).choice
        assert (again.candidate, again.samples) == (good.candidate, good.samples)
        elsewhere = with_(only_torch, cache_folder=(settings.cache_folder or Path()) / "new", measure_seconds=0.001)
        assert load_engine(module, batches, elsewhere).choice.is_tentative
    later = load_engine(module, batches, with_(elsewhere, measure_seconds=settings.measure_seconds)).choice
    assert not later.is_tentative


def test_engines_are_loaded_with_a_part_of_the_threads_and_timed_with_all_and_other_threads_keep_theirs(
    module: nn.Module, batches: list[Batch], converted: EngineSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, timed, elsewhere = set(), set(), set()

    class Watched(Race):
        def enter(self, candidate: Candidate, load: Callable[[Candidate], Run]) -> None:
            if candidate.engine not in CONVERTED:
                loaded.add(torch.get_num_threads())
            with ThreadPoolExecutor(1) as new:  # torch's default is for its first use in a thread
                elsewhere.add(new.submit(torch.get_num_threads).result())
            super().enter(candidate, load)

        def run(self, deadline_s: float) -> None:
            timed.add(torch.get_num_threads())
            super().run(deadline_s)

    monkeypatch.setattr(choosing, "Race", Watched)
    load_engine(module, batches, converted)
    threads = cpu_threads()
    assert loaded == {threads.total // threads.max_in_flight}
    assert timed == elsewhere == {threads.total}
    assert torch.get_num_threads() == threads.total


def test_an_export_that_no_start_waits_for_comes_after_it(
    module: nn.Module, batches: list[Batch], settings: EngineSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as long_export:
        long_export.setattr(choosing, "ONNX_EXPORT_S", 1000)
        choice = load_engine(module, batches, settings).choice
    assert choice.unfinished == ("onnx",)
    assert "openvino float32" in choice.speeds
    assert load_engine(module, batches, settings).choice.unfinished == ()


def test_a_folder_that_cannot_be_written_stops_no_start(
    module: nn.Module, batches: list[Batch], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    engine: Engine = load_engine(module, batches, EngineSettings(cache_folder=tmp_path / "file", measure_seconds=9))
    assert engine.choice.engine in ("torch", "torch-packed")
    assert "cannot be kept" in caplog.text


def test_without_batches_there_is_nothing_to_measure(module: nn.Module) -> None:
    with pytest.raises(ValueError, match="example_inputs is empty"):
        load_engine(module, [])


def test_importing_the_api_imports_no_engine() -> None:
    program = (
        "import modalkit.pipelines, sys; print(*({'torch', 'openvino', 'onnx', 'onnxruntime'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == ""


def cannot_compare(*_: object) -> str | None:
    raise KeyError("probabilities")


def test_a_comparison_that_fails_is_a_warning_and_torch_runs(
    module: nn.Module,
    batches: list[Batch],
    settings: EngineSettings,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(Race, "speed", lambda race, contender: 1 if contender.candidate == REFERENCE else 2)
    only_torch = with_(settings, engine="torch")
    engine = load_engine(module, batches, only_torch, same=cannot_compare)
    assert str(engine.choice).startswith("torch float32, outputs could not be compared")
    assert "Outputs of engines cannot be compared: KeyError: 'probabilities'" in caplog.text
    assert engine(**batches[0])
    assert load_engine(module, batches, only_torch).choice.samples  # measured, so the failure was not kept


def test_an_engine_that_was_asked_for_is_waited_for(
    module: nn.Module, batches: list[Batch], settings: EngineSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choosing, "dtypes_of", lambda engine, device: ["float32", "bfloat16"])
    asked = with_(settings, engine="openvino", measure_seconds=0.001)
    assert load_engine(module, batches, asked).choice.engine == "openvino"


def test_an_engine_that_was_asked_for_and_fails_in_all_its_formats_is_an_error(
    module: nn.Module, batches: list[Batch], settings: EngineSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choosing, "dtypes_of", lambda engine, device: ["float32", "bfloat16"])
    monkeypatch.setattr(probe, "convert", fail)
    with pytest.raises(EngineError, match=r"openvino float32 cannot run this model: .*no such operator"):
        load_engine(module, batches, with_(settings, engine="openvino"))


def test_a_folder_that_cannot_be_looked_into_stops_no_start(
    module: nn.Module, batches: list[Batch], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # Root may look into each folder, so one with an impossible name stands for those of other users.
    folder = tmp_path / ("x" * 300)
    engine = load_engine(module, batches, EngineSettings(cache_folder=folder, measure_seconds=9))
    assert engine.choice.engine in ("torch", "torch-packed")
    assert "Engine openvino cannot be tried: OSError" in caplog.text


def test_what_is_kept_may_be_read_by_other_users(kept: Path) -> None:
    """An image is made by root, and another user runs in it."""
    files = list(kept.glob("*/*"))
    assert {path.name.partition("-")[0] for path in files} == {"choice", "openvino", "onnx"}
    for path in [*files, *kept.glob("*/*/*")]:
        assert path.stat().st_mode & 0o044 == 0o044, path


def test_a_user_without_a_home_folder_has_engines(
    module: nn.Module, batches: list[Batch], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    assert load_engine(module, batches, EngineSettings(measure_seconds=9)).choice.engine.startswith("torch")
    assert "has no home folder to keep engines in: set cache_folder" in caplog.text


def test_weights_that_cannot_be_read_as_bytes_stop_no_start(
    module: nn.Module, batches: list[Batch], settings: EngineSettings, caplog: pytest.LogCaptureFixture
) -> None:
    class WithState(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def get_extra_state(self) -> object:
            return {"version": 2}

        def set_extra_state(self, state: object) -> None: ...

        def forward(self, ids: Tensor, mask: Tensor) -> object:
            return self.inner(ids=ids, mask=mask)

    assert load_engine(WithState(module), batches, settings).choice.engine == "torch"
    assert "Engines are not measured: AttributeError" in caplog.text
