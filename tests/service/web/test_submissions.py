"""Submitting jobs over a real HTTP server: one, a list, a stream of any length."""

import json
from collections.abc import AsyncIterator, Iterable
from typing import Any

import anyio
import httpx
import pytest

from modalkit.service.local_gateway import LocalGateway
from modalkit.service.queue_backends import InMemoryBackend
from modalkit.service.settings import RequestConfig, Settings
from modalkit.service.web import create_app
from modalkit.service.web.answers import SubmittedLine
from tests.support.http_client import assert_problem, ended, job
from tests.support.http_server import serving
from tests.support.length_model import POISON

pytestmark = pytest.mark.anyio

NDJSON = {"Content-Type": "application/x-ndjson"}


def lines_of(answer: httpx.Response) -> list[dict[str, Any]]:
    return [json.loads(line) for line in answer.text.splitlines()]


@pytest.mark.parametrize("invalid", ['{"text": "x"}', '{"message": {"text": "y"}}'])
async def test_nan_in_meta_spoils_its_own_slot(client: httpx.AsyncClient, invalid: str) -> None:
    """Also in a list that is read item by item, because another item is invalid."""
    items = ['{"message": {"text": "NaN"}}', '{"message": {"text": "b"}, "meta": {"n": [NaN]}}', invalid]
    answer = await client.post("/async/predict", content=f"[{','.join(items)}]")
    good, bad, _ = answer.json()
    assert "job_id" in good
    assert bad["error"] == "meta: must not hold NaN, Infinity or a number above 1.8e308; send null"


async def test_a_list_is_accepted_in_one_answer_and_a_bad_job_spoils_its_own_slot(
    client: httpx.AsyncClient, queue: InMemoryBackend
) -> None:
    jobs = [job("four", success_queue="ok"), {"text": "x"}, job("", meta={}), job("a", success_queue="other"), 7]
    answer = await client.post("/async/predict", json=[*jobs, job("five!", success_queue="ok")])
    assert answer.status_code == 202
    first, *bad, last = answer.json()
    assert [slot["status"] for slot in bad] == ["error"] * 4
    known = "message, success_queue, failure_queue, meta, idempotency_key, expires_in"
    assert bad[0]["error"] == f"message: is missing: add it; text: unknown field; remove it; known are: {known}"
    assert bad[1]["error"].startswith("message.text: ")
    assert bad[2]["error"].startswith("success_queue: queue 'other' is not allowed")
    assert "JSON object" in bad[3]["error"]
    delivered = {json.loads(await queue.receive("ok"))["job_id"] for _ in range(2)}
    assert delivered == {first["job_id"], last["job_id"]}


async def test_an_empty_list_is_answered_with_one_and_a_list_that_is_no_json_refused(client: httpx.AsyncClient) -> None:
    answer = await client.post("/async/predict", json=[])
    assert (answer.status_code, answer.json()) == (202, [])
    assert_problem(await client.post("/async/predict", content=b"[1, 2"), 400)


@pytest.mark.parametrize("media_type", ["application/x-ndjson", "application/jsonl; charset=utf-8"])
async def test_each_line_of_a_stream_is_answered_with_a_line(client: httpx.AsyncClient, media_type: str) -> None:
    body = "\n".join([json.dumps(job("four")), "", "{", json.dumps(job("")), '"', json.dumps(job("five!"))])
    answer = await client.post("/async/predict", content=body, headers={"Content-Type": media_type})
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/x-ndjson"
    lines = lines_of(answer)
    assert [line["line"] for line in lines] == [1, 3, 4, 5, 6]
    assert [line.get("status") for line in lines] == [None, "error", "error", "error", None]
    assert lines[1]["error"].startswith("the line is not JSON: EOF while parsing an object at column 1;")
    assert lines[1].keys() == SubmittedLine.model_fields.keys() - {"job_id"}
    assert (await ended(client, lines[4]["job_id"]))["result"]["length"] == 5


