"""Containers, by a program that stands in for docker: there is no daemon where the tests run."""

import os
import sys
from pathlib import Path

import pytest

from modalkit.benchmarks.bench.targets import ComposeTarget, DockerTarget, docker
from modalkit.benchmarks.load import BenchError

STAND_IN = """#!{python}
import os, sys
with open({log!r}, "a") as log:
    print(*sys.argv[1:], os.environ.get("MODALKIT_APP_SETTINGS__BATCH_CONFIG__MAX_BATCH_SIZE"), file=log)
match sys.argv[1]:
    case "run":
        if sys.argv[-1] == "missing":
            sys.exit("no such image")
        print("abc123")
    case "compose" if sys.argv[3] == "bad.yaml":
        sys.exit(f"{{sys.argv[4]}} failed")
    case "port":
        print("127.0.0.1:4321\\n[::1]:4321")
"""


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the stand-in was called with."""
    path = tmp_path / "log"
    (tmp_path / "docker").write_text(STAND_IN.format(python=sys.executable, log=str(path)))
    (tmp_path / "docker").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    return path


def test_a_container_is_started_with_the_settings_and_stopped(log: Path) -> None:
    target = DockerTarget("image:1", "sentiment", 80, ["--gpus=all"])
    with target.started({"max_batch_size": "8", "engine": "onnx"}) as running:
        assert running.url == "http://127.0.0.1:4321"
        assert running.started_s is not None
    settings = (
        "--env=MODALKIT_APP_SETTINGS__BATCH_CONFIG__MAX_BATCH_SIZE=8 "
        "--env=MODALKIT_MODEL_SETTINGS__MODEL_ENTRIES__sentiment__ENGINE=onnx"
    )
    assert log.read_text().splitlines() == [
        f"run --detach --rm --publish=127.0.0.1::80 {settings} --gpus=all image:1 None",
        "port abc123 80/tcp None",
        "stop abc123 None",
    ]


def test_a_compose_file_is_brought_up_and_down(log: Path) -> None:
    with ComposeTarget("c.yaml", "sentiment", 81).started({"max_batch_size": "8"}) as running:
        assert running.url == "http://127.0.0.1:81"
    assert log.read_text().splitlines() == ["compose --file c.yaml up --detach 8", "compose --file c.yaml down 8"]


@pytest.mark.usefixtures("log")
def test_what_docker_says_is_told() -> None:
    with pytest.raises(BenchError, match="no such image"), DockerTarget("missing", "m").started({}):
        pass
    with pytest.raises(BenchError, match="up failed"), ComposeTarget("bad.yaml", "m").started({}):
        pass


def test_a_machine_without_docker_is_told_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BenchError, match="no program docker"):
        docker("ps")
