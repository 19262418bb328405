"""The HTTP service of a frontend over each engine: requests over a real server, run by a real worker."""

import json
import re
from collections.abc import Mapping
from typing import Any

import anyio
import httpx
import pytest
from pydantic import SecretStr

from modalkit.service.calls import jobs as calls_jobs
from modalkit.service.calls.engine import CallResult, CallState
from modalkit.service.calls.jobs import CallGateway
from modalkit.service.calls.records import Reservation
from modalkit.service.errors import ContainerFaultError, RemoteItemError, RemoteTimeoutError, ServiceError
from modalkit.service.jobs.life import expires_in_passed
from modalkit.service.queue_backends import InMemoryBackend
from modalkit.service.settings import AuthConfig
from modalkit.service.web import create_app
from modalkit.service.web.problems import error_response
from tests.service.calls.conftest import MODEL, Stand
from tests.support.http_server import serving
from tests.support.length_model import POISON, REJECTED, LengthPipeline

pytestmark = pytest.mark.anyio

BEARER = {"Authorization": "Bearer k"}
NDJSON = {"Content-Type": "application/x-ndjson"}


@pytest.fixture
def pipeline(stand: Stand) -> LengthPipeline:
    return stand.pipeline


@pytest.fixture
def queue(stand: Stand) -> InMemoryBackend:
    return stand.queue


def job(text: str, **fields: Any) -> dict[str, Any]:
    return {"message": {"text": text}, **fields}


async def submit(client: httpx.AsyncClient, *jobs: Mapping[str, Any]) -> list[str]:
    answer = await client.post("/async/predict", json=jobs)
    assert answer.status_code == 202
    return [slot["job_id"] for slot in answer.json()]


async def found(client: httpx.AsyncClient, job_id: str, wait_s: float = 0) -> dict[str, Any]:
    answer = await client.get(f"/jobs/{job_id}", params={"wait": wait_s})
    assert answer.status_code == 200
    job: dict[str, Any] = answer.json()
    return job


def problem(answer: httpx.Response, status: int) -> str:
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json")
    return str(answer.json()["detail"])


async def test_models_elsewhere_cannot_be_reloaded_and_the_answer_says_what_to_do(stand: Stand) -> None:
    model = stand.model()
    gateway = CallGateway({MODEL: model}, stand.jobs(model), opens=[model])
    async with serving(create_app(gateway, auth=AuthConfig(api_key=SecretStr("k"))), headers=BEARER) as client:
        (shown,) = (await client.get("/admin/models")).json()
        assert (shown["readiness"], shown["batch_config"]) == ("ready", None)
        assert "deploy again" in problem(await client.post(f"/admin/models/{MODEL}/reload"), 501)
        assert "deploy again" in problem(await client.patch(f"/admin/models/{MODEL}", json={"max_batch_size": 2}), 501)


async def test_one_item_gets_its_result(client: httpx.AsyncClient) -> None:
    answer = await client.post("/sync/predict", json={"text": "four"})
    assert (answer.status_code, answer.json()) == (200, {"status": "success", "error": None, "meta": {}, "length": 4})


async def test_a_list_keeps_its_order_and_each_bad_item_spoils_its_own_slot(client: httpx.AsyncClient) -> None:
    items = [{"text": "one"}, {"text": ""}, {"text": POISON}, {"text": REJECTED}, {"text": "three"}]
    slots = (await client.post("/batch/predict", json=items)).json()
    assert [slot["status"] for slot in slots] == ["success", "error", "error", "error", "success"]
    assert (slots[0]["length"], slots[4]["length"]) == (3, 5)
    assert [slot["error"] for slot in slots[2:4]] == ["ValueError: this batch is poisoned", "rejected by the model"]


