"""The programs of docs/queue-patterns.md work, and are quoted there as they are."""

import json
import re
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
from aiobotocore.session import get_session  # type: ignore[import-untyped]  # ships no types

from tests.support import processes
from tests.support.backends.sqs import receive
from tests.support.command_line import serving
from tests.support.guides import ROOT, blocks, files_in, guide, quoted_files, section
from tests.support.sqs_server import REGION, SqsServer, forget_aws_settings

GUIDE = guide("queue-patterns.md")
SUBMISSION = {"message": {"number": 9}, "success_queue": "roots", "failure_queue": "errors"}

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the examples."""
    return Path(shutil.copytree(ROOT / "examples" / "queue_patterns", tmp_path / "examples"))


@pytest.fixture
def environment() -> dict[str, str]:
    return {"PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"}


@pytest.fixture
def run(folder: Path, environment: dict[str, str]) -> Run:
    """Runs a program, as a user would."""

    def start(*command: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return processes.run(command, check=True, cwd=folder, env=environment | variables)

    return start


@pytest.fixture
def sqs(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> Iterator[SqsServer]:
    """A server, which the programs take for AWS."""
    forget_aws_settings(monkeypatch)
    server = SqsServer()
    server.start()
    environment |= {
        "AWS_ACCESS_KEY_ID": "made-up",
        "AWS_SECRET_ACCESS_KEY": "made-up",
        "AWS_EC2_METADATA_DISABLED": "true",
        "MODALKIT_APP_SETTINGS__QUEUE_CONFIG__SQS__ENDPOINT_URL": server.url,
    }
    yield server
    server.stop()


def messages_in_sqs(server: SqsServer, *queue_names: str) -> list[dict[str, Any]]:
    """The one message of each queue."""

    async def read() -> list[dict[str, Any]]:
        async with get_session().create_client("sqs", region_name=REGION, endpoint_url=server.url) as client:
            urls = [(await client.get_queue_url(QueueName=name))["QueueUrl"] for name in queue_names]
            return [json.loads(text) for url in urls for text in await receive(client, url, 1)]

    return anyio.run(read)


def rows(database: Path) -> list[tuple[str, Any]]:
    """Each queue's name, with its message, in the table of `TableBackend`."""
    connection = sqlite3.connect(database)
    try:
        found = connection.execute("SELECT queue, message FROM results ORDER BY queue").fetchall()
    finally:
        connection.close()
    return [(queue, json.loads(message)) for queue, message in found]


def submitted(client: httpx.Client, **changes: str) -> str:
    """The id of an accepted job."""
    answer = client.post("/async/predict", json={**SUBMISSION, **changes})
    assert answer.status_code == 202, answer.text
    job_id: str = answer.json()["job_id"]
    return job_id


def until_delivery_is(client: httpx.Client, job_id: str, delivery: str) -> dict[str, Any]:
    """The job, once its delivery has got so far; the test's own timeout bounds the wait."""
    while True:
        job: dict[str, Any] = client.get(f"/jobs/{job_id}?wait=30").json()
        if job["delivery"] == delivery:
            return job


def test_without_a_queue_results_are_asked_for(run: Run) -> None:
    succeeded, failed = run("no_queue.py").stdout.splitlines()
    shown = blocks(section(GUIDE, "No queue"), "")[0].splitlines()
    assert succeeded == shown[0] == "succeeded 3.0"
    assert failed.startswith("failed ValueError: ")


def test_a_configured_service_takes_the_queues_that_it_allows(folder: Path, environment: dict[str, str]) -> None:
    with serving(folder, environment) as (_, client):
        job = until_delivery_is(client, submitted(client), "memory")
        assert job["result"]["root"] == 3.0
        refused = client.post("/async/predict", json={**SUBMISSION, "success_queue": "elsewhere"})
        assert refused.status_code == 422
        assert "'elsewhere' is not allowed" in refused.json()["detail"]


def test_a_second_file_sends_the_results_to_sqs(folder: Path, environment: dict[str, str], sqs: SqsServer) -> None:
    with serving(folder, {**environment, "MODALKIT_CONFIG": "modalkit.yaml,sqs.yaml"}) as (_, client):
        job_id = submitted(client)
        until_delivery_is(client, job_id, "delivered")
    (message,) = messages_in_sqs(sqs, "roots")
    assert (message["job_id"], message["result"]["root"]) == (job_id, 3.0)


