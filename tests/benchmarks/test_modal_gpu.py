"""The benchmark as a Modal app, without Modal: neither token nor network."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import modal
import pytest

from modalkit.benchmarks.containers.variants import BATCH_LIMIT_VARIABLE, Variant
from modalkit.benchmarks.modal_gpu import Measured, Model, class_settings, load_function_settings, variant_class
from modalkit.service.on_modal.config import ModalConfig
from tests.support.modal_objects import inner, method_names

CONFIGURATION = """
app_settings:
  deployment_config: {secrets: [hub-token], region: us-east, min_containers: 3, volumes: {/models: weights}}
"""


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModalConfig:
    """A deployment with secrets, a region, and containers kept warm."""
    (tmp_path / "modalkit.yaml").write_text(CONFIGURATION)
    monkeypatch.chdir(tmp_path)
    return ModalConfig(environ={"MODALKIT_APP_SETTINGS__BATCH_CONFIG__WAIT_MS": "5"})


@pytest.mark.parametrize("service_cls", [Model, Measured(class_name="Model").service_cls()], ids=["own", "deployed"])
def test_a_variant_has_one_container_of_its_gpu_and_nothing_of_the_deployed_ones_is_lost(
    config: ModalConfig, service_cls: Any
) -> None:
    options = inner(variant_class(service_cls, Variant("L4", 128), config))._options  # noqa: SLF001  # nothing else tells
    assert options.resources.gpu_config.gpu_type == "L4"
    assert options.max_containers == 1
    assert options.max_concurrent_inputs >= 64
    assert not options.validated_volumes, "they would replace those of the class"
    named, env = options.secrets
    assert "hub-token" in repr(named)
    assert env is not named


def test_a_variants_variables_are_those_of_the_deployed_containers_and_its_limit(
    config: ModalConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[dict[str, str]] = []

    def with_options(cls: object, *, env: dict[str, str], **options: object) -> object:
        made.append(env)
        return cls

    monkeypatch.setattr(modal.Cls, "with_options", with_options)
    variant_class(Measured(class_name="Model").service_cls(), Variant("L4", 128), config)
    assert made == [config.environment | {BATCH_LIMIT_VARIABLE: "128"}]
    assert {"MODALKIT_CONFIG", "MODALKIT_APP_POSTFIX", "MODALKIT_APP_SETTINGS__BATCH_CONFIG__WAIT_MS"} <= made[0].keys()


def test_the_callers_run_in_the_services_image_and_region_and_none_is_kept_warm(config: ModalConfig) -> None:
    settings = load_function_settings(config)
    assert settings["image"] is config.get_image()
    assert settings["env"] == config.environment
    assert settings["region"] == "us-east"
    assert "min_containers" not in settings
    assert "gpu" not in settings


def test_the_class_of_the_benchmark_is_the_services_and_tells_of_its_batches(config: ModalConfig) -> None:
    assert method_names(Model) == ["batch_report", "process_request"]
    assert "min_containers" in config.get_app_cls_settings()
    assert "min_containers" not in class_settings(config), "each would be paid for"
    assert Measured().service_cls() is Model


def test_the_command_is_there_without_a_token(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MODAL")}
    shown = subprocess.run(
        [sys.executable, "-m", "modal", "run", "-m", "modalkit.benchmarks.modal_gpu", "--help"],
        env=environment | {"MODAL_CONFIG_PATH": str(tmp_path / "none.toml"), "PYTHONPATH": str(Path.cwd())},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for option in ("--gpus", "--batch-sizes", "--concurrency", "--seconds", "--model", "--output", "--app-name"):
        assert option in shown
