import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from modalkit.benchmarks.bench import cli
from modalkit.benchmarks.bench.cli import app
from modalkit.benchmarks.bench.results import Cell, Figure
from modalkit.benchmarks.bench.server_side import ServerSide
from tests.support.command_line import CONFIGURATION, serving
from tests.support.processes import ROOT

QUICK = ["--seconds", "0.3", "--warm-up", "0.1", "--repeats", "1", "--no-png"]
CLIENTS = ["--clients", "2"]
NOT_OF_CLIENTS = {"--rate", "--arrivals", "--capacity", "--p99-ms"}

MEASURE_ITSELF = "itself"

Bench = Callable[..., Result]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a configuration."""
    (tmp_path / "modalkit.yaml").write_text(CONFIGURATION)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return tmp_path


@pytest.fixture
def bench(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """Runs the command with short loads, in this process; those of its options that are given again count.

    What the load generator itself can do is not measured, unless the first argument is `MEASURE_ITSELF`.
    """

    def run(*arguments: str) -> Result:
        quick = QUICK if NOT_OF_CLIENTS & set(arguments) else [*QUICK, *CLIENTS]
        if arguments[0] == MEASURE_ITSELF:
            return CliRunner().invoke(app, [*quick, *arguments[1:]])
        monkeypatch.setattr(cli, "_own_capacity", lambda *_: {"requests_per_s": 1e6, "processes": 1})
        return CliRunner().invoke(app, [*quick, *arguments])

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


def cell_of(load: str, variant: dict[str, str], items_per_s: float, **more: Any) -> Cell:
    """A load with made-up figures."""
    figures = {"items_per_s": Figure(items_per_s), "p50_ms": Figure(5.0), "p99_ms": Figure(10_000 / items_per_s)}
    values: dict[str, Any] = {
        "mode": "sync", "open": False, "clients": 8, "rate_per_s": None, "answered": 10, "errors": {}, "accuracy": None,
        "limited": [], "client": {}, "latency_curve": [(0, 1.0), (0.5, 5.0), (1, 9.0)],
        "timeline": [(1.0, items_per_s, 5.0, 9.0), (2.0, 0.0, float("nan"), float("nan"))],
        "server": ServerSide(queue_s=0.001, stages_s={"predict": 0.004}, rest_s=0.0, batch_sizes={"1": 3, "more": 1}),
    }  # fmt: skip
    return Cell(load=load, variant=variant, figures=figures, **(values | more))
