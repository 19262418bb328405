"""Input that no honest client sends: each is answered with a problem of the 4xx kind, and nothing is logged."""

import gzip
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from tests.support.http_client import assert_problem, ended, job

pytestmark = pytest.mark.anyio

ROUTES = ("/sync/predict", "/batch/predict", "/async/predict")
DEEP = 100_000


def assert_refused(response: httpx.Response) -> dict[str, Any]:
    assert 400 <= response.status_code < 500, response.text[:1000]
    return assert_problem(response, response.status_code)


@pytest.fixture(autouse=True)
def _nothing_is_logged(caplog: pytest.LogCaptureFixture) -> Any:
    yield
    assert not [record for record in caplog.records if record.exc_info or record.levelname in ("ERROR", "CRITICAL")]


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize(
    "body",
    [
        b"[" * DEEP,
        b"[" * DEEP + b"]" * DEEP,
        b'{"text":' * DEEP + b"1" + b"}" * DEEP,
        b'{"message":' * DEEP + b"1" + b"}" * DEEP,
        b'{"text": NaN}',
        b'{"text": -Infinity}',
        b'{"text": 1e999999}',
        b'{"text": ' + b"9" * 100_000 + b"}",
        b'{"text": "\\ud800"}',
        b'{"text": "\\udc00\\ud800"}',
        b'{"\\ud800": "a"}',
        b'{"text": "\xed\xa0\x80"}',
        b'{"text": "\xff"}',
        b'{"te\x00xt": "a"}',
        b'{"text": "a\x00"}',
        b"\x00",
        b'{"text": "a"}\x00',
        b'{"text": "a"} {"text": "b"}',
        b"\xef\xbb\xbf{}",
        '{"text": "a"}'.encode("utf-16"),
        b"text=a",
        b"<text>a</text>",
        b"null",
        b"true",
        b'"text"',
        b"-0",
    ],
)
async def test_a_hostile_body_is_refused(shared_client: httpx.AsyncClient, path: str, body: bytes) -> None:
    assert_refused(await shared_client.post(path, content=body))


@pytest.mark.parametrize(
    "item",
    [
        b"[" * 100 + b"]" * 100,
        b'{"text": 1e400}',
        b'{"text": ' + b"9" * 4000 + b"}",
        b"-" + b"9" * 4000,
        b"NaN",
        b'{"text": {"a": NaN}}',
        b'{"text": -Infinity}',
    ],
)
async def test_a_hostile_item_spoils_its_own_slot(shared_client: httpx.AsyncClient, item: bytes) -> None:
    response = await shared_client.post("/batch/predict", content=b'[{"text": "four"}, ' + item + b"]")
    assert response.status_code == 200, response.text[:1000]
    assert [slot["status"] for slot in response.json()] == ["success", "error"]
    response = await shared_client.post(
        "/async/predict", content=b'[{"message": {"text": "four"}}, {"message": ' + item + b"}]"
    )
    assert response.status_code == 202, response.text[:1000]
    assert ["job_id" in slot for slot in response.json()] == [True, False]


@pytest.mark.parametrize("text", ["a\x00b", "\x00", "\u202e\u0000\ufeff", "\U0010ffff" * 10, "\x7f\x1b[31m"])
async def test_a_text_with_any_character_is_an_item_and_a_job(shared_client: httpx.AsyncClient, text: str) -> None:
    response = await shared_client.post("/sync/predict", json={"text": text})
    assert (response.status_code, response.json()["length"]) == (200, len(text))
    accepted = (await shared_client.post("/async/predict", json=job(text, meta={text: text}))).json()
    found = await ended(shared_client, accepted["job_id"])
    assert (found["result"]["length"], found["meta"], found["message"]) == (len(text), {text: text}, {"text": text})


@pytest.mark.parametrize(
    "meta",
    [
        b'{"a": ' + b"[" * 5000 + b"]" * 5000 + b"}",
        b'{"a": NaN}',
        b'{"a": [1, {"b": Infinity}]}',
        b'{"a": 1e400}',
        b'{"a": "\\ud800"}',
        b'{"\\ud800": 1}',
        b"[]",
    ],
)
async def test_meta_that_could_not_be_returned_is_refused(shared_client: httpx.AsyncClient, meta: bytes) -> None:
    assert_refused(
        await shared_client.post("/async/predict", content=b'{"message": {"text": "a"}, "meta": ' + meta + b"}")
    )