async def test_concurrent_requests_get_their_own_results(client: httpx.AsyncClient) -> None:
    lengths: dict[int, int] = {}

    async def call(n: int) -> None:
        lengths[n] = (await client.post("/sync/predict", json={"text": "x" * n})).json()["length"]

    async with anyio.create_task_group() as task_group:
        for n in range(1, 65):
            task_group.start_soon(call, n)
    assert lengths == {n: n for n in range(1, 65)}


@pytest.mark.parametrize(
    ("text", "status", "detail"),
    [(POISON, 500, "ValueError: this batch is poisoned"), (REJECTED, 422, "rejected by the model")],
)
async def test_an_error_of_an_item_has_the_status_that_it_has_where_it_ran(
    client: httpx.AsyncClient, text: str, status: int, detail: str
) -> None:
    assert problem(await client.post("/sync/predict", json={"text": text}), status) == detail


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RemoteTimeoutError("the call took longer than deployment_config.timeout"), 504),
        (ContainerFaultError("the device of this container is broken: CUDA error"), 503),
    ],
)
def test_a_call_that_fails_is_answered_as_what_may_be_tried_again(error: ServiceError, status: int) -> None:
    answer = error_response(error)
    assert (answer.status_code, json.loads(bytes(answer.body))["detail"]) == (status, str(error))
    assert ("retry-after" in answer.headers) == (status == 503)


async def test_a_call_that_the_engine_refuses_may_be_tried_again(client: httpx.AsyncClient, stand: Stand) -> None:
    stand.carrier.faults.refuses_calls = True
    answer = await client.post("/sync/predict", json={"text": "four"})
    assert "refuses calls" in problem(answer, 503)
    assert "retry-after" in answer.headers


@pytest.mark.parametrize(
    ("error_type", "status"),
    [
        ("QueueFullError", 429),
        ("RejectItem", 422),
        ("RequestTooLargeError", 413),
        ("DeadlineExceededError", 504),
        ("BatchTimeoutError", 504),
        ("SchedulerClosedError", 503),
        ("OutputNotJsonError", 500),
        ("ValueError", 500),
    ],
)
def test_each_error_of_a_worker_has_its_status_from_afar_too(error_type: str, status: int) -> None:
    answer = error_response(RemoteItemError("why", error_type))
    assert (answer.status_code, json.loads(bytes(answer.body))["detail"]) == (status, "why")
    assert ("retry-after" in answer.headers) == (status in (429, 503))


async def test_an_unknown_model_is_refused(client: httpx.AsyncClient) -> None:
    assert "'no'" in problem(await client.post("/sync/predict?model_name=no", json={"text": "four"}), 404)


async def test_a_job_is_accepted_and_its_result_kept_and_delivered(
    client: httpx.AsyncClient, queue: InMemoryBackend
) -> None:
    asked = job("four", success_queue="ok", failure_queue="bad", meta={"n": 1})
    answer = await client.post("/async/predict", json=asked)
    assert answer.status_code == 202
    job_id = answer.json()["job_id"]
    assert answer.headers["location"] == f"/jobs/{job_id}"
    ended = await found(client, job_id, 30)
    assert (ended["job_id"], ended["model_name"], ended["status"]) == (job_id, "lengths", "succeeded")
    assert ended["result"] == {"status": "success", "error": None, "meta": {}, "length": 4}
    assert {name: ended[name] for name in asked} == asked
    assert (ended["delivery"], ended["delivery_attempts"]) == ("delivered", 1)
    assert ended["created_at"] <= ended["started_at"] <= ended["finished_at"]
    message = json.loads(await queue.receive("ok"))
    assert (message["job_id"], message["result"]["length"], message["meta"]["n"]) == (job_id, 4, 1)


