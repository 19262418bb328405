"""``modalkit serve`` as a process: it starts, answers, stops gently, and keeps accepted jobs."""

import ctypes
import gc
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from itertools import takewhile
from pathlib import Path

import httpx
import pytest

from modalkit.service.cli.serve import _things_to_try
from modalkit.service.local_gateway import LocalGateway
from modalkit.service.serving import AddressError, listening
from modalkit.service.settings import Settings
from tests.support.command_line import MODALKIT, Modalkit, Process, forked, serving, started
from tests.support.http_client import NO_TLS
from tests.support.ports import free_port
from tests.support.processes import ForkedPython

TWO_MODELS = """
app_settings:
  async_config: {store_path: jobs.db}
  batch_config: {calibration: {enabled: false}}
model_settings:
  model_entries:
    bad: {pipeline: "tests.support.length_model:UnloadablePipeline"}
    good: {pipeline: "my_model:Hanging"}
"""
HANGING = """
import threading
from tests.support.length_model import LengthPipeline

class Hanging(LengthPipeline):
    def postprocess(self, input_list, raw_output):
        if "hang" in raw_output["texts"]:
            threading.Event().wait()
        return super().postprocess(input_list, raw_output)
"""
HELD = """
from pathlib import Path
from tests.support.length_model import LengthPipeline

class Held(LengthPipeline):
    def predict(self, input_list, preprocessed_data):
        if "hold" in preprocessed_data["texts"]:
            Path("held").touch()
            Path("gate").read_text()  # a pipe: it waits for the test to write
        return super().predict(input_list, preprocessed_data)
"""
BREAKING = """
from modalkit.batching import MeasuredCostModel
from tests.support.length_model import LengthPipeline

class Breaking(LengthPipeline):
    def preprocess(self, input_list):
        MeasuredCostModel.predict_s = None
        return super().preprocess(input_list)
"""
NUMBERS = """
from pydantic import BaseModel
from modalkit import InferenceOutputModel, InferencePipeline

class Number(BaseModel):
    number: int
    unit: str = "it's"

class Numbers(InferencePipeline):
    input_model = Number

    def run_inference(self, input_list):
        return [InferenceOutputModel(half=item.number / 2, unit=item.unit) for item in input_list]

    def sample_items(self, n, size):
        return [Number(number=3, unit="' [red] :smile: [/INST]")] * n
"""
NOTED = """
from pathlib import Path
from tests.support.length_model import LengthPipeline

class Noted(LengthPipeline):
    def __init__(self, *args, **entry):
        super().__init__(*args, **entry)
        with Path("loads").open("a") as file:
            file.write("l")

    def predict(self, input_list, preprocessed_data):
        with Path("runs").open("a") as file:
            file.write("r" * len(input_list))
        if "hold" in preprocessed_data["texts"]:
            Path("gate").read_text()  # a pipe: it waits for the test to write
        return super().predict(input_list, preprocessed_data)
"""
NEVER_LOADED = """
import sys, threading
from tests.support.length_model import LengthPipeline

class Never(LengthPipeline):
    def __init__(self, *args, **entry):
        print("begun", file=sys.stderr, flush=True)
        threading.Event().wait()
"""


def until_it_accepts_nothing(client: httpx.Client) -> None:
    with suppress(httpx.TransportError):
        while True:
            client.get("/health/live")


def finish(process: Process) -> str:
    assert process.stderr is not None
    said = process.stderr.read()
    process.wait(timeout=60)
    return said


@pytest.mark.parametrize(("how", "start"), [(signal.SIGINT, forked), (signal.SIGTERM, started)])
def test_it_serves_until_a_signal_and_then_stops_gently(
    folder: Path, environment: dict[str, str], how: signal.Signals, start: Callable[..., Process]
) -> None:
    with serving(folder, environment, start) as (process, client):
        assert client.post("/sync/predict", json={"text": "four"}).json()["length"] == 4
        process.send_signal(how)
        said = finish(process)
        assert process.returncode == 0
        assert "curl" in said
        assert "lengths: 1 succeeded" in said
        assert "Traceback" not in said


def test_the_commands_that_it_shows_work_for_a_model_with_an_input_model_of_its_own(
    folder: Path, environment: dict[str, str]
) -> None:
    (folder / "my_model.py").write_text(NUMBERS)
    (folder / "two.yaml").write_text(TWO_MODELS.replace("Hanging", "Numbers"))
    with serving(folder, {**environment, "MODALKIT_CONFIG": "two.yaml"}) as (process, _):
        assert process.stderr is not None
        shown = takewhile(lambda line: "/docs" not in line, iter(process.stderr.readline, ""))
        sync, batch, job, result = (line.strip() for line in shown if line.startswith("  curl "))
        answers = [json.loads(run(command)) for command in (sync, batch, job)]
        assert (answers[0]["half"], answers[0]["unit"]) == (1.5, "' [red] :smile: [/INST]")
        assert [slot["half"] for slot in answers[1]] == [1.5, 1.5]
        found = json.loads(run(result.replace("<the job_id>", answers[2]["job_id"])))
        assert found["result"]["half"] == 1.5