@pytest.mark.parametrize("digits", [20, 400, 4000, 5000])
async def test_a_huge_number_in_meta_is_returned_unchanged_or_refused(
    shared_client: httpx.AsyncClient, digits: int
) -> None:
    body = b'{"message": {"text": "a"}, "meta": {"a": ' + b"9" * digits + b"}}"
    response = await shared_client.post("/async/predict", content=body)
    if response.status_code == 202:
        found = await shared_client.get(f"/jobs/{response.json()['job_id']}?wait=30")
        assert found.status_code == 200
        assert b'"a":' + b"9" * digits in found.content
    else:
        assert_refused(response)


@pytest.mark.parametrize("encoding", ["gzip", "br", "deflate, gzip", "zstd", "x" * 1000])
@pytest.mark.parametrize("path", [*ROUTES, "/v1/batches", "/v1/files"])
async def test_a_compressed_body_is_refused(shared_client: httpx.AsyncClient, path: str, encoding: str) -> None:
    headers = {"Content-Encoding": encoding, "Content-Type": "application/x-ndjson"}
    response = await shared_client.post(path, content=gzip.compress(bytes(2**20)), headers=headers)
    assert_problem(response, 415)
    assert response.headers["accept-encoding"] == "identity"


@pytest.mark.parametrize(
    "content_type",
    [
        "multipart/form-data; boundary=x",
        "application/xml",
        "image/png",
        "text/plain; charset=utf-16",
        "",
        "\xff/\x80",
        "a" * 9000,
    ],
)
async def test_a_body_is_json_whatever_its_content_type(shared_client: httpx.AsyncClient, content_type: str) -> None:
    headers = {b"content-type": content_type.encode("latin-1")}
    assert (await shared_client.post("/sync/predict", content=b'{"text": "four"}', headers=headers)).status_code == 200
    assert_problem(await shared_client.post("/sync/predict", content=b"--x\r\n\r\nfour\r\n--x--", headers=headers), 400)


@pytest.mark.parametrize(
    "job_id",
    [
        "%00",
        "a%00b",
        "..%2f..%2fetc%2fpasswd",
        "%2e%2e",
        "%2F",
        "a%2Fb",
        "..%5c",
        "%ff%fe",
        "%ED%A0%80",
        "%F0%9F%92%A9",
        "'%20OR%201=1--",
        "%0d%0aSet-Cookie:%20a=b",
        "a" * 8000,
        "%25%30%30",
        "*",
        "%",
        "%zz",
        "replay",
        "%3Cscript%3E",
    ],
)
async def test_a_hostile_job_id_is_404(shared_client: httpx.AsyncClient, job_id: str) -> None:
    for method in ("GET", "DELETE", "POST"):
        path = f"/jobs/{job_id}{'/replay' if method == 'POST' else ''}"
        url = shared_client.base_url.copy_with(raw_path=path.encode())
        response = await shared_client.send(shared_client.build_request(method, url))
        assert response.status_code in (404, 405), response.text[:1000]
        assert_refused(response)
        assert "set-cookie" not in response.headers


@pytest.mark.parametrize(
    "name", ["%00", "..%2f", "%ff", "a" * 8000, "%0d%0a", "gpt&model_name=odd", "", "%F0%9F%92%A9"]
)
async def test_a_hostile_model_name_is_refused(shared_client: httpx.AsyncClient, name: str) -> None:
    for path in ROUTES:
        assert_refused(await shared_client.post(f"{path}?model_name={name}", json={"text": "a"}))
    assert_refused(await shared_client.get(f"/v1/models/{name}"))


@pytest.mark.parametrize(
    "query",
    [
        "limit=99999999999999999999",
        "limit=-1",
        "limit=1e3",
        "limit=NaN",
        "cursor=-1",
        "cursor=9223372036854775808",
        "status=",
        "status=%00",
        "delivery=x",
        "older_than=NaN",
        "older_than=Infinity",
        "older_than=-1",
        "x" * 8000,
        "%00=1",
        f"limit={'9' * 5000}",
    ],
)
async def test_a_hostile_filter_of_jobs_is_refused(shared_client: httpx.AsyncClient, query: str) -> None:
    for method in ("GET", "DELETE"):
        assert_problem(await shared_client.request(method, f"/jobs?{query}"), 422)