async def test_a_long_stream_is_answered_in_full_though_the_client_sends_all_before_it_reads(
    client: httpx.AsyncClient,
) -> None:
    """The answers are larger than what the two sides' buffers hold."""
    count = 40_000
    line = json.dumps(job("four")).encode() + b"\n"

    async def body() -> AsyncIterator[bytes]:
        for _ in range(count // 100):
            yield line * 100

    answer = await client.post("/async/predict", content=body(), headers=NDJSON)
    lines = lines_of(answer)
    assert [found["line"] for found in lines] == list(range(1, count + 1))
    assert len({found["job_id"] for found in lines}) == count


async def test_answers_come_while_the_stream_goes_on(client: httpx.AsyncClient) -> None:
    """As for a client that reads and writes at the same time, which httpx cannot."""
    stream = await anyio.connect_tcp("127.0.0.1", client.base_url.port or 0)
    async with stream:
        head = "POST /async/predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/x-ndjson\r\n"
        await stream.send(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        for number in (1, 2, 3):
            line = json.dumps(job("x" * number)).encode() + b"\n"
            await stream.send(b"%x\r\n%s\r\n" % (len(line), line))
            received = b""
            with anyio.fail_after(30):
                while b'{"line":%d,"job_id"' % number not in received:
                    received += await stream.receive()


async def test_a_line_that_is_too_large_is_refused_alone(client: httpx.AsyncClient) -> None:
    limit = RequestConfig().max_line_bytes
    huge = json.dumps(job("x" * limit))
    body = f"{json.dumps(job('four'))}\n{huge}\n{json.dumps(job('five!'))}\n"
    lines = lines_of(await client.post("/async/predict", content=body, headers=NDJSON))
    assert ["job_id" in line for line in lines] == [True, False, True]
    assert lines[1]["error"] == (
        f"the line is larger than {limit} bytes: send it as a request of its own, or raise "
        "request_config.max_line_bytes"
    )


async def test_a_client_that_goes_away_in_mid_stream_leaves_the_lines_before(
    client: httpx.AsyncClient, queue: InMemoryBackend, caplog: pytest.LogCaptureFixture
) -> None:
    async def body() -> AsyncIterator[bytes]:
        yield json.dumps(job("four", success_queue="ok")).encode() + b"\n" + b'{"message": {"te'
        await queue.receive("ok")
        raise ConnectionAbortedError

    with pytest.raises(ConnectionAbortedError):
        await client.post("/async/predict", content=body(), headers=NDJSON)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
    assert (await client.post("/sync/predict", json={"text": "goes on"})).status_code == 200


async def test_the_same_key_gives_the_same_job_also_after_a_restart(settings: Settings) -> None:
    headers = {"Idempotency-Key": "order-7"}
    job_ids = []
    for _ in range(2):
        async with serving(create_app(gateway := LocalGateway(settings))) as client:
            await gateway.wait_until_ready()
            for _ in range(2):
                answer = await client.post("/async/predict", json=job("four"), headers=headers)
                job_ids.append(answer.json()["job_id"])
            other = await client.post("/async/predict", json=job("other"), headers=headers)
            assert "'order-7' belongs to job" in assert_problem(other, 422)["detail"]
            jobs = (await client.get("/jobs")).json()["jobs"]
            assert [found["job_id"] for found in jobs] == job_ids[:1]
    assert len(set(job_ids)) == 1


async def test_lines_and_items_have_keys_of_their_own(client: httpx.AsyncClient) -> None:
    jobs = [job("four", idempotency_key="a"), job("four", idempotency_key="b"), job("four", idempotency_key="a")]
    ids = [slot["job_id"] for slot in (await client.post("/async/predict", json=jobs)).json()]
    body = "\n".join(map(json.dumps, jobs))
    lines = lines_of(await client.post("/async/predict", content=body, headers=NDJSON))
    assert ids == [line["job_id"] for line in lines]
    assert (ids[0], len(set(ids))) == (ids[2], 2)


@pytest.mark.parametrize(
    ("body", "headers", "detail"),
    [
        ([job("four")], {"Idempotency-Key": "k"}, "Idempotency-Key: one key cannot stand for several jobs"),
        (job("four", idempotency_key="a"), {"Idempotency-Key": "b"}, "Idempotency-Key: the body has another"),
        (job("four"), {"Idempotency-Key": "k" * 256}, "Idempotency-Key: must be 1 to 255 printable characters"),
        (job("four"), {"Idempotency-Key": ""}, "Idempotency-Key: must be"),
        (job("four", idempotency_key="a\nb"), {}, "idempotency_key: must not hold unprintable characters"),
        (job("four", expires_in=0), {}, "expires_in: "),
        (job("four", expires_in="soon"), {}, "expires_in: "),
        (job("four", expires_in=1e13), {}, "expires_in: Input should be less than or equal to 315360000"),
    ],
)
async def test_a_bad_key_or_time_is_refused_with_its_name(
    client: httpx.AsyncClient, body: Any, headers: dict[str, str], detail: str
) -> None:
    assert detail in assert_problem(await client.post("/async/predict", json=body, headers=headers), 422)["detail"]


async def test_a_queue_name_that_is_too_long_is_refused_with_its_field(client: httpx.AsyncClient) -> None:
    """Also where only one job of a list or of a stream names it."""
    named, detail = job("four", failure_queue="q" * 2049), "failure_queue: String should have at most 2048 characters"
    assert detail in assert_problem(await client.post("/async/predict", json=named), 422)["detail"]
    for slots in (
        (await client.post("/async/predict", json=[job("four"), named])).json(),
        lines_of(
            await client.post(
                "/async/predict", content="\n".join(map(json.dumps, [job("four"), named])), headers=NDJSON
            )
        ),
    ):
        assert "job_id" in slots[0]
        assert detail in json.dumps(slots[1])
    limits = (await client.get("/openapi.json")).json()["components"]["schemas"]
    assert any(
        '"maxLength": 2048' in json.dumps(schema.get("properties", {}).get("failure_queue"))
        for schema in limits.values()
    )


async def test_a_stream_for_an_unknown_model_is_refused_whole(client: httpx.AsyncClient) -> None:
    assert_problem(await client.post("/async/predict?model_name=no", content=b"{}", headers=NDJSON), 404)


async def test_a_store_that_fails_is_told_to_each_line_and_the_stream_goes_on(
    settings: Settings, tmp_path: Any
) -> None:
    settings = Settings(
        app_settings={"async_config": {"store_path": tmp_path / "small.db", "max_stored_jobs": 2}},
        model_settings=settings.model_settings,
    )

    def body() -> Iterable[bytes]:
        return [json.dumps(job(text)).encode() + b"\n" for text in ("one", "two")]

    async with serving(create_app(gateway := LocalGateway(settings))) as client:
        await gateway.wait_until_ready()
        first = lines_of(await client.post("/async/predict", content=b"".join(body()), headers=NDJSON))
        second = lines_of(await client.post("/async/predict", content=b"".join(body()), headers=NDJSON))
        assert_problem(await client.post("/async/predict", json=job("four")), 429)
    assert all("job_id" in line for line in first)
    assert ["2 of at most 2 jobs" in line["error"] for line in second] == [True, True]


async def test_a_failed_job_says_why(client: httpx.AsyncClient, queue: InMemoryBackend) -> None:
    asked = job(POISON, failure_queue="bad", meta={"n": 1}, idempotency_key="k", expires_in=60.5)
    answer = await client.post("/async/predict", json=asked)
    message = json.loads(await queue.receive("bad"))
    assert (message["job_id"], message["status"]) == (answer.json()["job_id"], "error")
    assert message["original_message"] == {"success_queue": None, **asked}
    assert message["error"] == "ValueError: this batch is poisoned"
