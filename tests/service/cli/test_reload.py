"""``modalkit reload`` and SIGHUP: a running service takes up its configuration, under load; and what it does if not."""

import json
import signal
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event

import httpx

from tests.support.command_line import CONFIGURATION, Modalkit, Process, serving

KEY = {"MODALKIT_APP_SETTINGS__AUTH_CONFIG__API_KEY": "secret"}
HEADERS = {"Authorization": "Bearer secret"}
HANGING = """
import threading
from tests.support.length_model import LengthPipeline

class Hanging(LengthPipeline):
    def predict(self, input_list, preprocessed_data):
        if "hang" in preprocessed_data["texts"]:
            threading.Event().wait()
        return super().predict(input_list, preprocessed_data)
"""


@contextmanager
def steady_load(client: httpx.Client) -> Iterator[Counter[int]]:
    """Requests one after the other from some callers, while the block runs; their answers by status."""
    answers, is_over = Counter[int](), Event()

    def call() -> None:
        while not is_over.is_set():
            answers[client.post("/sync/predict", json={"text": "four"}, headers=HEADERS).status_code] += 1

    with ThreadPoolExecutor() as threads:
        calls = [threads.submit(call) for _ in range(4)]
        try:
            yield answers
        finally:
            is_over.set()
        for each in calls:
            each.result()


def until_said(process: Process, text: str) -> None:
    assert process.stderr is not None
    while text not in process.stderr.readline():
        assert process.poll() is None


def test_a_service_under_load_is_reloaded_by_the_command_and_by_a_signal_and_no_request_fails(
    modalkit: Modalkit, folder: Path, environment: dict[str, str]
) -> None:
    with serving(folder, environment | KEY) as (process, client), steady_load(client) as answers:
        url = f"--url={client.base_url}"
        changed = CONFIGURATION.replace('Pipeline"}', 'Pipeline", max_in_flight: 2}')
        (folder / "modalkit.yaml").write_text(changed)
        done = modalkit("reload", url, MODALKIT_API_KEY="secret")
        assert (done.returncode, done.stdout) == (0, "lengths was reloaded.\n"), done.stderr
        assert json.loads(modalkit("reload", url, "--json", MODALKIT_API_KEY="secret").stdout)["name"] == "lengths"
        process.send_signal(signal.SIGHUP)
        until_said(process, "lengths was reloaded.")
        (folder / "modalkit.yaml").write_text(CONFIGURATION.replace("LengthPipeline", "UnloadablePipeline"))
        refused = modalkit("reload", "lengths", url, MODALKIT_API_KEY="secret")
        assert refused.returncode == 1
        assert "RuntimeError: the weights are not there" in refused.stderr
        process.send_signal(signal.SIGHUP)
        until_said(process, "the weights are not there")
        assert modalkit("reload", "other", url, MODALKIT_API_KEY="secret").returncode == 1
        assert client.get("/health/ready").status_code == 200
    assert set(answers) == {200}


def test_without_a_key_the_command_says_what_to_do(
    modalkit: Modalkit, folder: Path, environment: dict[str, str]
) -> None:
    with serving(folder, environment) as (_, client):
        refused = modalkit("reload", f"--url={client.base_url}")
    assert refused.returncode == 1
    assert "send the process the signal SIGHUP" in refused.stderr
    for models in ((), ("lengths", "other")):
        away = modalkit("reload", *models, "--url=http://127.0.0.1:9")
        assert (away.returncode, away.stderr.count("cannot be reached")) == (5, 1)


def test_a_model_that_goes_on_hanging_after_a_restart_ends_the_process_with_its_exit_code(
    folder: Path, environment: dict[str, str]
) -> None:
    (folder / "my_model.py").write_text(HANGING)
    (folder / "modalkit.yaml").write_text(
        CONFIGURATION.replace("tests.support.length_model:LengthPipeline", "my_model:Hanging").replace(
            "app_settings:", "app_settings:\n  batch_config: {batch_timeout_seconds: 0.05}"
        )
    )
    with serving(folder, environment) as (process, client):
        answers = Counter[int]()
        try:
            while process.poll() is None:
                answers[client.post("/sync/predict", json={"text": "hang"}).status_code] += 1
        except httpx.TransportError:
            pass
        assert process.stderr is not None
        said = process.stderr.read()
        assert process.wait(timeout=60) == 3
    assert set(answers) <= {503, 504}
    assert "it is loaded anew" in said
    assert "again after it was restarted" in said