async def test_jobs_that_come_together_share_a_call_and_each_has_its_own_id(
    client: httpx.AsyncClient, stand: Stand, queue: InMemoryBackend
) -> None:
    job_ids = await submit(client, *(job("x" * n, success_queue="ok") for n in range(1, 65)))
    assert [len(call.entries) for call in stand.kept_calls] == [32, 32]
    assert len(set(job_ids)) == 64
    assert {job_id.partition(".")[2] for job_id in job_ids} == {str(index) for index in range(32)}
    lengths = [(await found(client, job_id, 30))["result"]["length"] for job_id in job_ids]
    assert lengths == list(range(1, 65))
    assert {json.loads(text)["job_id"] for text in queue.messages("ok")} == set(job_ids)


async def test_each_line_of_a_stream_becomes_a_job_or_an_error(client: httpx.AsyncClient) -> None:
    body = "\n".join([json.dumps(job("four")), json.dumps(job("")), json.dumps(job("five!"))])
    answer = await client.post("/async/predict", content=body, headers=NDJSON)
    lines = [json.loads(line) for line in answer.text.splitlines()]
    assert [line.get("status") for line in lines] == [None, "error", None]
    assert (await found(client, lines[2]["job_id"], 30))["result"]["length"] == 5


async def test_a_job_of_a_call_that_runs_is_queued_however_long_one_waits(
    client: httpx.AsyncClient, pipeline: LengthPipeline
) -> None:
    pipeline.gate.clear()
    (job_id,) = await submit(client, job("four", success_queue="ok", meta={"n": 1}))
    for wait_s in (0, 0.05):
        running = await found(client, job_id, wait_s)
        assert (running["status"], running["result"], running["delivery"]) == ("queued", None, "none")
        assert (running["meta"], running["message"], running["success_queue"]) == ({"n": 1}, {"text": "four"}, "ok")
        assert running["created_at"]
    pipeline.gate.set()
    assert (await found(client, job_id, 30))["status"] == "succeeded"


async def test_items_of_a_stream_and_events_of_jobs_come_over_any_engine(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls_jobs, "WATCH_INTERVAL_S", 0.01)
    body = "\n".join(json.dumps({"text": text}) for text in ("four", "", POISON))
    answer = await client.post("/batch/predict?ordered=true", content=body, headers=NDJSON)
    lines = [json.loads(line) for line in answer.text.splitlines()]
    assert [(line["index"], line["status"]) for line in lines] == [(0, "success"), (1, "error"), (2, "error")]
    answer = await client.post("/sync/predict", json={"text": "four"}, headers={"Accept": "text/event-stream"})
    assert [line for line in answer.text.splitlines() if line.startswith("event")] == ["event: result"]
    first, second = await submit(client, job("four"), job(POISON))
    events = (await client.get("/jobs/events", params={"job_id": [first, second]})).text
    results = re.findall(r'event: result\ndata: {"job_id":"(.*?)".*?"status":"(.*?)"', events)
    assert sorted(results) == sorted([(first, "succeeded"), (second, "failed")])


async def test_a_job_that_fails_says_why_and_leaves_its_neighbours_alone(
    client: httpx.AsyncClient, queue: InMemoryBackend
) -> None:
    queues = {"success_queue": "ok", "failure_queue": "bad"}
    good, bad = await submit(client, job("four", **queues), job(POISON, **queues, meta={"n": 1}))
    failed = await found(client, bad, 30)
    assert (failed["status"], failed["error"]) == ("failed", "ValueError: this batch is poisoned")
    assert (failed["result"], failed["delivery"]) == (None, "delivered")
    assert (await found(client, good))["status"] == "succeeded"
    message = json.loads(await queue.receive("bad"))
    assert (message["job_id"], message["status"]) == (bad, "error")
    assert json.loads(await queue.receive("ok"))["job_id"] == good


