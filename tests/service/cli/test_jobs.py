"""``modalkit jobs``, on a real store's file and on a real service that has the same file open."""

import json
import os
import pty
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import anyio
import pytest
import typer
from typer.testing import CliRunner, Result

from modalkit.service.cli import app
from modalkit.service.cli.jobs import _value_text, duration_text, seconds_of
from modalkit.service.jobs import (
    DeliveryRecord,
    DeliveryStatus,
    Job,
    JobEnd,
    JobFilter,
    JobStatus,
    SqliteJobStore,
)
from tests.support.command_line import CONFIGURATION, MODALKIT, Modalkit, serving

SECRET_URL = "https://hooks.example.com/T0/very-secret"
UNDELIVERED, DELIVERED, FAILED = (f"0199a6b5-8c3f-7a41-9d52-{n:012}" for n in (1, 2, 3))
MARKUP = "ValueError: [red]no\x1b[31m" + "x" * 200


async def seed(path: Path, more: int = 0) -> None:
    """Three jobs that have ended, the failed one two hours ago, and more that wait."""
    now = time.time()
    async with SqliteJobStore(path) as store:
        await store.add(
            [
                Job(
                    job_id=job_id,
                    model_name=model_name,
                    message_json='{"text":"four"}',
                    meta_json='{"row":[7]}',
                    success_queue=queue,
                    created_at=now - 7500,
                )
                for job_id, model_name, queue in (
                    (UNDELIVERED, "lengths", SECRET_URL),
                    (DELIVERED, "lengths", "results"),
                    (FAILED, "another-model-of-a-long-name", None),
                )
            ]
        )
        await store.claim("lengths", 2, now)
        await store.claim("another-model-of-a-long-name", 1, now)
        ends = [
            JobEnd(job_id=job_id, status=JobStatus.SUCCEEDED, result_json='{"length":4}', finished_at=now)
            for job_id in (UNDELIVERED, DELIVERED)
        ]
        failed = JobEnd(job_id=FAILED, status=JobStatus.FAILED, error=MARKUP, finished_at=now - 7200)
        await store.finish([*ends, failed])
        await store.record_deliveries(
            [
                DeliveryRecord(
                    job_id=UNDELIVERED,
                    status=DeliveryStatus.UNDELIVERED,
                    attempts=8,
                    error=f"404 for '{SECRET_URL}'",
                ),
                DeliveryRecord(job_id=DELIVERED, status=DeliveryStatus.DELIVERED, attempts=1),
            ]
        )
        if more:
            waiting = (f"waiting-{n:04}" for n in range(more))
            await store.add(
                [
                    Job(job_id=job_id, model_name="lengths", message_json='{"text":"four"}', created_at=now)
                    for job_id in waiting
                ]
            )


async def stored(path: Path) -> dict[str, DeliveryStatus]:
    async with SqliteJobStore(path) as store:
        return {job.job_id: job.delivery for job in (await store.page(10, JobFilter())).jobs}


def flat(text: str) -> str:
    """What is said in a box of lines, in one line."""
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", text).split())


@pytest.fixture
def path(folder: Path) -> Path:
    """The store's file, with the jobs of `seed`."""
    anyio.run(seed, folder / "jobs.db")
    return folder / "jobs.db"


Jobs = Callable[..., Result]


def run(*arguments: str) -> Result:
    """`modalkit jobs` in this process, which saves the start of one."""
    return CliRunner().invoke(app, ["jobs", *arguments])


