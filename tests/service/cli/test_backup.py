"""``modalkit jobs backup``, beside a service that goes on."""

from pathlib import Path

import pytest

from tests.support.command_line import Modalkit, serving
from tests.support.http_client import job


def test_a_copy_made_beside_a_running_service_is_a_store_with_all_jobs_accepted_before(
    modalkit: Modalkit, folder: Path, environment: dict[str, str]
) -> None:
    with serving(folder, environment) as (_, client):
        accepted = [client.post("/async/predict", json=job("four")).json()["job_id"] for _ in range(20)]
        done = modalkit("jobs", "backup", "copy.db")
        assert done.returncode == 0, done.stderr
        client.post("/async/predict", json=job("four"))
    (folder / "modalkit.yaml").write_text((folder / "modalkit.yaml").read_text().replace("jobs.db", "copy.db"))
    with serving(folder, environment) as (_, client):
        for job_id in accepted:
            assert client.get(f"/jobs/{job_id}?wait=10").json()["result"]["length"] == 4
        assert len(client.get("/jobs").json()["jobs"]) == 20


@pytest.mark.parametrize(
    ("prepare", "message", "exit_code"),
    [
        ("", "there is no job store at jobs.db", 1),
        ("jobs.db copy.db", "copy.db exists", 2),
        ("jobs.db", "jobs.db could not be copied", 1),
    ],
)
def test_what_cannot_be_copied_is_one_message_and_leaves_nothing(
    modalkit: Modalkit, folder: Path, prepare: str, message: str, exit_code: int
) -> None:
    for name in prepare.split():
        (folder / name).write_text("no database, but a text that is long enough to look at" * 100)
    before = {path.name for path in folder.iterdir()}
    done = modalkit("jobs", "backup", "copy.db")
    assert done.returncode == exit_code, done.stderr
    assert message in " ".join(done.stderr.replace("│", " ").split())
    assert {path.name for path in folder.iterdir()} == before
