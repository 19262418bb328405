import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import processes
from tests.support.command_line import CONFIGURATION, MODALKIT, Modalkit
from tests.support.processes import ROOT


@pytest.fixture
def environment() -> dict[str, str]:
    return {"PYTHONPATH": str(ROOT), "PATH": str(Path(sys.executable).parent), "PYTHONWARNINGS": "error"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working directory with a configuration."""
    (tmp_path / "modalkit.yaml").write_text(CONFIGURATION)
    return tmp_path


@pytest.fixture
def modalkit(folder: Path, environment: dict[str, str]) -> Modalkit:
    """Runs the command in that folder, in a process that is forked from one that has imported it."""

    def run(*arguments: str, stdin: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
        return processes.run([*MODALKIT, *arguments], cwd=folder, env=environment | variables, input=stdin)

    return run


@pytest.fixture
def installed_modalkit(folder: Path, environment: dict[str, str]) -> Modalkit:
    """Runs the command in that folder, as a user would, imports included: a test for each command does so."""

    def run(*arguments: str, stdin: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *MODALKIT, *arguments],
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
