import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from modalkit.benchmarks.bench.cli import app
from tests.support.command_line import CONFIGURATION, serving
from tests.support.processes import ROOT

QUICK = ["--seconds", "0.3", "--warm-up", "0.1", "--repeats", "1", "--clients", "2", "--no-png"]

Bench = Callable[..., Result]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a configuration."""
    (tmp_path / "modalkit.yaml").write_text(CONFIGURATION)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return tmp_path


@pytest.fixture
def bench(folder: Path) -> Bench:
    """Runs the command with short loads, in this process; those of its options that are given again count."""

    def run(*arguments: str) -> Result:
        return CliRunner().invoke(app, [*QUICK, *arguments])

    return run


@pytest.fixture
def results(folder: Path) -> Callable[[], Any]:
    """The results that the command wrote."""
    return lambda: json.loads((folder / "bench" / "results.json").read_text())


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a service with an API key, ``secret``, whose model tells the length of a text."""
    folder = tmp_path_factory.mktemp("service")
    (folder / "modalkit.yaml").write_text(CONFIGURATION + "  common: {}\n")
    environment = {
        "PYTHONPATH": str(ROOT),
        "PATH": str(Path(sys.executable).parent),
        "MODALKIT_APP_SETTINGS__AUTH_CONFIG__API_KEY": "secret",
    }
    with serving(folder, environment) as (_, client):
        yield str(client.base_url).rstrip("/")