@pytest.fixture(params=["stored", "served"])
def jobs(
    request: pytest.FixtureRequest,
    path: Path,
    folder: Path,
    environment: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Jobs]:
    """Runs `modalkit jobs`: on the file, and on a service that has it open."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "80")
    if request.param == "stored":
        yield run
    else:
        with serving(folder, environment) as (_, client):
            yield lambda *arguments: run(*arguments, "--url", str(client.base_url))


def test_the_list_fits_80_columns_and_keeps_ids_whole_and_secrets_out(jobs: Jobs) -> None:
    done = jobs("list")
    assert done.exit_code == 0, done.stderr
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert [line.split()[0] for line in lines if not line.startswith(" ")] == ["job", FAILED, DELIVERED, UNDELIVERED]
    assert re.search(rf"{UNDELIVERED} +succeeded +undelivered +lengths +2h", done.stdout)
    assert "ValueError: [red]no\N{REPLACEMENT CHARACTER}[31mxx" in done.stdout
    assert "secret" not in done.stdout
    assert done.stderr == ""


def test_the_list_is_narrowed_by_state_delivery_and_model(jobs: Jobs) -> None:
    def listed(*arguments: str) -> list[str]:
        return [json.loads(line)["job_id"] for line in jobs("list", "--json", *arguments).stdout.splitlines()]

    assert listed("--status", "failed", "--status", "queued") == [FAILED]
    assert listed("--delivery", "undelivered", "--delivery", "delivered") == [DELIVERED, UNDELIVERED]
    assert listed("--model", "lengths", "--delivery", "none") == []
    assert jobs("list", "--status", "expired").stdout == "There are no such jobs.\n"


def test_json_has_the_fields_of_the_service(
    modalkit: Modalkit, path: Path, folder: Path, environment: dict[str, str]
) -> None:
    done = modalkit("jobs", "list", "--json")
    with serving(folder, environment) as (_, client):
        expected = client.get("/jobs").json()["jobs"]
        served = modalkit("jobs", "list", "--json", "--url", str(client.base_url))
    assert [json.loads(line) for line in done.stdout.splitlines()] == expected
    assert served.stdout == done.stdout


def test_pages_follow_each_other_and_all_lists_everything(
    modalkit: Modalkit, folder: Path, environment: dict[str, str]
) -> None:
    anyio.run(seed, folder / "jobs.db", 450)
    everything = modalkit("jobs", "list", "--all", "--json")
    ids = [json.loads(line)["job_id"] for line in everything.stdout.splitlines()]
    assert len(set(ids)) == len(ids) == 453
    assert everything.stderr == ""
    first = modalkit("jobs", "list", "--limit", "205", "--json")
    cursor = re.search(r"--cursor (\d+)", first.stderr)
    assert cursor, first.stderr
    with serving(folder, environment) as (_, client):
        served = ("--json", "--url", str(client.base_url))
        second = modalkit("jobs", "list", "--cursor", cursor[1], "--all", *served)
        assert modalkit("jobs", "list", "--limit", "205", *served).stderr == first.stderr
    pages = [json.loads(line)["job_id"] for line in (first.stdout + second.stdout).splitlines()]
    assert len(first.stdout.splitlines()) == 205
    assert pages == ids


def test_show_tells_all_and_says_which_job_is_unknown(jobs: Jobs) -> None:
    done = jobs("show", UNDELIVERED, "unknown", FAILED)
    assert done.exit_code == 1
    assert "there is no job 'unknown'" in done.stderr
    assert re.search(rf"^job_id +{UNDELIVERED}$", done.stdout, re.MULTILINE)
    assert re.search(r'^result +\{\n +"length": 4\n +\}$', done.stdout, re.MULTILINE)
    assert re.search(r"^delivery_attempts +8$", done.stdout, re.MULTILINE)
    assert f"\njob_id             {FAILED}\n" in done.stdout
    assert "\x1b" not in done.stdout
    shown = jobs("show", UNDELIVERED, UNDELIVERED, "--json")
    assert shown.exit_code == 0
    assert json.loads(shown.stdout)["meta"] == {"row": [7]}


def test_an_odd_id_is_no_job_of_the_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parent)
    for job_id in (".", "a/b", "?"):
        assert f"there is no job {job_id!r}" in run("show", job_id).stderr


def test_show_tells_message_and_queues_from_the_file(modalkit: Modalkit, path: Path) -> None:
    job = json.loads(modalkit("jobs", "show", UNDELIVERED, "--json").stdout)
    assert job["message"] == {"text": "four"}
    assert job["success_queue"] == SECRET_URL
    assert re.search(rf"^success_queue +{SECRET_URL}$", modalkit("jobs", "show", UNDELIVERED).stdout, re.MULTILINE)


def test_replay_makes_one_result_due_again_and_refuses_others(jobs: Jobs) -> None:
    done = jobs("replay", UNDELIVERED, DELIVERED, "unknown")
    assert done.exit_code == 1
    assert done.stdout.startswith("1 result will be sent once more, ")
    assert f"the delivery of job {DELIVERED} is delivered" in done.stderr
    assert "there is no job 'unknown'" in done.stderr
    assert json.loads(jobs("show", UNDELIVERED, "--json").stdout)["delivery"] in ("pending", "memory")


def test_replay_all_makes_every_undelivered_result_due_again(jobs: Jobs) -> None:
    assert jobs("replay", "--all").stdout.startswith("1 result will be sent once more, ")
    done = jobs("replay", "--all")
    assert (done.exit_code, done.stdout) == (0, "There are no undelivered results.\n")


def test_what_is_replayed_in_the_file_is_sent_at_the_next_start(
    modalkit: Modalkit, path: Path, folder: Path, environment: dict[str, str]
) -> None:
    assert modalkit("jobs", "replay", UNDELIVERED).stdout.endswith("when the service starts next.\n")
    with serving(folder, environment) as (_, client):
        while client.get(f"/jobs/{UNDELIVERED}").json()["delivery"] != "memory":
            pass


def test_retry_queues_failed_jobs_once_more_and_refuses_others(jobs: Jobs) -> None:
    done = jobs("retry", FAILED, DELIVERED, "unknown")
    assert done.exit_code == 1
    assert done.stdout.startswith("1 job runs once more, ")
    assert f"job {DELIVERED} is succeeded" in done.stderr
    assert "there is no job 'unknown'" in done.stderr
    assert json.loads(jobs("show", FAILED, "--json").stdout)["status"] == "queued"
    assert jobs("retry", "--all").stdout == "There are no such jobs.\n"
    refused = str(jobs("retry", "--all", "--status", "succeeded").exception)
    assert "'failed', 'expired' or 'cancelled'" in refused
    assert "JobStatus" not in refused
    assert jobs("retry").exit_code == jobs("retry", FAILED, "--batch", "b").exit_code == 2


def test_an_odd_id_means_no_other_address_of_the_service(
    modalkit: Modalkit, path: Path, folder: Path, environment: dict[str, str]
) -> None:
    with serving(folder, environment) as (_, client):
        for job_id in (".", "../jobs", "?"):
            done = modalkit("jobs", "replay", job_id, "--url", str(client.base_url))
            assert done.returncode == 1
            assert done.stdout == ""
            assert "Traceback" not in done.stderr
        assert client.get(f"/jobs/{UNDELIVERED}").json()["delivery"] == "undelivered"


def test_purge_removes_what_it_is_told_and_nothing_else(jobs: Jobs) -> None:
    assert jobs("purge", "--older-than", "3h", "--yes").stdout == "Removed 0 jobs.\n"
    assert jobs("purge", "--status", "failed", "--model", "lengths", "--yes").stdout == "Removed 0 jobs.\n"
    assert jobs("purge", "--older-than", "90m", "--yes").stdout == "Removed 1 job.\n"
    assert jobs("purge", "--delivery", "undelivered", "--yes").stdout == "Removed 1 job.\n"
    left = jobs("list", "--json").stdout.splitlines()
    assert [json.loads(line)["job_id"] for line in left] == [DELIVERED]


@pytest.mark.parametrize(("answer", "removed"), [(b"y\n", 1), (b"\n", 0)])
def test_purge_asks_at_a_terminal(
    folder: Path, path: Path, environment: dict[str, str], answer: bytes, removed: int
) -> None:
    terminal, its_other_end = pty.openpty()
    os.write(terminal, answer)
    try:
        done = subprocess.run(
            [sys.executable, *MODALKIT, "jobs", "purge", "--status", "failed", "--older-than", "60m"],
            check=False,
            cwd=folder,
            env=environment,
            stdin=its_other_end,
            text=True,
            capture_output=True,
            timeout=60,
        )
    finally:
        os.close(terminal)
        os.close(its_other_end)
    asked = "Remove from jobs.db all ended jobs in the state failed, that ended more than 1h ago?"
    assert asked in done.stdout + done.stderr
    assert done.returncode == (0 if removed else 1)
    assert len(anyio.run(stored, path)) == 3 - removed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["purge", "--yes"], "by --status, --delivery, --batch or --older-than"),
        (["purge", "--model", "lengths", "--yes"], "by --status, --delivery, --batch or --older-than"),
        (["purge", "--older-than", "7 weeks", "--yes"], "such as 90s, 15m, 2h or 7d, not '7 weeks'"),
        (["purge", "--older-than", "0s", "--yes"], "not '0s'"),
        (["purge", "--older-than", "999999999d", "--yes"], "not '999999999d'"),
        (["purge", "--status", "queued", "--yes"], "queued ones are not"),
        (["purge", "--delivery", "pending", "--yes"], "about to be sent"),
        (["purge", "--status", "failed"], "give --yes"),
        (["replay"], "--all for every undelivered result"),
        (["replay", UNDELIVERED, "--all"], "not both"),
        (["replay", UNDELIVERED, ""], "it must not be empty"),
        (["list", "--url", "localhost:8000"], "such as http://127.0.0.1:8000, not 'localhost:8000'"),
        (["list", "--url", "http://[::"], "such as http://127.0.0.1:8000, not 'http://[::'"),
        (["list", "--url", "http://127.0.0.1:99999"], "such as http://127.0.0.1:8000, not 'http://127.0.0.1:99999'"),
        (["list", "--status", "done"], "'done'"),
    ],
)
def test_wrong_usage_is_one_message_and_changes_nothing(
    path: Path, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(path.parent)
    done = run(*arguments)
    assert done.exit_code == 2
    assert message in flat(done.stderr)
    assert anyio.run(stored, path)[UNDELIVERED] == "undelivered"


def test_a_missing_file_is_an_error_and_is_not_created(modalkit: Modalkit, folder: Path) -> None:
    done = modalkit("jobs", "list")
    assert done.returncode == 1
    assert done.stderr.startswith("modalkit: error: there is no job store jobs.db (from ")
    assert "--url" in done.stderr
    assert [file.name for file in folder.iterdir()] == ["modalkit.yaml"]


def test_jobs_in_memory_are_to_be_asked_for_by_url(modalkit: Modalkit, folder: Path) -> None:
    (folder / "modalkit.yaml").write_text("app_settings: {async_config: {store: memory}}")
    done = modalkit("jobs", "list")
    assert done.returncode == 2
    assert "--url http://127.0.0.1:8000" in flat(done.stderr)


def test_a_file_that_a_service_has_open_is_an_error_that_names_its_process(
    modalkit: Modalkit, folder: Path, environment: dict[str, str]
) -> None:
    with serving(folder, environment) as (process, _):
        done = modalkit("jobs", "list")
    assert done.returncode == 1
    assert f"jobs.db is in use by process {process.pid}" in done.stderr
    assert "--url" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("header", ["authorization", "x-api-key"])
def test_the_key_goes_where_the_configuration_says(
    modalkit: Modalkit, path: Path, folder: Path, environment: dict[str, str], header: str
) -> None:
    auth = f"app_settings:\n  auth_config: {{auth_header: {header}}}\n"
    configuration = folder / "modalkit.yaml"
    configuration.write_text(CONFIGURATION.replace("app_settings:\n", auth))
    with serving(folder, environment | {"MODALKIT_APP_SETTINGS__AUTH_CONFIG__API_KEY": "opensesame"}) as (_, client):
        at = ("--url", str(client.base_url))
        assert modalkit("jobs", "list", *at, "--key", "opensesame").returncode == 0
        assert modalkit("jobs", "list", *at, MODALKIT_API_KEY="opensesame").returncode == 0
        without = modalkit("jobs", "list", *at)
        wrong = modalkit("jobs", "list", *at, "--key", "closesesame")
        unsendable = modalkit("jobs", "list", *at, "--key", "open\nsesame")
        assert modalkit("jobs", "list", *at, "--key", "opensesame\n").returncode == 0, "as the service reads its key"
    assert [without.returncode, wrong.returncode, unsendable.returncode] == [1, 1, 2]
    assert "--key or in MODALKIT_API_KEY" in without.stderr
    assert f"the header '{header}'" in wrong.stderr
    assert "--key or MODALKIT_API_KEY" in unsendable.stderr
    assert "no header can carry" in unsendable.stderr
    assert "sesame" not in without.stderr + wrong.stderr + unsendable.stderr
    assert modalkit("jobs", "list", MODALKIT_API_KEY="opensesame").returncode == 0


def test_an_address_without_a_service_is_one_message_without_the_password(modalkit: Modalkit) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    done = modalkit("jobs", "list", "--url", f"http://me:password@127.0.0.1:{port}")
    assert done.returncode == 5
    assert done.stderr.startswith(f"modalkit: error: http://127.0.0.1:{port} cannot be reached: ")
    assert "--url" in done.stderr


def test_an_address_of_something_else_is_one_message(
    modalkit: Modalkit, folder: Path, environment: dict[str, str]
) -> None:
    with serving(folder, environment) as (_, client):
        done = modalkit("jobs", "show", "unknown", "--url", f"{client.base_url}/elsewhere")
    assert done.returncode == 1
    assert "elsewhere is not the address of a modalkit service: it answers 404" in done.stderr
    (folder / "site").mkdir()
    (folder / "site" / "jobs").write_text("<html>")

    class Site(SimpleHTTPRequestHandler):
        def log_request(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Site, directory=str(folder / "site"))) as server:
        Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        done = modalkit("jobs", "list", "--url", f"http://127.0.0.1:{server.server_port}")
        server.shutdown()
    assert done.returncode == 1
    assert "as no modalkit of this version does" in done.stderr


@pytest.mark.parametrize("command", ["list", "show", "replay", "purge"])
def test_help_has_examples(command: str) -> None:
    done = run(command, "--help")
    assert done.exit_code == 0
    assert "Examples" in done.stdout
    assert f"modalkit jobs {command}" in done.stdout


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("15m", 900), ("2h", 7200), ("7d", 604_800)])
def test_a_duration_is_shown_as_it_is_given(text: str, seconds: int) -> None:
    assert seconds_of(text) == seconds
    assert duration_text(seconds) == text


@pytest.mark.parametrize("text", ["7", "1.5h", "-1s", "2h30m"])
def test_durations_have_a_unit(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="such as 90s"):
        seconds_of(text)


def test_an_unknown_state_is_refused_with_those_there_are(modalkit: Modalkit) -> None:
    done = modalkit("jobs", "list", "--status", "done")
    told = " ".join(done.stderr.replace("│", " ").split())
    assert done.returncode == 2
    assert "must be one of queued, running, succeeded, failed, cancelled, expired, not 'done'" in told
    assert "Value error" not in told


def test_an_item_that_is_a_list_is_shown_as_json() -> None:
    assert _value_text(["a", None], 2) == '[\n    "a",\n    null\n  ]'