def test_a_program_sends_where_its_configuration_says(run: Run, sqs: SqsServer) -> None:
    (command,) = [block for block in blocks(GUIDE, "bash") if "configured.py" in block]
    variable, _, *arguments = command.split()
    name, _, value = variable.partition("=")
    run(*arguments, **{name: value})
    root, error = messages_in_sqs(sqs, "roots", "errors")
    assert root["result"]["root"] == 3.0
    assert error["original_message"]["message"] == {"number": -1.0}


def test_an_injected_backend_is_read_by_its_program(run: Run) -> None:
    success, failure = (json.loads(line) for line in run("injected.py").stdout.splitlines())
    assert (success["status"], success["result"]["root"], success["meta"]["user_id"]) == ("success", 3.0, "ann")
    assert (failure["status"], failure["meta"]["user_id"]) == ("error", "ann")


def test_a_backend_of_ones_own_is_injected_or_named(run: Run, folder: Path, environment: dict[str, str]) -> None:
    run("custom.py")
    [(queue, message)] = rows(folder / "results.db")
    assert (queue, message["result"]["root"]) == ("roots", 3.0)
    settings = {"MODALKIT_CONFIG": "modalkit.yaml,custom.yaml", "RESULTS_DB": "served.db"}
    with serving(folder, environment | settings) as (_, client):
        job_id = submitted(client)
        until_delivery_is(client, job_id, "delivered")
    [(queue, message)] = rows(folder / "served.db")
    assert (queue, message["job_id"]) == ("roots", job_id)


@pytest.mark.parametrize("program", ["routing.py", "by_prefix.py"])
def test_queues_go_to_different_backends_by_their_names(run: Run, folder: Path, program: str) -> None:
    printed = json.loads(run(program).stdout)
    assert printed["result"]["root"] == 3.0
    [(queue, message)] = rows(folder / "results.db")
    assert (queue, message["result"]["root"]) == ("roots", 4.0)


def test_routes_can_be_configured(folder: Path, environment: dict[str, str]) -> None:
    with serving(folder, {**environment, "MODALKIT_CONFIG": "modalkit.yaml,routing.yaml"}) as (_, client):
        urgent, other = submitted(client, success_queue="urgent_roots"), submitted(client)
        until_delivery_is(client, urgent, "memory")
        until_delivery_is(client, other, "delivered")
    [(queue, message)] = rows(folder / "results.db")
    assert (queue, message["job_id"]) == ("roots", other)


def test_a_queue_that_is_away_disturbs_no_inference(run: Run) -> None:
    done = run("failing.py")
    job, prediction, message = done.stdout.splitlines()
    (shown,) = blocks(section(GUIDE, "A failing queue"), "")
    assert [job, prediction] == shown.splitlines()[:2]
    assert job.endswith(" pending")
    assert json.loads(message)["result"]["root"] == 3.0
    assert "sent again later" in done.stderr
    assert "ConnectionError: the queue does not answer" in done.stderr


def test_an_undelivered_result_is_kept_and_sent_again(folder: Path, environment: dict[str, str]) -> None:
    setup, commands = blocks(section(GUIDE, "A failing queue"), "bash")
    variables = dict(word.split("=") for word in setup.splitlines()[0].removeprefix("export ").split())
    files = ",".join(re.findall(r"--config (\S+)", setup))
    with serving(folder, {**environment, **variables, "MODALKIT_CONFIG": files}) as (_, client):

        def shell(command: str) -> str:
            command = command.replace("http://127.0.0.1:8000", str(client.base_url).rstrip("/"))
            return subprocess.run(
                ["/bin/sh", "-c", command.replace("curl ", "curl -sS ")],
                check=True,
                cwd=folder,
                env=environment,
                stdout=subprocess.PIPE,
                text=True,
                timeout=60,
            ).stdout

        submit, listing, mend, replay = commands.splitlines()
        job_id = json.loads(shell(submit))["job_id"]
        until_delivery_is(client, job_id, "undelivered")
        (job,) = json.loads(shell(listing))["jobs"]
        assert (job["job_id"], job["status"], job["result"]["root"]) == (job_id, "succeeded", 3.0)
        assert "unable to open database file" in job["delivery_error"]
        shell(mend)
        assert shell(replay) == '{"replayed":1}'
        until_delivery_is(client, job_id, "delivered")
    [(queue, message)] = rows(folder / "outbox" / "results.db")
    assert (queue, message["job_id"]) == ("roots", job_id)


def test_the_guide_quotes_the_programs_as_they_are() -> None:
    assert quoted_files(GUIDE) == files_in("examples/queue_patterns")