def run(command: str) -> str:
    return subprocess.run(["/bin/sh", "-c", f"{command} -s"], capture_output=True, check=True, text=True).stdout


def test_without_a_configuration_it_says_what_it_serves(modalkit: Modalkit, folder: Path) -> None:
    said = "no modalkit.yaml here: serving the bundled model\n"
    (folder / "modalkit.yaml").rename(folder / "other.yaml")
    nowhere = ("--unix-socket", "no/such/folder")
    assert modalkit("serve", *nowhere).stderr.startswith(said)
    assert said not in modalkit("serve", "--config", "other.yaml", *nowhere).stderr


def test_when_its_last_model_breaks_it_stops_with_an_exit_code(folder: Path, environment: dict[str, str]) -> None:
    (folder / "my_model.py").write_text(BREAKING)
    config = TWO_MODELS.replace("Hanging", "Breaking")
    (folder / "two.yaml").write_text(config)
    with serving(folder, {**environment, "MODALKIT_CONFIG": "two.yaml"}) as (process, client):
        answers = [client.post("/sync/predict?model_name=good", json={"text": "four"}) for _ in range(3)]
        assert [answer.status_code for answer in answers] == [500, 500, 500]
        said = finish(process)
        assert process.returncode == 3
        assert "broke down" in said


def test_it_accepts_curls_default_content_type(folder: Path, environment: dict[str, str]) -> None:
    with serving(folder, environment) as (_, client):
        form = {"content-type": "application/x-www-form-urlencoded"}
        answer = client.post("/sync/predict", content='{"text": "four"}', headers=form)
        assert answer.json()["length"] == 4


def test_a_variable_chooses_the_format_of_its_log(folder: Path, environment: dict[str, str]) -> None:
    variables = {"MODALKIT_LOG_FORMAT": "text", "MODALKIT_APP_SETTINGS__SERVER_CONFIG__ACCESS_LOG": "true"}
    with serving(folder, environment | variables) as (process, client):
        client.get("/health/live")
        process.send_signal(signal.SIGTERM)
        said = finish(process)
    assert "GET /health/live" in said
    assert '{"timestamp"' not in said


def test_accepted_jobs_are_still_there_after_a_kill(folder: Path, environment: dict[str, str]) -> None:
    with serving(folder, environment) as (process, client):
        job_ids = [
            client.post("/async/predict", json={"message": {"text": "x" * n}}).json()["job_id"] for n in range(1, 21)
        ]
        process.kill()
    with serving(folder, environment) as (_, client):
        jobs = [client.get(f"/jobs/{job_id}?wait=30").json() for job_id in job_ids]
    assert [job["result"]["length"] for job in jobs] == list(range(1, 21))


