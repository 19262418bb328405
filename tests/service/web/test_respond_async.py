"""``Prefer: respond-async`` on /sync/predict (RFC 7240)."""

import httpx
import pytest

from tests.support.http_client import assert_problem, ended

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("prefer", ["respond-async", "wait=10, Respond-Async", "respond-async; foo=bar"])
@pytest.mark.parametrize("body", [{"text": "four"}, {"message": {"text": "four"}}])
async def test_an_item_becomes_a_job(shared_client: httpx.AsyncClient, prefer: str, body: object) -> None:
    response = await shared_client.post("/sync/predict", json=body, headers={"Prefer": prefer})
    job_id = response.json()["job_id"]
    assert response.status_code == 202
    assert response.headers["preference-applied"] == "respond-async"
    assert response.headers["location"] == f"/jobs/{job_id}"
    assert (await ended(shared_client, job_id))["result"]["length"] == 4


@pytest.mark.parametrize("prefer", ["", "wait=10", "return=minimal", "respond-async-later"])
async def test_another_preference_is_ignored(shared_client: httpx.AsyncClient, prefer: str) -> None:
    response = await shared_client.post("/sync/predict", json={"text": "four"}, headers={"Prefer": prefer})
    assert (response.status_code, response.json()["length"]) == (200, 4)
    assert "preference-applied" not in response.headers


async def test_the_headers_of_jobs_count(shared_client: httpx.AsyncClient) -> None:
    headers = {"Prefer": "respond-async", "Idempotency-Key": "k", "X-Priority": "interactive"}
    first, second = [
        await shared_client.post("/sync/predict", json={"text": "four"}, headers=headers) for _ in range(2)
    ]
    assert first.json() == second.json()
    assert (await ended(shared_client, first.json()["job_id"]))["priority"] == "interactive"
    refused = await shared_client.post(
        "/sync/predict", json={"text": "four"}, headers={**headers, "X-Request-Timeout": "5"}
    )
    assert_problem(refused, 422)
