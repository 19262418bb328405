"""What docs/delivery.md shows works as printed, and what it says of settings is so."""

import importlib.util
import json
import re
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import ModuleType
from typing import Any

import anyio
import pytest

from modalkit.iomodel import AsyncInputModel, DelayedFailureOutputModel
from modalkit.service.backoff import FIRST_RETRY_S, MAX_RETRY_S
from modalkit.service.queue_backends import QueueMessage, UndeliverableError
from modalkit.settings import Settings
from modalkit.task_queue import WebhookBackend
from tests.support import processes
from tests.support.command_line import CONFIGURATION, serving
from tests.support.guides import ROOT, blocks, files_in, guide, quoted_files, section
from tests.support.processes import ForkedPython

GUIDE = guide("delivery.md")
SECRET = "MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSwMfKQ9r8GKYo="
MESSAGE = '{"job_id": "one", "status": "success", "meta": {"user_id": "ann"}}'


@pytest.fixture
def environment() -> dict[str, str]:
    return {"PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"}


@pytest.fixture
def once() -> ModuleType:
    spec = importlib.util.spec_from_file_location("once", ROOT / "examples" / "delivery" / "once.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def receiver(tmp_path: Path, environment: dict[str, str]) -> Iterator[str]:
    """The address of the example's receiver, which runs in `tmp_path`."""
    shutil.copytree(ROOT / "examples" / "delivery", tmp_path, dirs_exist_ok=True)
    command = ["-m", "uvicorn", "receiver:app", "--port", "0"]
    with ForkedPython(command, cwd=tmp_path, env={**environment, "WEBHOOK_SECRET": SECRET}) as process:
        said = ""
        while not (running := re.search(r"running on http://(\S+)", said)):
            line = process.stderr.readline()
            assert line, said
            said += line
        yield running[1]


def counts(database: sqlite3.Connection) -> list[tuple[str, int]]:
    return database.execute("SELECT * FROM results_by_user").fetchall()


def test_messages_look_as_shown(tmp_path: Path, environment: dict[str, str]) -> None:
    program = ROOT / "examples" / "queue_patterns" / "injected.py"
    done = processes.run([str(program)], check=True, cwd=tmp_path, env=environment)
    messages = [json.loads(line) for line in done.stdout.splitlines()]
    shown = [json.loads(block) for block in blocks(section(GUIDE, "Messages"), "json")]
    for message, example in zip(messages, shown, strict=True):
        assert list(message) == list(example)
        assert re.fullmatch(r"[0-9a-f-]{36}", message["job_id"])
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", message["meta"]["timestamp"])
        # What differs from run to run, and a text of Python's that differs between releases.
        message["job_id"], message["meta"]["timestamp"] = example["job_id"], example["meta"]["timestamp"]
        if "error" in message:
            message["error"] = example["error"]
        assert message == example
    explained = set(re.findall(r"^\| `(\w+)` \|", section(GUIDE, "Messages"), re.MULTILINE))
    assert explained == set(shown[0]) | set(shown[1])
    failure = DelayedFailureOutputModel.model_validate(messages[1])
    assert AsyncInputModel.model_validate(messages[1]["original_message"]) == failure.original_message


def test_the_settings_have_the_defaults_it_says() -> None:
    async_config = Settings.load([], {}).app_settings.async_config
    assert f"| `async_config.timeout`, {async_config.timeout:g} s |" in GUIDE
    assert f"| `async_config.result_ttl`, {async_config.result_ttl:g} s |" in GUIDE
    attempts = async_config.max_delivery_attempts
    assert f"The {attempts} attempts of `async_config.max_delivery_attempts` last 6 to 13 minutes" in " ".join(
        GUIDE.split()
    )
    longest_s = sum(min(MAX_RETRY_S, FIRST_RETRY_S * 4**attempt) for attempt in range(attempts - 1))
    assert longest_s / 2 > 6 * 60
    assert longest_s < 13 * 60


def test_a_message_that_comes_again_is_handled_once(once: Any) -> None:
    with closing(sqlite3.connect(":memory:")) as database:
        database.executescript(once.TABLES)
        assert [once.handle(database, MESSAGE), once.handle(database, MESSAGE)] == [True, False]
        assert once.handle(database, MESSAGE.replace("one", "two"))
        assert counts(database) == [("ann", 2)]


def test_a_message_that_could_not_be_handled_is_handled_when_it_comes_again(once: Any) -> None:
    with closing(sqlite3.connect(":memory:")) as database:
        database.executescript(once.TABLES)
        with pytest.raises(KeyError):
            once.handle(database, '{"job_id": "one", "meta": {}}')
        assert once.handle(database, MESSAGE)
        assert counts(database) == [("ann", 1)]


def test_the_receiver_stores_signed_results_once(receiver: str, tmp_path: Path) -> None:
    message = QueueMessage(f"http://{receiver}/results", MESSAGE, "one")

    async def send(secret: str) -> list[Exception | None]:
        backend = WebhookBackend(allowed_hosts=[receiver], secret=secret, allow_private_addresses=True)
        outcomes = [*await backend.send_messages([message]), *await backend.send_messages([message])]
        await backend.aclose()
        return outcomes

    refused = anyio.run(send, SECRET[::-1].lstrip("="))
    assert [type(error) for error in refused] == [UndeliverableError] * 2
    assert "answers 401" in str(refused[0])
    assert not (tmp_path / "results.db").exists()
    assert anyio.run(send, SECRET) == [None, None]
    with closing(sqlite3.connect(tmp_path / "results.db")) as database:
        assert counts(database) == [("ann", 1)]


def test_the_requests_work_as_printed(tmp_path: Path, environment: dict[str, str]) -> None:
    (tmp_path / "modalkit.yaml").write_text(CONFIGURATION)
    _, one, many, stream, afterwards = blocks(section(GUIDE, "Over HTTP"), "bash")
    with serving(tmp_path, environment) as (_, client):
        address = str(client.base_url).rstrip("/")

        def shell(command: str, **variables: str) -> str:
            command = f"set -e; curl() {{ command curl -sS --fail-with-body -w '\\n' \"$@\"; }}\n{command}"
            return subprocess.run(
                ["/bin/sh", "-c", command],
                check=True,
                cwd=tmp_path,
                env={**environment, "url": address, **variables},
                stdout=subprocess.PIPE,
                text=True,
                timeout=60,
            ).stdout

        job_id = json.loads(shell(one))["job_id"]
        assert json.loads(shell(one))["job_id"] == job_id
        good, bad = json.loads(shell(many))
        assert list(good) == ["job_id"]
        assert list(bad) == ["status", "error"]
        lines = [json.loads(line) for line in shell(stream).splitlines() if line]
        assert [list(line) for line in lines] == [["line", "job_id"]] * 2
        assert [line["line"] for line in lines] == [1, 2]
        again = [json.loads(line) for line in shell(stream).splitlines() if line]
        assert again == lines
        job, failed, undelivered, cancelled, replayed, purged = map(
            json.loads, shell(afterwards, job_id=job_id).splitlines()
        )
        assert (job["status"], job["result"]["length"], job["meta"]) == ("succeeded", 25, {"user_id": "ann"})
        assert failed == undelivered == {"jobs": [], "next_cursor": None}
        assert cancelled["status"] == "succeeded"
        assert (replayed, purged) == ({"replayed": 0}, {"purged": 0})


def test_the_guide_quotes_the_programs_as_they_are() -> None:
    assert quoted_files(GUIDE) == files_in("examples/delivery")


@pytest.mark.parametrize("name", ["delivery.md", "queue-patterns.md", "streaming.md"])
def test_links_lead_somewhere(name: str) -> None:
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", guide(name)):
        path = ROOT / "docs" / (target or name)
        assert path.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles], anchor
