"""The import paths that users write."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "module",
    ["modalkit", "modalkit.iomodel", "modalkit.inference_pipeline", "modalkit.settings", "modalkit.task_queue"],
)
def test_every_module_gives_what_it_lists(module: str) -> None:
    imported = importlib.import_module(module)
    assert imported.__all__ == sorted(imported.__all__)
    for name in imported.__all__:
        assert getattr(imported, name) is not None


def test_importing_modalkit_loads_no_model_library() -> None:
    program = (
        "import sys, modalkit, modalkit.service.cli; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n"
