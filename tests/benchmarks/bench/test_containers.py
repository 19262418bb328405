"""Containers, by a program that stands in for docker: there is no daemon where the tests run."""

import os
import socket
import sys
from pathlib import Path

import pytest

from modalkit.benchmarks.bench.targets import ComposeTarget, DockerTarget, docker, first_answer_s, variables_of
from modalkit.benchmarks.load import BenchError, preset
from modalkit.service.settings import Settings
from tests.benchmarks.bench.conftest import Bench

STAND_IN = """#!{python}
import sys
arguments = sys.argv[1:]
with open({log!r}, "a") as log:
    if arguments[0] == "compose" and arguments[3] == "--file":
        arguments[4] = open(arguments[4]).read()
    print(*arguments, file=log)
match arguments:
    case ["create", *_, "missing"]:
        sys.exit("no such image")
    case ["create", *_, image]:
        print(image)
    case ["inspect", _, "ends"]:
        print("false")
    case ["inspect", *_]:
        print("true")
    case ["logs", *_]:
        print("without an API key nothing is served", file=sys.stderr)
    case ["port", *_]:
        print("127.0.0.1:4321\\n[::1]:4321")
    case ["compose", "--file", "without.yaml", *_]:
        sys.exit("unknown flag: --file\\n\\nUsage:  docker [OPTIONS] COMMAND [ARG...]")
    case ["compose", "--file", _, "config", *_]:
        print('{{"services": {{"db": {{}}, "web": {{"ports": [{{"target": 8000, "published": "81"}}]}}}}}}')
    case ["compose", "--file", "bad.yaml", _, _, command, *_]:
        sys.exit(f"{{command}} failed")
    case [*_, "ps", "--quiet", "--status=running", _] if "ends.yaml" not in arguments:
        print("abc123")
    case [*_, "logs", _, _]:
        print("modalkit: error: unknown key")
"""


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the stand-in was called with."""
    path = tmp_path / "log"
    (tmp_path / "docker").write_text(STAND_IN.format(python=sys.executable, log=str(path)))
    (tmp_path / "docker").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    return path


def test_a_container_is_started_with_the_settings_and_removed(log: Path) -> None:
    target = DockerTarget("image:1", "sentiment", 80, ["--gpus=all"])
    with target.started({"max_batch_size": "8", "engine": "onnx"}) as running:
        assert running.url == "http://127.0.0.1:4321"
        assert running.started_s is not None
        running.check()
    settings = (
        "--env=MODALKIT_APP_SETTINGS__AUTH_CONFIG__INSECURE=true "
        "--env=MODALKIT_MODEL_SETTINGS__MODEL_ENTRIES__sentiment__BATCH_CONFIG__MAX_BATCH_SIZE=8 "
        "--env=MODALKIT_MODEL_SETTINGS__MODEL_ENTRIES__sentiment__ENGINE=onnx"
    )
    assert log.read_text().splitlines() == [
        f"create --publish=127.0.0.1::80 {settings} --gpus=all image:1",
        "start image:1",
        "inspect --format={{.State.Running}} image:1",
        "port image:1 80/tcp",
        "inspect --format={{.State.Running}} image:1",
        "stop image:1",
        "rm --volumes image:1",
    ]


def test_a_container_that_never_answers_is_given_up_in_time_and_removed(log: Path, bench: Bench) -> None:
    done = bench("docker:image:1", "--start-timeout", "0.1")
    assert isinstance(done.exception, BenchError)
    assert "http://127.0.0.1:4321/sync/predict: the first request failed" in str(done.exception)
    assert log.read_text().splitlines()[-2:] == ["stop image:1", "rm --volumes image:1"]


def test_a_compose_file_is_brought_up_with_the_settings_and_down(log: Path) -> None:
    with ComposeTarget("c.yaml", "sentiment", 81).started({"max_batch_size": "8"}) as running:
        assert running.url == "http://127.0.0.1:81"
        running.check()
    variable = "MODALKIT_MODEL_SETTINGS__MODEL_ENTRIES__sentiment__BATCH_CONFIG__MAX_BATCH_SIZE"
    files = f'--file c.yaml --file {{"services": {{"web": {{"environment": {{"{variable}": "8"}}}}}}}}'
    assert log.read_text().splitlines() == [
        "compose --file c.yaml config --format=json",
        f"compose {files} up --detach",
        f"compose {files} ps --quiet --status=running web",
        f"compose {files} down",
    ]


@pytest.mark.usefixtures("log")
def test_what_docker_says_is_told() -> None:
    with pytest.raises(BenchError, match="no such image"), DockerTarget("missing", "m").started({}):
        pass
    with pytest.raises(BenchError, match="up failed"), ComposeTarget("bad.yaml", "m", 81).started({}):
        pass
    with pytest.raises(BenchError, match="docker has no plugin compose here: install it"):
        ComposeTarget("without.yaml", "m", 81).started({}).__enter__()
    with pytest.raises(BenchError, match=r"no service of c\.yaml publishes port 82"):
        ComposeTarget("c.yaml", "m", 82).started({}).__enter__()


def test_a_container_that_ends_at_once_shows_its_log_and_is_removed(log: Path) -> None:
    with pytest.raises(BenchError, match="ends ended: without an API key"), DockerTarget("ends", "m").started({}):
        pass
    assert log.read_text().splitlines()[-2:] == ["stop ends", "rm --volumes ends"]


@pytest.mark.usefixtures("log")
def test_a_service_that_ends_before_its_first_answer_shows_its_log() -> None:
    with socket.socket() as refusing:  # bound, but it does not listen
        refusing.bind(("127.0.0.1", 0))
        endpoint = preset("ours", f"http://127.0.0.1:{refusing.getsockname()[1]}")
        with ComposeTarget("ends.yaml", "m", 81).started({}) as running:
            with pytest.raises(BenchError, match=r"web of ends\.yaml ended: modalkit: error: unknown key"):
                first_answer_s(running, endpoint, [{"text": "a"}], timeout_s=60)


def test_a_varied_limit_counts_where_the_entry_of_the_model_has_one(tmp_path: Path) -> None:
    entry = 'words: {pipeline: "m:P", batch_config: {max_batch_size: 8, wait_ms: 2}}'
    (tmp_path / "modalkit.yaml").write_text(f"model_settings: {{model_entries: {{{entry}}}}}")
    settings = Settings.load([tmp_path / "modalkit.yaml"], variables_of({"max_batch_size": "4"}, "words"))
    limits = settings.for_model("words").app_settings.batch_config
    assert (limits.max_batch_size, limits.wait_ms) == (4, 2)


def test_a_machine_without_docker_is_told_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BenchError, match="no program docker"):
        docker("ps")
