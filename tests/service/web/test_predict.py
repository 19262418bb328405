"""The routes that predict, over a real HTTP server."""

import json
from typing import Any

import anyio
import httpx
import pytest

from modalkit.service.queue_backends import InMemoryBackend
from tests.support.http_client import assert_problem
from tests.support.length_model import POISON, REJECTED
from tests.support.odd_model import MUTE, NAN, OBJECT, SURROGATE

pytestmark = pytest.mark.anyio

SUCCESS: dict[str, Any] = {"status": "success", "error": None, "meta": {}}


async def test_one_item_gets_its_result(shared_client: httpx.AsyncClient) -> None:
    response = await shared_client.post("/sync/predict", json={"text": "four"})
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    assert response.json() == {**SUCCESS, "length": 4}


async def test_an_item_may_come_in_an_envelope(shared_client: httpx.AsyncClient) -> None:
    response = await shared_client.post("/sync/predict", json={"message": {"text": "four"}})
    assert response.json()["length"] == 4
    response = await shared_client.post("/batch/predict", json=[{"message": {"text": "four"}}, {"text": "five!"}])
    assert [slot["length"] for slot in response.json()] == [4, 5]


async def test_concurrent_requests_share_batches_and_get_their_own_results(shared_client: httpx.AsyncClient) -> None:
    lengths: dict[int, int] = {}

    async def call(n: int) -> None:
        lengths[n] = (await shared_client.post("/sync/predict", json={"text": "x" * n})).json()["length"]

    async with anyio.create_task_group() as task_group:
        for n in range(1, 65):
            task_group.start_soon(call, n)
    assert lengths == {n: n for n in range(1, 65)}


async def test_a_list_keeps_its_order_and_each_bad_item_spoils_its_own_slot(shared_client: httpx.AsyncClient) -> None:
    items = [{"text": "one"}, {"text": ""}, {"txt": "a"}, 7, {"text": POISON}, {"text": REJECTED}, {"text": "three"}]
    response = await shared_client.post("/batch/predict", json=items)
    assert response.status_code == 200
    slots = response.json()
    assert [slot["status"] for slot in slots] == ["success", *["error"] * 5, "success"]
    assert (slots[0]["length"], slots[6]["length"]) == (3, 5)
    assert slots[1]["error"].startswith("text: ")
    assert slots[2]["error"] == "text: is missing: add it; txt: unknown field; did you mean 'text'?"
    assert "JSON object" in slots[3]["error"]
    assert slots[4]["error"] == "ValueError: this batch is poisoned"
    assert slots[5]["error"] == "rejected by the model"


async def test_an_empty_list_is_answered_with_one(shared_client: httpx.AsyncClient) -> None:
    assert (await shared_client.post("/batch/predict", json=[])).json() == []


@pytest.mark.parametrize(
    ("path", "body", "status", "detail"),
    [
        ("/sync/predict", b'{"text": "a"', 400, "the body is not JSON: EOF"),
        ("/sync/predict", b"", 400, "the body is not JSON"),
        ("/sync/predict", b"\xff\xfe", 400, "the body is not JSON"),
        ("/sync/predict", b"{}", 422, "text: is missing: add it"),
        ("/sync/predict", b"[]", 422, "must be a JSON object"),
        ("/sync/predict", b'{"text": 5}', 422, "text: "),
        ("/sync/predict", b'{"text": ""}', 422, "text: "),
        ("/sync/predict", b'{"text": "a", "lang": "en"}', 422, "lang: unknown field; remove it; known are: text"),
        ("/sync/predict", b'{"message": {"txt": "a"}}', 422, "message.txt: unknown field; did you mean 'text'?"),
        ("/batch/predict", b'{"text": "a"}', 422, "list"),
        ("/batch/predict", b"nonsense", 400, "the body is not JSON"),
        ("/async/predict", b'{"text": "a"}', 422, "message: is missing: add it"),
        ("/async/predict", b'{"message": {"text": ""}}', 422, "message.text: "),
        ("/async/predict", b'{"message": {"text": "a"}, "queue": "ok"}', 422, "queue: unknown field"),
        ("/async/predict", b'{"message": {"text": "a"}, "model_name": "b"}', 422, "query, as in ?model_name=NAME"),
        ("/async/predict", b'{"message": {"text": "a"}, "success_queue": "x"}', 422, "success_queue: queue 'x' is not"),
        ("/async/predict", b'{"message": {"text": "a"}, "success_queue": ""}', 422, "success_queue: "),
        (
            "/async/predict",
            b'{"message": {"text": "a"}, "failure_queue": "a\\nb"}',
            422,
            "failure_queue: must not hold",
        ),
        ("/sync/predict", b'{"text": "a", "text": "b"}', 400, 'the body has the key "text" twice in one object'),
        ("/batch/predict", b'[{"text": "a"}, {"text": "a", "text": "b"}]', 400, 'has the key "text" twice'),
        ("/async/predict", b'{"message": {"text": "a", "text": "b"}}', 400, 'has the key "text" twice'),
        ("/async/predict", b'[{"message": {"text": "a"}, "meta": {"a": 1, "a": 2}}]', 400, 'has the key "a" twice'),
        (
            "/async/predict",
            b'{"message": {"text": "a"}, "meta": {"a": [1e999]}}',
            422,
            "meta: must not hold NaN, Infinity or a number above",
        ),
        ("/async/predict", b'{"message": {"text": "a"}, "expires_in": "600"}', 422, "expires_in: "),
        ("/sync/predict", b'\xef\xbb\xbf{"text": "a"}', 400, "it begins with a byte order mark; send UTF-8 without"),
    ],
)
async def test_a_bad_body_is_refused_with_the_field_and_the_remedy(
    shared_client: httpx.AsyncClient, path: str, body: bytes, status: int, detail: str
) -> None:
    problem = assert_problem(await shared_client.post(path, content=body), status)
    assert detail in problem["detail"]


