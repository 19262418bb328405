"""The app of ``modal deploy -m modalkit.service.modal_app``, in a process of its own, as Modal's client imports it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support import processes
from tests.support.modal_objects import class_spec, concurrency, method_names, web_settings

ROOT = Path(__file__).resolve().parents[2]

CONFIG: dict[str, Any] = {
    "app_settings": {
        "app_prefix": "lengths",
        "deployment_config": {
            "gpu": ["L4", "T4"],
            "max_containers": 3,
            "max_concurrent_inputs": 16,
            "target_concurrent_inputs": 12,
            "max_concurrent_requests": 100,
            "timeout": 120,
            "secrets": ["hub-token"],
            "secure": True,
        },
    },
    "model_settings": {
        "model_entries": {
            "first": {"pipeline": "tests.support.length_model:LengthPipeline"},
            "second": {"pipeline": "tests.support.length_model:LengthPipeline"},
        }
    },
}


def run(config: dict[str, Any], program: str) -> subprocess.CompletedProcess[str]:
    """Run a program with a configuration, without what Modal's client needs to reach its server."""
    Path("modalkit.yaml").write_text(json.dumps(config))
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MODAL_", "MODALKIT_"))}
    environment |= {"PYTHONPATH": str(ROOT), "MODAL_CONFIG_PATH": "none.toml", "MODAL_SERVER_URL": "http://127.0.0.1:9"}
    return processes.run(["-c", program], cwd=Path.cwd(), env=environment | {"PYTHONWARNINGS": "error"})


def imported(config: dict[str, Any]) -> dict[str, Any]:
    """What `describe` says of the app with this configuration."""
    done = run(config, "from tests.service.test_modal_app import describe; describe()")
    assert (done.returncode, done.stderr) == (0, "")
    described: dict[str, Any] = json.loads(done.stdout)
    return described


def describe() -> None:
    """Import the app and write down what it consists of."""
    from modalkit.service import modal_app

    model: Any = modal_app.Model
    resources, webhook = web_settings(modal_app.web)
    endpoints: Any = modal_app.web.local()
    json.dump(
        {
            "app": modal_app.app.name,
            "gpus": class_spec(model).gpus,
            "secrets": len(class_spec(model).secrets),
            "methods": method_names(model),
            "class_concurrency": vars(concurrency(model)),
            "models": [model().model_name, model(model_name="second").model_name],
            "web_gpus": resources.gpus,
            "web_concurrency": vars(concurrency(modal_app.web)),
            "proxy_auth": webhook.requires_proxy_auth,
            "paths": sorted(endpoints.openapi()["paths"]),
        },
        sys.stdout,
    )


def with_deployment(**values: Any) -> dict[str, Any]:
    deployment = CONFIG["app_settings"]["deployment_config"] | values
    return CONFIG | {"app_settings": CONFIG["app_settings"] | {"deployment_config": deployment}}


def test_the_configured_models_are_an_app_without_a_token_or_a_network() -> None:
    assert imported(CONFIG) == {
        "app": "lengths-dev",
        "gpus": ["L4", "T4"],
        "secrets": 2,
        "methods": ["process_request"],
        "class_concurrency": {"max_inputs": 16, "target_inputs": 12},
        "models": ["first", "second"],
        "web_gpus": None,
        "web_concurrency": {"max_inputs": 100, "target_inputs": None},
        "proxy_auth": True,
        "paths": [
            *("/admin/models", "/admin/models/{name}", "/admin/models/{name}/reload"),
            *("/async/predict", "/batch/predict"),
            *("/batches/{batch_id}", "/batches/{batch_id}/cancel", "/batches/{batch_id}/results"),
            *("/health/live", "/health/ready", "/jobs", "/jobs/events"),
            *(
                "/jobs/replay",
                "/jobs/retry",
                "/jobs/{job_id}",
                "/jobs/{job_id}/events",
                "/jobs/{job_id}/replay",
                "/jobs/{job_id}/retry",
                "/metrics",
                "/sync/predict",
            ),
            *("/v1/batches", "/v1/batches/{batch_id}", "/v1/batches/{batch_id}/cancel"),
            *("/v1/files", "/v1/files/{file_id}", "/v1/files/{file_id}/content", "/v1/models"),
            "/v1/models/{model}",
        ],
    }


@pytest.mark.parametrize(
    ("given", "class_concurrency", "proxy_auth", "gpus"),
    [
        (
            {"target_concurrent_inputs": None, "secure": False, "gpu": "H100"},
            {"max_inputs": 16, "target_inputs": 8},
            False,
            "H100",
        ),
        (
            {"target_concurrent_inputs": None, "max_concurrent_inputs": 4, "gpu": None},
            {"max_inputs": 4, "target_inputs": 4},
            True,
            None,
        ),
    ],
)
def test_the_app_follows_the_configuration(
    given: dict[str, Any], class_concurrency: dict[str, int], proxy_auth: bool, gpus: Any
) -> None:
    described = imported(with_deployment(**given))
    assert described["class_concurrency"] == class_concurrency
    assert (described["proxy_auth"], described["gpus"]) == (proxy_auth, gpus)


@pytest.mark.parametrize(
    ("config", "mistake"),
    [
        (with_deployment(max_containers=-1), "app_settings.deployment_config.max_containers"),
        ({"model_settings": {"model_entries": {}}}, "model_settings.model_entries: there is no model; add one"),
    ],
)
def test_a_mistake_in_the_configuration_is_told_with_its_key(config: dict[str, Any], mistake: str) -> None:
    done = run(config, "import modalkit.service.modal_app")
    assert done.returncode != 0
    assert mistake in done.stderr
