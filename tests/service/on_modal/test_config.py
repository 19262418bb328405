"""Definitions of classes, functions and servers with Modal's own client, from a configuration."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import modal
import pytest

from modalkit.modal_config import ModalConfig
from modalkit.service.loading import LoadError
from modalkit.service.settings import Settings
from tests.support.modal_objects import class_spec, inner

EVERYTHING: dict[str, Any] = {
    "gpu": ["A10", "T4"],
    "cpu": 2.5,
    "memory": 4096,
    "min_containers": 1,
    "max_containers": 4,
    "scaledown_window": 60,
    "max_concurrent_inputs": 16,
    "target_concurrent_inputs": 8,
    "max_concurrent_requests": 500,
    "timeout": 120,
    "memory_snapshot": True,
    "gpu_snapshot": True,
    "secure": False,
    "region": ["us-east", "eu-west"],
    "retries": 2,
    "secrets": ["hub-token"],
    "volumes": {"/models": "weights"},
    "cloud_bucket_mounts": [{"mount_point": "/data", "bucket_name": "mine", "secret": "aws", "read_only": True}],
}


def config(deployment: dict[str, Any] | None = None, **variables: str) -> ModalConfig:
    """A configuration in the working directory of the test."""
    Path("modalkit.yaml").write_text(json.dumps({"app_settings": {"deployment_config": deployment or {}}}))
    return ModalConfig(environ=variables)


class Service:
    @modal.method()
    def predict(self) -> None: ...


def web() -> None: ...


def test_the_apps_name_has_a_postfix() -> None:
    assert config().app_name == "sentiment-dev"
    assert config(MODALKIT_APP_POSTFIX="-live").app_name == "sentiment-live"
    assert config(MODALKIT_APP_POSTFIX="").app_name == "sentiment"


def test_settings_that_are_given_are_used() -> None:
    settings = Settings.load([], {"MODALKIT_APP_SETTINGS__APP_PREFIX": "given"})
    made = ModalConfig(settings, environ={})
    assert made.settings is settings
    assert made.app_settings is settings.app_settings
    assert made.model_settings is settings.model_settings
    assert made.app_name == "given-dev"


@pytest.mark.parametrize("deployment", [{}, EVERYTHING])
def test_a_class_is_registered_with_its_settings(deployment: dict[str, Any]) -> None:
    made = config(deployment)
    app = modal.App(made.app_name)
    concurrent = modal.concurrent(**made.get_concurrency_settings())
    registered: object = app.cls(**made.get_app_cls_settings(), serialized=True)(concurrent(Service))
    spec = class_spec(registered)
    assert spec.gpus == deployment.get("gpu", "T4")
    assert spec.cpu == deployment.get("cpu")
    assert spec.memory == deployment.get("memory")
    assert set(spec.volumes) == ({"/models", "/data"} if deployment else set())
    assert len(spec.secrets) == len(deployment.get("secrets", [])) + 1


def test_the_settings_of_the_class_are_modals_argument_names() -> None:
    made = config(EVERYTHING)
    settings = made.get_app_cls_settings()
    assert settings.pop("image") is made.get_image()
    assert settings.pop("env") == made.environment
    assert settings.pop("volumes") == {**made.volumes, **made.cloud_bucket_mounts}
    assert len(settings.pop("secrets")) == 1
    assert settings == {
        "gpu": ["A10", "T4"],
        "cpu": 2.5,
        "memory": 4096,
        "min_containers": 1,
        "max_containers": 4,
        "scaledown_window": 60,
        "timeout": 120,
        "region": ["us-east", "eu-west"],
        "retries": 2,
        "enable_memory_snapshot": True,
        "experimental_options": {"enable_gpu_snapshot": True},
    }
    assert made.get_concurrency_settings() == {"max_inputs": 16, "target_inputs": 8}


def test_what_is_left_to_modal_is_left_out() -> None:
    made = config({"gpu": None, "max_containers": None, "scaledown_window": None})
    assert set(made.get_app_cls_settings()) == {
        "image",
        "env",
        "secrets",
        "volumes",
        "timeout",
        "retries",
        "enable_memory_snapshot",
    }
    assert made.get_concurrency_settings() == {"max_inputs": 64, "target_inputs": 8}


@pytest.mark.parametrize("deployment", [{}, EVERYTHING])
def test_a_web_function_is_registered_with_its_settings(deployment: dict[str, Any]) -> None:
    made = config(deployment)
    app = modal.App(made.app_name)
    handler = modal.asgi_app(**made.get_asgi_app_settings())(web)
    handler = modal.concurrent(**made.get_handler_concurrency_settings())(handler)
    function: object = app.function(**made.get_handler_settings(), serialized=True)(handler)
    spec, webhook = inner(function)._spec_, inner(function)._webhook_config  # noqa: SLF001  # shown nowhere else
    assert spec.gpus is None
    assert not spec.volumes
    assert webhook.requires_proxy_auth is deployment.get("secure", True)
    assert made.get_handler_concurrency_settings() == {"max_inputs": deployment.get("max_concurrent_requests", 256)}


@pytest.mark.parametrize("deployment", [{}, EVERYTHING])
def test_a_server_is_registered_with_its_settings(deployment: dict[str, Any]) -> None:
    class Server:
        @modal.enter(snap=deployment.get("memory_snapshot", False))
        def start(self) -> None: ...

    made = config(deployment)
    settings = made.get_server_settings()
    registered = modal.App(made.app_name).server(**settings, serialized=True)(Server)
    assert inner(registered)._get_service_function()._spec_.gpus == deployment.get("gpu", "T4")  # noqa: SLF001
    assert settings["unauthenticated"] is not deployment.get("secure", True)
    assert settings["startup_timeout"] == deployment.get("timeout", 300)
    assert settings["max_concurrency"] == deployment.get("max_concurrent_requests", 256)
    assert settings["target_concurrency"] == deployment.get("target_concurrent_inputs", 64)


def test_the_container_gets_our_variables_and_no_key_of_this_machine() -> None:
    made = config(
        PATH="/bin", MODALKIT_API_KEY="mine", MODALKIT_APP_POSTFIX="-live", MODALKIT_APP_SETTINGS__APP_PREFIX="acme"
    )
    assert made.environment == {
        "MODALKIT_APP_POSTFIX": "-live",
        "MODALKIT_APP_SETTINGS__APP_PREFIX": "acme",
        "MODALKIT_CONFIG": "/root/modalkit_config/0-modalkit.yaml",
    }


def test_the_container_loads_the_same_settings_from_its_copies(tmp_path: Path) -> None:
    Path("more.yaml").write_text("app_settings: {build_config: {workdir: /app}, deployment_config: {gpu: L4}}")
    made = config({"timeout": 10}, MODALKIT_CONFIG="modalkit.yaml,more.yaml")
    assert (
        made.environment["MODALKIT_CONFIG"] == "/app/modalkit_config/0-modalkit.yaml,/app/modalkit_config/1-more.yaml"
    )
    for path in made.plan_image().local_paths:
        if not path.is_folder:
            copy = tmp_path / "container" / path.remote.lstrip("/")
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.local.read_bytes())
    there = made.environment["MODALKIT_CONFIG"].replace("/app/", f"{tmp_path}/container/app/")
    assert ModalConfig(environ=made.environment | {"MODALKIT_CONFIG": there}).settings == made.settings


def test_without_a_file_there_are_variables_all_the_same() -> None:
    assert ModalConfig(environ={}).environment == {"MODALKIT_APP_POSTFIX": "-dev"}


def test_the_image_and_the_volumes_are_the_same_objects_each_time() -> None:
    made = config(EVERYTHING)
    assert made.get_image() is made.get_image()
    assert made.volumes["/models"] is made.volumes["/models"]
    assert made.get_app_cls_settings()["volumes"]["/models"] is made.volumes["/models"]


def test_a_bucket_has_its_secret_and_options() -> None:
    bucket = inner(config(EVERYTHING).cloud_bucket_mounts["/data"])
    assert (bucket.bucket_name, bucket.read_only, bucket.requester_pays) == ("mine", True, False)
    assert bucket.secret is not None


def test_a_volume_whose_name_modal_refuses_is_refused_with_its_key() -> None:
    with pytest.raises(LoadError, match=r"^app_settings\.deployment_config\.volumes\./models: Invalid Volume name"):
        config({"volumes": {"/models": "no such name"}}).get_app_cls_settings()


class _Volume:
    """A volume that counts how often it is reloaded: a real one needs a container."""

    def __init__(self, error: Exception | None = None) -> None:
        self.reloads = 0
        self._error = error

    def reload(self) -> None:
        self.reloads += 1
        if self._error is not None:
            raise self._error


def test_a_volume_that_cannot_be_reloaded_leaves_the_others_alone(caplog: pytest.LogCaptureFixture) -> None:
    made = config()
    busy, free = _Volume(RuntimeError("there are open files")), _Volume()
    made.__dict__["volumes"] = {"/busy": busy, "/free": free}
    assert made.reload_volumes()
    assert (busy.reloads, free.reloads) == (1, 1)
    assert "The volume at /busy was not reloaded: RuntimeError: there are open files" in caplog.text
    made.__dict__["volumes"] = {"/busy": busy}
    assert not made.reload_volumes()


def test_without_volumes_there_is_nothing_to_reload() -> None:
    assert not config().reload_volumes()


DEFINITION = """
import modal
from modalkit.modal_config import ModalConfig
from tests.support.modal_objects import image_layers, inner