async def test_a_bad_field_is_shown_with_the_beginning_of_its_value(shared_client: httpx.AsyncClient) -> None:
    problem = assert_problem(await shared_client.post("/sync/predict", json={"text": "x" * 2**20}), 422)
    (error,) = problem["errors"]
    assert error["field"] == "text"
    assert "1000" in error["message"]
    assert error["value"] == f"{'x' * 100}... ({2**20} characters)"


async def test_a_bad_value_is_shown_as_json(shared_client: httpx.AsyncClient) -> None:
    problem = assert_problem(await shared_client.post("/sync/predict", content=b'{"text": {"a": [true, null]}}'), 422)
    assert problem["errors"][0]["value"] == {"a": [True, None]}
    problem = assert_problem(await shared_client.post("/sync/predict", json={"text": {"a": [True] * 100}}), 422)
    assert problem["errors"][0]["value"].startswith('{"a":[true,true')
    assert problem["errors"][0]["value"].endswith("... (507 characters)")


async def test_a_wrong_method_is_told_the_right_one(shared_client: httpx.AsyncClient) -> None:
    problem = assert_problem(await shared_client.get("/sync/predict"), 405)
    assert problem["detail"] == "/sync/predict takes POST, not GET; /docs lists what there is"


async def test_a_body_beyond_the_limit_is_refused(shared_client: httpx.AsyncClient) -> None:
    async def endless() -> Any:
        for _ in range(33):
            yield b" " * 2**20

    response = await shared_client.post("/sync/predict", content=endless())
    assert "smaller requests" in assert_problem(response, 413)["detail"]


async def test_an_item_that_fails_is_500_and_one_that_is_rejected_422(shared_client: httpx.AsyncClient) -> None:
    problem = assert_problem(await shared_client.post("/sync/predict", json={"text": POISON}), 500)
    assert problem["detail"] == "ValueError: this batch is poisoned"
    assert_problem(await shared_client.post("/sync/predict", json={"text": REJECTED}), 422)
    assert (await shared_client.post("/sync/predict", json={"text": "goes on"})).status_code == 200


async def test_a_list_longer_than_the_queue_is_refused_for_good(shared_client: httpx.AsyncClient) -> None:
    problem = assert_problem(await shared_client.post("/batch/predict", json=[{"text": "a"}] * 101), 413)
    assert "100" in problem["detail"]


async def test_a_model_is_chosen_by_name_with_its_case(shared_client: httpx.AsyncClient) -> None:
    response = await shared_client.post("/sync/predict?model_name=Lengths-2", json={"text": "four"})
    assert response.json()["length"] == 4
    problem = assert_problem(await shared_client.post("/sync/predict?model_name=lengths-2", json={"text": "four"}), 404)
    assert problem["detail"] == "there is no model 'lengths-2'; configured are: lengths, Lengths-2, odd"