@pytest.mark.parametrize("wait", ["NaN", "Infinity", "-1", "1e400", "9" * 5000, "", "%00", "1&wait=2"])
async def test_a_hostile_wait_is_refused(shared_client: httpx.AsyncClient, wait: str) -> None:
    assert_refused(await shared_client.get(f"/jobs/none?wait={wait}"))


@pytest.mark.parametrize(
    ("header", "value"),
    [
        ("X-Request-Timeout", value)
        for value in (
            b"nan",
            b"inf",
            b"-inf",
            b"-1",
            b"0",
            b"1e999",
            b"9" * 5000,
            b"\xff",
            b"1,2",
            b"",
            b"0x10",
            b"\xb2",
        )
    ]
    + [("X-Priority", value) for value in (b"", b"\xff", b"BULK", b"bulk,interactive", b"x" * 5000)],
)
async def test_a_hostile_header_is_refused(shared_client: httpx.AsyncClient, header: str, value: bytes) -> None:
    headers = {header.encode(): value}
    for path in ("/sync/predict", "/batch/predict"):
        problem = assert_problem(await shared_client.post(path, json={"text": "a"}, headers=headers), 422)
        assert header in problem["detail"]


@pytest.mark.parametrize("key", [b"", b"\xff" * 300, b"x" * 256, b"\xc2\x85", b"a\tb"])
async def test_a_hostile_idempotency_key_is_refused(shared_client: httpx.AsyncClient, key: bytes) -> None:
    headers = {b"idempotency-key": key}
    assert_problem(await shared_client.post("/async/predict", json=job("a"), headers=headers), 422)


@pytest.mark.parametrize(
    "path",
    ["/sync/predict", "/async/predict", "/jobs", "/jobs/none", "/jobs/replay", "/health", "/metrics", "/nowhere"],
)
@pytest.mark.parametrize("method", ["OPTIONS", "PUT", "PATCH", "TRACE", "PROPFIND"])
async def test_a_method_that_a_route_does_not_have_is_405(
    shared_client: httpx.AsyncClient, path: str, method: str
) -> None:
    response = await shared_client.request(method, path)
    problem = assert_refused(response)
    assert response.status_code == (404 if path == "/nowhere" else 405)
    if response.status_code == 405:
        assert response.headers["allow"] in problem["detail"]


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/static-offline-docs/swagger-ui-bundle.js", "GET, HEAD"),
        ("/jobs", "GET, HEAD, DELETE"),
        ("/jobs/none", "GET, HEAD, DELETE"),
        ("/sync/predict", "POST"),
        ("/health/live", "GET, HEAD"),
        ("/", "GET, HEAD"),
        ("/openapi.json", "GET, HEAD"),
    ],
)
async def test_allow_has_all_methods_of_an_address(shared_client: httpx.AsyncClient, path: str, allowed: str) -> None:
    assert (await shared_client.options(path)).headers["allow"] == allowed


@pytest.mark.parametrize(
    "path", ["/health/live", "/health", "/metrics", "/jobs", "/docs", "/openapi.json", "/v1/models"]
)
async def test_head_is_get_without_a_body(shared_client: httpx.AsyncClient, path: str) -> None:
    response = await shared_client.head(path)
    assert (response.status_code, response.content) == (200, b"")
    assert response.headers["content-type"] == (await shared_client.get(path)).headers["content-type"]
    assert (await shared_client.head("/sync/predict")).status_code == 405
    assert (await shared_client.head("/jobs/none")).status_code == 404
    assert (await shared_client.head("/ui/events")).status_code == 200  # whose body has no end
    assert (await shared_client.get("/health/live")).json() == {"status": "live"}  # the connection is still in step


async def test_a_body_in_a_thousand_chunks_is_one_body(shared_client: httpx.AsyncClient) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        yield b'{"text": "'
        for _ in range(1000):
            yield b"x"
        yield b'"}'

    assert (await shared_client.post("/sync/predict", content=chunks())).json()["length"] == 1000
