import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

CONFIGURATION = """
app_settings:
  async_config: {store_path: jobs.db}
model_settings:
  model_entries:
    lengths: {pipeline: "tests.support.length_model:LengthPipeline"}
"""

Modalkit = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def environment() -> dict[str, str]:
    root = Path(__file__).parents[3]
    return {"PYTHONPATH": str(root), "PATH": str(Path(sys.executable).parent), "PYTHONWARNINGS": "error"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working directory with a configuration."""
    (tmp_path / "modalkit.yaml").write_text(CONFIGURATION)
    return tmp_path


@pytest.fixture
def modalkit(folder: Path, environment: dict[str, str]) -> Modalkit:
    """Runs the command in that folder, as a user would."""

    def run(*arguments: str, stdin: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-P", "-c", "from modalkit.service.cli import main; main()", *arguments],
            check=False,
            cwd=folder,
            env=environment | variables,
            input=stdin,
            text=True,
            encoding="utf-8",
            errors="surrogateescape",
            capture_output=True,
            timeout=100,
        )

    return run