@pytest.mark.parametrize(
    ("header", "value"), [("X-Request-Timeout", "0"), ("X-Request-Timeout", "soon"), ("X-Priority", "urgent")]
)
async def test_a_bad_header_is_refused_by_its_name(shared_client: httpx.AsyncClient, header: str, value: str) -> None:
    response = await shared_client.post("/sync/predict", json={"text": "four"}, headers={header: value})
    assert header in assert_problem(response, 422)["detail"]


async def test_an_accepted_job_can_be_found_and_is_delivered(
    shared_client: httpx.AsyncClient, shared_queue: InMemoryBackend
) -> None:
    response = await shared_client.post(
        "/async/predict", json={"message": {"text": "four"}, "success_queue": "ok", "meta": {"user_id": "12345"}}
    )
    assert response.status_code == 202
    job_id = response.json()["job_id"]
    assert response.json() == {"job_id": job_id}
    assert response.headers["location"] == f"/jobs/{job_id}"
    message = json.loads(await shared_queue.receive("ok"))
    assert message["job_id"] == job_id
    job = (await shared_client.get(f"/jobs/{job_id}?wait=30")).json()
    assert job["status"] == "succeeded"
    assert job["result"] == message["result"] == {**SUCCESS, "length": 4}
    assert job["meta"] == {"user_id": "12345"}
    assert job["created_at"] <= job["started_at"] <= job["finished_at"]


async def test_an_unknown_job_is_404(shared_client: httpx.AsyncClient) -> None:
    assert "'nothing'" in assert_problem(await shared_client.get("/jobs/nothing"), 404)["detail"]
    assert_problem(await shared_client.delete("/jobs/nothing"), 404)
    assert "wait" in assert_problem(await shared_client.get("/jobs/nothing?wait=1000"), 422)["detail"]


async def test_a_finished_job_is_left_as_it_is_when_cancelled(shared_client: httpx.AsyncClient) -> None:
    job_id = (await shared_client.post("/async/predict", json={"message": {"text": "four"}})).json()["job_id"]
    await shared_client.get(f"/jobs/{job_id}?wait=30")
    assert (await shared_client.delete(f"/jobs/{job_id}")).json()["status"] == "succeeded"


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/nowhere", 404), ("GET", "/sync/predict", 405)])
async def test_wrong_addresses_and_methods_are_problems_too(
    shared_client: httpx.AsyncClient, method: str, path: str, status: int
) -> None:
    assert_problem(await shared_client.request(method, path), status)


async def test_an_output_that_is_no_json_is_a_problem(shared_client: httpx.AsyncClient) -> None:
    for text, told in ((OBJECT, "object is no type of JSON"), (SURROGATE, "surrogates"), (MUTE, "MuteError")):
        response = await shared_client.post("/sync/predict?model_name=odd", json={"text": text})
        assert told in assert_problem(response, 500)["detail"]


async def test_an_output_that_is_no_json_spoils_its_own_slot(shared_client: httpx.AsyncClient) -> None:
    items = [{"text": text} for text in ("four", OBJECT, NAN, SURROGATE, MUTE, "five!")]
    slots = (await shared_client.post("/batch/predict?model_name=odd", json=items)).json()
    assert [slot["status"] for slot in slots] == ["success", "error", "success", "error", "error", "success"]
    assert "that JSON has: texts, numbers" in slots[1]["error"]
    assert slots[2]["score"] is None


@pytest.mark.parametrize(("headers", "priority"), [({}, "bulk"), ({"X-Priority": "interactive"}, "interactive")])
async def test_a_job_is_bulk_unless_it_says_otherwise(
    shared_client: httpx.AsyncClient, headers: dict[str, str], priority: str
) -> None:
    accepted = await shared_client.post("/async/predict", json={"message": {"text": "four"}}, headers=headers)
    job = (await shared_client.get(f"/jobs/{accepted.json()['job_id']}?wait=30")).json()
    assert (job["priority"], job["status"]) == (priority, "succeeded")


async def test_a_timeout_for_the_request_of_a_job_is_refused(shared_client: httpx.AsyncClient) -> None:
    headers = {"X-Request-Timeout": "5"}
    refused = await shared_client.post("/async/predict", json={"message": {"text": "four"}}, headers=headers)
    assert assert_problem(refused, 422)["detail"].startswith("X-Request-Timeout: ")
