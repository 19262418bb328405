"""What tests over HTTP have in common: their client, what they send, and what they check of answers."""

import ssl
from typing import Any

import httpx

NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
"""The `verify` of clients of plain HTTP: without it, each takes 30 ms to load the certificates of this machine."""


def job(text: str, **fields: Any) -> dict[str, Any]:
    """What is sent for a job of `LengthPipeline`."""
    return {"message": {"text": text}, **fields}


async def ended(client: httpx.AsyncClient, job_id: str) -> dict[str, Any]:
    """The job, once it has ended."""
    found: dict[str, Any] = (await client.get(f"/jobs/{job_id}?wait=30")).json()
    return found


def assert_problem(response: httpx.Response, status: int) -> dict[str, Any]:
    """The content of an answer, which must be a problem of RFC 9457 with this status."""
    assert response.status_code == status
    assert response.headers["content-type"] == "application/problem+json"
    problem: dict[str, Any] = response.json()
    assert problem["status"] == status
    assert problem["title"]
    assert problem["detail"]
    return problem