modal_config = ModalConfig()
app = modal.App(modal_config.app_name)

@app.cls(**modal_config.get_app_cls_settings(), include_source=False)
class Service:
    @modal.method()
    def predict(self): ...

dependencies = inner(Service)._get_class_service_function()._deps_(only_explicit_mounts=True)
print(app.name, len(dependencies), image_layers(modal_config.get_image()).count("Image(local files"))
"""


def test_the_same_definition_works_in_a_container_where_no_local_file_is(tmp_path: Path) -> None:
    here, container = tmp_path / "here", tmp_path / "container"
    for folder in (here, container):
        folder.mkdir()
        (folder / "app.py").write_text(DEFINITION)
    deployment = EVERYTHING | {"mounts": [{"local_path": "data.txt", "remote_path": "/data.txt"}]}
    app_settings = {"deployment_config": deployment, "build_config": {"python_modules": ["lone"]}}
    (here / "modalkit.yaml").write_text(json.dumps({"app_settings": app_settings}))
    (here / "data.txt").touch()
    (here / "lone.py").touch()
    (container / "0-modalkit.yaml").write_bytes((here / "modalkit.yaml").read_bytes())

    def define(folder: Path, **variables: str) -> list[str]:
        environ = {"PYTHONPATH": str(Path(__file__).parents[3]), "PYTHONWARNINGS": "error"} | variables
        done = subprocess.run(
            [sys.executable, "app.py"],
            check=False,
            cwd=folder,
            env=environ,
            text=True,
            capture_output=True,
            timeout=100,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    *at_home, added_here = define(here)
    *there, added_there = define(container, MODAL_IS_REMOTE="1", MODALKIT_CONFIG="0-modalkit.yaml")
    assert at_home == there
    assert int(added_here) > 5
    assert int(added_there) == 0
