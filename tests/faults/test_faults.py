"""Whatever dies, no accepted job is lost."""

import json
import time
from pathlib import Path
from typing import Any

import httpx

from tests.faults.soak import soak
from tests.support.fault_pipelines import KILLER
from tests.support.killed_server import KilledServer

DEADLY = """
app_settings:
  async_config: {store_path: jobs.db}
  batch_config: {calibration: {enabled: false}}
model_settings:
  model_entries:
    lengths: {pipeline: "tests.support.fault_pipelines:Deadly"}
"""


def test_no_accepted_job_is_lost_when_the_service_is_killed_and_redis_stopped(tmp_path: Path) -> None:
    report = soak(tmp_path, jobs=1500, kills=3, broker_stops=2, seed=4)
    assert (len(report.accepted), report.kills, report.broker_stops) == (1500, 3, 2)
    assert report.interrupted > 0, "no kill found anything running"
    assert (report.lost, report.changed_ids, report.not_succeeded) == (0, 0, 0), str(report)


def test_a_job_that_kills_its_process_fails_and_the_others_of_its_batch_succeed(tmp_path: Path) -> None:
    (tmp_path / "modalkit.yaml").write_text(DEADLY)
    texts = [*(f"innocent {n}" for n in range(30)), KILLER, *(f"innocent {n}" for n in range(30, 60))]
    jobs = [{"message": {"text": text}, "meta": {"text": text}} for text in texts]
    with KilledServer(tmp_path) as server:
        accepted = httpx.post(f"{server.url}/async/predict", json=jobs, timeout=30).json()
        job_ids = [slot["job_id"] for slot in accepted]
        for _ in range(6):  # in the window, in a group, in a smaller one, and then three times alone
            assert server.wait() == -9
            server.start()
        found = [httpx.get(f"{server.url}/jobs/{job_id}?wait=30", timeout=60).json() for job_id in job_ids]
        metrics = httpx.get(f"{server.url}/metrics").text
    by_text = {job["meta"]["text"]: job for job in found}
    killer = by_text.pop(KILLER)
    assert (killer["status"], killer["crashes"]) == ("failed", 6)
    assert killer["error"].startswith("the process died 3 times while this job ran alone")
    assert {job["status"] for job in by_text.values()} == {"succeeded"}, json.dumps(found)
    assert 'modalkit_jobs{status="failed"} 1.0' in metrics


def test_a_batch_whose_requests_are_submitted_when_the_service_is_killed_is_whole_after_the_next_start(
    tmp_path: Path,
) -> None:
    (tmp_path / "modalkit.yaml").write_text(DEADLY)
    count = 10_000
    lines = [
        json.dumps({"custom_id": str(n), "method": "POST", "url": "/sync/predict", "body": {"text": f"innocent {n}"}})
        for n in range(count)
    ]
    with KilledServer(tmp_path) as server, httpx.Client(base_url=server.url, timeout=60) as client:
        upload = {"file": "\n".join(lines).encode()}
        file_id = client.post("/v1/files", files=upload, data={"purpose": "batch"}).json()["id"]
        new = {"input_file_id": file_id, "endpoint": "/sync/predict", "completion_window": "24h"}
        batch_id, jobs = client.post("/v1/batches", json=new).json()["id"], 0
        while not jobs:
            jobs = client.get(f"/batches/{batch_id}").json().get("jobs", 0)
        server.kill()
        assert jobs < count
        server.start()
        batch: dict[str, Any] = {"status": "validating"}
        while batch["status"] in ("validating", "in_progress"):
            time.sleep(0.05)
            batch = client.get(f"/v1/batches/{batch_id}").json()
        content = client.get(f"/v1/files/{batch['output_file_id']}/content").text.splitlines()
    assert (batch["status"], batch["request_counts"]) == (
        "completed",
        {"total": count, "completed": count, "failed": 0},
    )
    assert sorted(int(json.loads(line)["custom_id"]) for line in content) == list(range(count))