@pytest.mark.parametrize(
    ("state", "status"),
    [
        (CallState.FAILED, "failed"),
        (CallState.TIMED_OUT, "expired"),
        (CallState.CANCELLED, "cancelled"),
        (CallState.FORGOTTEN, "expired"),
    ],
)
async def test_what_becomes_of_a_call_becomes_of_its_jobs(
    client: httpx.AsyncClient, stand: Stand, pipeline: LengthPipeline, state: CallState, status: str
) -> None:
    pipeline.gate.clear()
    (job_id,) = await submit(client, job("four", meta={"n": 1}))
    (call,) = stand.kept_calls
    call.end(CallResult(state, error=f"it is {state}"))
    pipeline.gate.set()
    ended = await found(client, job_id)
    assert (ended["status"], ended["meta"]) == (status, {"n": 1})
    assert ended["error"]


async def test_a_job_that_expired_and_a_result_that_did_are_told_apart(
    client: httpx.AsyncClient, stand: Stand, pipeline: LengthPipeline
) -> None:
    pipeline.gate.clear()
    late, kept = await submit(client, job("four", expires_in=0.001), job("five!"))
    assert (await found(client, kept, 0.05))["status"] == "queued"  # meanwhile the time of the other one runs out
    pipeline.gate.set()
    expired = await found(client, late, 30)
    assert (expired["status"], expired["error"]) == ("expired", expires_in_passed(0.001))
    assert (await found(client, kept))["status"] == "succeeded"
    stand.carrier.forget_results()
    forgotten = await found(client, kept)
    assert forgotten["status"] == "expired"
    assert "its result" in forgotten["error"]


async def test_a_job_that_is_none_is_not_found(
    client: httpx.AsyncClient, stand: Stand, pipeline: LengthPipeline
) -> None:
    """Also where the call exists: with fewer jobs, running and returned."""

    async def assert_none_is_found(call_id: str) -> None:
        for job_id in ("nonsense", "fc-unknown.0", call_id, f"{call_id}.7"):
            assert_unknown(await client.get(f"/jobs/{job_id}"))
            assert_unknown(await client.delete(f"/jobs/{job_id}"))

    pipeline.gate.clear()
    (one,) = await submit(client, job("four"))
    call_id = one.removesuffix(".0")
    await assert_none_is_found(call_id)
    pipeline.gate.set()
    assert (await found(client, one, 30))["status"] == "succeeded"
    await assert_none_is_found(call_id)


@pytest.mark.parametrize("outcomes", [["a text"], [{"status": "success"}], 7])
async def test_the_id_of_a_call_of_something_else_names_no_job(
    client: httpx.AsyncClient, stand: Stand, pipeline: LengthPipeline, outcomes: Any
) -> None:
    pipeline.gate.clear()
    (job_id,) = await submit(client, job("four"))
    (call,) = stand.kept_calls
    call.end(CallResult(CallState.RETURNED, outcomes))
    pipeline.gate.set()
    assert_unknown(await client.get(f"/jobs/{job_id}"))
    assert_unknown(await client.delete(f"/jobs/{job_id}"))


def assert_unknown(answer: httpx.Response) -> None:
    assert "there is no job" in problem(answer, 404)


async def test_cancelling_a_job_leaves_its_neighbours_alone(
    client: httpx.AsyncClient, stand: Stand, pipeline: LengthPipeline, queue: InMemoryBackend
) -> None:
    pipeline.gate.clear()
    first, second, third = await submit(client, *(job("x" * n, success_queue="ok") for n in (1, 2, 3)))
    cancelled = (await client.delete(f"/jobs/{second}")).json()
    assert (cancelled["job_id"], cancelled["status"]) == (second, "cancelled")
    assert cancelled["finished_at"]
    with anyio.fail_after(20):  # it has ended, though its call has not
        assert (await found(client, second, 300))["status"] == "cancelled"
    assert (await found(client, first))["status"] == "queued"
    pipeline.gate.set()
    assert [(await found(client, job_id, 30))["status"] for job_id in (first, second, third)] == [
        "succeeded",
        "cancelled",
        "succeeded",
    ]
    assert [json.loads(text)["job_id"] for text in queue.messages("ok")] == [first, third]
    (call,) = stand.kept_calls
    assert call.result.state is CallState.RETURNED
    assert (await client.delete(f"/jobs/{second}")).json()["status"] == "cancelled"


