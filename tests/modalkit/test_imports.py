"""The import paths that users write."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.command_line import serving, started

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "module",
    [
        "modalkit",
        *(f"modalkit.{name}" for name in ("iomodel", "inference_pipeline", "settings", "task_queue", "testing")),
    ],
)
def test_every_module_gives_what_it_lists(module: str) -> None:
    imported = importlib.import_module(module)
    assert imported.__all__ == sorted(imported.__all__)
    for name in imported.__all__:
        assert getattr(imported, name) is not None


def test_importing_modalkit_loads_nothing_until_a_name_is_used() -> None:
    program = (
        "import sys, modalkit;"
        "print([m for m in ('anyio', 'fastapi', 'numpy', 'pydantic', 'torch') if m in sys.modules]);"
        "modalkit.Priority; print('fastapi' in sys.modules); modalkit.create_app; print('fastapi' in sys.modules);"
        "from modalkit import testing; print(hasattr(modalkit, 'nothing'), 'Settings' in dir(modalkit))"
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["[]", "False", "True", "False True"]


def test_importing_modalkit_loads_no_model_library() -> None:
    program = (
        "import sys, modalkit, modalkit.service.cli; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n"


def test_a_service_imports_torch_transformers_and_modal_only_for_a_pipeline_that_does(tmp_path: Path) -> None:
    (tmp_path / "light.py").write_text(
        "import sys\n"
        "from modalkit import InferenceOutputModel, InferencePipeline\n"
        "class Loaded(InferencePipeline):\n"
        "    def run_inference(self, input_list):\n"
        "        loaded = [name for name in ('torch', 'transformers', 'modal') if name in sys.modules]\n"
        "        return [InferenceOutputModel(loaded=loaded) for _ in input_list]\n"
    )
    (tmp_path / "modalkit.yaml").write_text("model_settings: {model_entries: {light: {pipeline: 'light:Loaded'}}}")
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    with serving(tmp_path, environment, start=started) as (_, client):
        job_id = client.post("/async/predict", json={"message": {"text": "one"}}).json()["job_id"]
        assert client.get(f"/jobs/{job_id}?wait=30").json()["result"]["loaded"] == []
        assert client.get("/metrics").status_code == 200
        assert client.post("/sync/predict", json={"text": "two"}).json()["loaded"] == []