def test_a_port_in_use_and_a_store_in_use_are_one_message(
    modalkit: Modalkit, folder: Path, environment: dict[str, str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = modalkit("serve", "--port", port)
    assert done.returncode == 1
    assert done.stderr.startswith(f"modalkit: error: cannot listen on 127.0.0.1:{port}: Address already in use")
    with serving(folder, environment) as (process, _):
        done = modalkit("serve", "--port", "0")
        assert done.returncode == 1
        assert f"in use by process {process.pid}" in done.stderr
        assert "Traceback" not in done.stderr


def test_a_signal_while_a_model_loads_ends_it_at_once(folder: Path, environment: dict[str, str]) -> None:
    (folder / "my_model.py").write_text(NEVER_LOADED)
    (folder / "modalkit.yaml").write_text("model_settings: {model_entries: {a: {pipeline: 'my_model:Never'}}}")
    with forked(["serve", "--port", "0"], folder, environment) as process:
        while "begun" not in process.stderr.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        said = finish(process)
    assert process.returncode == 0
    assert "Traceback" not in said


def test_a_model_that_cannot_be_loaded_leaves_the_others_alone(folder: Path, environment: dict[str, str]) -> None:
    (folder / "my_model.py").write_text(HANGING)
    (folder / "modalkit.yaml").write_text(TWO_MODELS)
    with serving(folder, environment) as (process, client):
        ready = client.get("/health/ready")
        assert (ready.status_code, ready.json()["models"]) == (200, {"bad": "failed", "good": "ready"})
        assert client.post("/sync/predict?model_name=good", json={"text": "four"}).json()["length"] == 4
        refused = client.post("/sync/predict?model_name=bad", json={"text": "four"})
        assert refused.status_code == 503
        assert "RuntimeError: the weights are not there" in refused.json()["detail"]
        process.send_signal(signal.SIGTERM)
        finish(process)
        assert process.returncode == 0


def test_a_service_that_must_have_all_models_is_not_ready_without_one(
    folder: Path, environment: dict[str, str]
) -> None:
    (folder / "my_model.py").write_text(HANGING)
    (folder / "modalkit.yaml").write_text(TWO_MODELS)
    strict = {"MODALKIT_APP_SETTINGS__REQUIRE_ALL_MODELS": "true"}
    with serving(folder, {**environment, **strict}) as (_, client):
        assert client.get("/health/ready").status_code == 503
        assert client.post("/sync/predict?model_name=good", json={"text": "four"}).status_code == 200


def test_a_signal_ends_the_wait_for_a_job(folder: Path, environment: dict[str, str]) -> None:
    (folder / "my_model.py").write_text(HANGING)
    (folder / "modalkit.yaml").write_text(TWO_MODELS)
    with serving(folder, environment) as (process, client), ThreadPoolExecutor() as threads:
        accepted = client.post("/async/predict?model_name=good", json={"message": {"text": "hang"}})
        address = f"/jobs/{accepted.json()['job_id']}"
        waiting = threads.submit(client.get, f"{address}?wait=300")
        while client.get(address).json()["status"] != "running":
            pass
        process.send_signal(signal.SIGTERM)
        assert waiting.result().json()["status"] == "running"


def test_a_second_signal_stops_at_once_and_says_that_jobs_are_kept(folder: Path, environment: dict[str, str]) -> None:
    (folder / "my_model.py").write_text(HANGING)
    (folder / "modalkit.yaml").write_text(TWO_MODELS)
    with serving(folder, environment) as (process, client):
        bodies = [{"message": {"text": text}} for text in ("hang", "a", "b")]
        jobs = [client.post("/async/predict?model_name=good", json=body).json()["job_id"] for body in bodies]
        while client.get(f"/jobs/{jobs[0]}").json()["status"] != "running":
            pass
        process.send_signal(signal.SIGTERM)
        assert process.stderr is not None
        while not process.stderr.readline().startswith("Finishing"):
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        said = finish(process)
    assert process.returncode == 1
    assert "Stopped at once. 3 jobs had not ended: kept, and run after the next start." in said
    assert " cancelled" not in said


def test_the_first_signal_finishes_open_requests_and_leaves_jobs_that_have_not_begun_stored(
    folder: Path, environment: dict[str, str]
) -> None:
    (folder / "my_model.py").write_text(HELD)
    (folder / "modalkit.yaml").write_text(TWO_MODELS.replace("Hanging", "Held"))
    os.mkfifo(folder / "gate")
    with serving(folder, environment) as (process, client), ThreadPoolExecutor() as threads:
        held = threads.submit(client.post, "/sync/predict?model_name=good", json={"text": "hold"})
        while not (folder / "held").exists():
            assert process.poll() is None
        jobs = [{"message": {"text": "x" * n}} for n in range(1, 41)]
        assert client.post("/async/predict?model_name=good", json=jobs).status_code == 202
        process.send_signal(signal.SIGTERM)
        until_it_accepts_nothing(client)
        (folder / "gate").write_text("go on")
        assert held.result().json()["length"] == 4
        said = finish(process)
        assert process.returncode == 0, said
    with closing(sqlite3.connect(folder / "jobs.db")) as database:
        stored = database.execute("SELECT DISTINCT status, started_at, crashes FROM jobs").fetchall()
    assert stored == [("queued", None, 0)]


def test_a_second_signal_ends_open_requests_too_without_a_traceback(folder: Path, environment: dict[str, str]) -> None:
    (folder / "my_model.py").write_text(HELD)
    (folder / "modalkit.yaml").write_text(TWO_MODELS.replace("Hanging", "Held"))
    os.mkfifo(folder / "gate")
    with serving(folder, environment) as (process, client), ThreadPoolExecutor() as threads:
        held = threads.submit(client.post, "/sync/predict?model_name=good", json={"text": "hold"})
        while not (folder / "held").exists():
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        until_it_accepts_nothing(client)
        process.send_signal(signal.SIGTERM)
        said = finish(process)
        assert isinstance(held.exception(), httpx.TransportError)
    assert process.returncode == 1
    assert "Stopped at once." in said
    assert "Traceback" not in said


def test_what_does_not_end_within_the_grace_is_left(folder: Path, environment: dict[str, str]) -> None:
    (folder / "my_model.py").write_text(HANGING)
    (folder / "modalkit.yaml").write_text(TWO_MODELS)

    def impatient(arguments: list[str], folder: Path, environment: Mapping[str, str]) -> Process:
        code = "from modalkit.service.cli import main, stopping; stopping.CLOSING_S = 0.1; main()"
        return ForkedPython(["-P", "-c", code, *arguments, "--grace", "0.1"], cwd=folder, env=environment)

    with serving(folder, environment, impatient) as (process, client):
        accepted = client.post("/async/predict?model_name=good", json={"message": {"text": "hang"}}).json()
        while client.get(f"/jobs/{accepted['job_id']}").json()["status"] != "running":
            pass
        process.send_signal(signal.SIGTERM)
        said = finish(process)
    assert process.returncode == 1
    assert "Stopped at the end of the grace of 0.1 s. 1 job had not ended: kept, and run after the next start." in said
    assert "Traceback" not in said


@pytest.mark.parametrize("is_full", [True, False])
def test_a_standard_error_that_cannot_be_written_ends_nothing_and_loses_no_job(
    folder: Path, environment: dict[str, str], is_full: bool
) -> None:
    """It is on a full disk, or a pipe whose reader is gone."""
    (folder / "my_model.py").write_text(NOTED)
    in_memory = TWO_MODELS.replace("Hanging", "Noted").replace("store_path: jobs.db", "store: memory")
    (folder / "modalkit.yaml").write_text(in_memory)
    os.mkfifo(folder / "gate")
    reader, stderr = os.pipe()
    os.close(reader)
    if is_full:
        os.close(stderr)
        stderr = os.open("/dev/full", os.O_WRONLY)
    arguments = [sys.executable, *MODALKIT, "serve", "--port", str(port := free_port()), "--log-level", "info"]
    with subprocess.Popen(arguments, cwd=folder, env=environment, stderr=stderr) as process:
        os.close(stderr)
        try:
            _use_and_stop(folder, process, port)
        finally:
            process.kill()
    assert process.returncode == 0
    assert (folder / "runs").read_text().endswith("r" * 4)


def _use_and_stop(folder: Path, process: subprocess.Popen[bytes], port: int) -> None:
    """Wait for it, reload its models, and stop it while one of four jobs runs."""

    def until(reached: Callable[[], bool]) -> None:
        while not reached():
            assert process.poll() is None
            time.sleep(0.02)

    def is_ready() -> bool:
        with suppress(httpx.TransportError):
            return client.get("/health/ready").status_code == 200
        return False

    with httpx.Client(base_url=f"http://127.0.0.1:{port}", verify=NO_TLS) as client:
        until(is_ready)
        loads = (folder / "loads").stat().st_size
        process.send_signal(signal.SIGHUP)
        until(lambda: (folder / "loads").stat().st_size > loads)
        jobs = [{"message": {"text": "hold"}}, *({"message": {"text": "x" * n}} for n in (1, 2, 3))]
        assert client.post("/async/predict?model_name=good", json=jobs).status_code == 202
        until((folder / "runs").exists)
        process.send_signal(signal.SIGTERM)
        until_it_accepts_nothing(client)
    (folder / "gate").write_text("go on")
    process.wait(timeout=60)


def test_without_a_model_that_is_ready_it_shows_the_page_alone(folder: Path) -> None:
    """A model may break down as soon as it is loaded."""
    settings = Settings.load([folder / "modalkit.yaml"])
    said = _things_to_try("", "http://h", LocalGateway(settings), settings)
    assert said == "\nTry:\n  http://h in a browser shows what happens, http://h/docs all routes"


def test_for_a_unix_socket_it_shows_no_page_because_no_browser_opens_one(folder: Path) -> None:
    settings = Settings.load([folder / "modalkit.yaml"])
    said = _things_to_try(" --unix-socket a.sock", "http://localhost", LocalGateway(settings), settings)
    assert said == "\nTry:\n  curl --unix-socket a.sock http://localhost/openapi.json"


@pytest.mark.parametrize("host", ["nohost.invalid", "192.0.2.1"])
def test_an_address_that_is_not_of_this_machine_is_told_as_such(host: str) -> None:
    with pytest.raises(AddressError, match=rf"cannot listen on {host}:0: .*; give an address of this machine"):
        with listening(host, 0):
            pass


def test_a_socket_that_cannot_listen_is_closed() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(AddressError, match="already in use"):
        with listening("127.0.0.1", taken.getsockname()[1]):
            pass
    gc.collect()  # pytest turns the warning of a socket that was left open into an error


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="what glibc does")
def test_memory_that_the_start_has_freed_is_given_back() -> None:
    """In a process of its own, because it changes that of the tests for good."""
    program = """
from modalkit.pipelines.memory import private_bytes
from modalkit.service.serving import tune_interpreter
used = [bytes(1000) for _ in range(100_000)]
del used[:-1]  # the last one keeps glibc from giving back the others
before = private_bytes()
tune_interpreter()
print(before - private_bytes())
"""
    given_back = int(subprocess.check_output([sys.executable, "-c", program]))
    assert given_back > 50_000_000