async def test_a_call_of_which_all_jobs_are_cancelled_is_ended(
    client: httpx.AsyncClient, stand: Stand, pipeline: LengthPipeline, queue: InMemoryBackend
) -> None:
    pipeline.gate.clear()
    job_ids = await submit(client, job("one", success_queue="ok"), job("two", success_queue="ok"))
    (call,) = stand.kept_calls
    states = []
    for job_id in job_ids:
        await client.delete(f"/jobs/{job_id}")
        states.append(call.result.state)
    assert states == [CallState.PENDING, CallState.CANCELLED]
    pipeline.gate.set()
    for job_id in job_ids:
        assert (await found(client, job_id, 30))["status"] == "cancelled"
    assert (await client.post("/sync/predict", json={"text": "four"})).json()["length"] == 4
    assert queue.messages("ok") == []


async def test_a_job_that_has_ended_is_not_cancelled(client: httpx.AsyncClient, queue: InMemoryBackend) -> None:
    (job_id,) = await submit(client, job("four", success_queue="ok"))
    assert (await found(client, job_id, 30))["status"] == "succeeded"
    answer = await client.delete(f"/jobs/{job_id}")
    assert (answer.status_code, answer.json()["status"]) == (200, "succeeded")
    assert (await found(client, job_id))["status"] == "succeeded"


async def test_a_job_whose_result_is_being_sent_is_not_told_to_be_cancelled(
    client: httpx.AsyncClient, stand: Stand, monkeypatch: pytest.MonkeyPatch, queue: InMemoryBackend
) -> None:
    sending, may_send, send_messages = anyio.Event(), anyio.Event(), queue.send_messages

    async def send(messages: Any) -> Any:
        sending.set()
        await may_send.wait()
        return await send_messages(messages)

    monkeypatch.setattr(queue, "send_messages", send)
    (job_id,) = await submit(client, job("four", success_queue="ok"))
    await sending.wait()
    assert (await client.delete(f"/jobs/{job_id}")).json()["status"] == "queued"
    may_send.set()
    ended = await found(client, job_id, 30)
    assert (ended["status"], ended["delivery"]) == ("succeeded", "delivered")


async def test_the_same_key_gives_the_same_job(client: httpx.AsyncClient, stand: Stand) -> None:
    headers = {"Idempotency-Key": "order-7"}
    answers = [await client.post("/async/predict", json=job("four"), headers=headers) for _ in range(2)]
    (job_id,) = {answer.json()["job_id"] for answer in answers}
    assert (await found(client, job_id, 30))["idempotency_key"] == "order-7"
    later = await client.post("/async/predict", json=job("four", expires_in=60), headers=headers)
    assert later.json() == {"job_id": job_id}  # when it is wanted by is not what is asked for
    other = await client.post("/async/predict", json=job("other"), headers=headers)
    assert f"'order-7' belongs to job {job_id}" in problem(other, 422)
    assert len(stand.kept_calls) == 1


async def test_a_repetition_in_the_same_list_gets_the_same_job(client: httpx.AsyncClient, stand: Stand) -> None:
    repeated = job("four", idempotency_key="order-7")
    answers = (await client.post("/async/predict", json=[repeated, job("other"), repeated])).json()
    assert answers[0] == answers[2]
    assert answers[0] != answers[1]
    assert len({answer["job_id"] for answer in answers}) == 2


async def test_a_repetition_while_the_first_request_is_under_way_gets_the_same_job(
    client: httpx.AsyncClient, stand: Stand
) -> None:
    answers = []

    async def ask() -> None:
        answers.append(await client.post("/async/predict", json=job("four"), headers={"Idempotency-Key": "order-7"}))

    stand.carrier.hold()
    async with anyio.create_task_group() as task_group:
        task_group.start_soon(ask)
        task_group.start_soon(ask)
        await anyio.sleep(0.05)
        stand.carrier.release()
    assert answers[0].json() == answers[1].json()
    assert len(stand.kept_calls) == 1


async def test_a_repetition_while_another_container_has_the_first_request_may_come_again(
    client: httpx.AsyncClient, stand: Stand
) -> None:
    await stand.records.reserve(Reservation("order-7", "asked for elsewhere"))
    again = await client.post("/async/predict", json=job("four"), headers={"Idempotency-Key": "order-7"})
    assert "is under way; retry in a moment" in problem(again, 503)
    assert again.headers["retry-after"]


async def test_a_key_whose_job_the_engine_did_not_take_is_free_again(client: httpx.AsyncClient, stand: Stand) -> None:
    headers = {"Idempotency-Key": "order-7"}
    stand.carrier.faults.refuses_calls = True
    refused = await client.post("/async/predict", json=job("four"), headers=headers)
    assert "did not accept the call" in problem(refused, 503)
    stand.carrier.faults.refuses_calls = False
    assert (await client.post("/async/predict", json=job("four"), headers=headers)).status_code == 202


async def test_a_queue_that_is_not_allowed_is_refused_before_anything_is_called(
    client: httpx.AsyncClient, stand: Stand
) -> None:
    answer = await client.post("/async/predict", json=job("four", success_queue="other"))
    assert "success_queue: queue 'other' is not allowed; allowed are: ok, bad" in problem(answer, 422)
    slots = (await client.post("/async/predict", json=[job("four", failure_queue="other"), job("five!")])).json()
    assert slots[0]["error"].startswith("failure_queue: queue 'other' is not allowed")
    assert [len(call.entries) for call in stand.kept_calls] == [1]


async def test_the_priority_of_jobs_travels_with_them(client: httpx.AsyncClient, stand: Stand) -> None:
    answers = [
        await client.post("/async/predict", json=job("four"), headers=headers)
        for headers in ({}, {"X-Priority": "interactive"})
    ]
    assert [call.options.priority for call in stand.kept_calls] == ["bulk", "interactive"]
    jobs = [await found(client, answer.json()["job_id"], 30) for answer in answers]
    assert [ended["priority"] for ended in jobs] == ["bulk", "interactive"]


@pytest.mark.parametrize(
    ("method", "path", "remedy"),
    [
        ("GET", "/jobs", "the jobs cannot be listed"),
        ("DELETE", "/jobs?status=failed", "removes results by itself"),
        ("POST", "/jobs/replay", "submit the job again"),
        ("POST", "/jobs/fc-01J.0/replay", "submit the job again"),
    ],
)
async def test_what_an_engine_of_calls_cannot_do_is_refused_with_what_to_do_instead(
    client: httpx.AsyncClient, method: str, path: str, remedy: str
) -> None:
    assert remedy in problem(await client.request(method, path), 501)


async def test_metrics_tell_of_calls_and_of_no_store(client: httpx.AsyncClient) -> None:
    await client.post("/batch/predict", json=[{"text": "a"}, {"text": "b"}])
    answer = await client.get("/metrics")
    assert answer.status_code == 200
    lines = answer.text.splitlines()
    assert 'modalkit_model_ready{model="lengths"} 1.0' in lines
    assert 'modalkit_requests_total{model="lengths",outcome="succeeded"} 2.0' in lines
    assert not [
        line for line in lines if line.startswith(("modalkit_jobs", "modalkit_deliveries", "modalkit_job_store"))
    ]


async def test_a_frontend_is_ready_as_the_engine_starts_workers_when_they_are_needed(
    client: httpx.AsyncClient,
) -> None:
    assert (await client.get("/health/ready")).json() == {"status": "ready", "models": {"lengths": "ready"}}
    assert (await client.get("/openapi.json")).status_code == 200
