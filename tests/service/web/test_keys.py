"""Several API keys: what each may do, whose jobs are whose, how much each may ask for, and where keys come from."""

import hashlib
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
from fastapi import Request
from fastapi.responses import PlainTextResponse

from modalkit.service.loading import LoadError
from modalkit.service.local_gateway import LocalGateway
from modalkit.service.queue_backends import InMemoryBackend
from modalkit.service.serving import listening
from modalkit.service.settings import AuthConfig, KeyConfig, KeyScope, Settings
from modalkit.service.web import auth as web_auth
from modalkit.service.web import create_app
from modalkit.service.web.auth import Caller, WrongKeys, caller_of, configured_keys, refuse_strangers
from modalkit.service.web.problems import ProblemError
from tests.support.guides import blocks, guide
from tests.support.http_client import assert_problem, ended, job
from tests.support.http_server import serving
from tests.support.length_model import LengthPipeline

pytestmark = pytest.mark.anyio

KEYS = {
    "shop": {"api_key": "s", "scopes": ["predict", "jobs"]},
    "blog": {"api_key": "b", "scopes": ["jobs"]},
    "prometheus": {"api_key": "p", "scopes": ["metrics"]},
    "boss": {"api_key": "a", "scopes": ["admin"]},
}


def sent(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


SHOP, BLOG, PROMETHEUS, BOSS = map(sent, "sbpa")


@asynccontextmanager
async def serving_keys(
    settings: Settings, gateway: LocalGateway | None = None, **auth: Any
) -> AsyncIterator[httpx.AsyncClient]:
    gateway = gateway or LocalGateway(settings, queue_backend=InMemoryBackend())
    async with gateway:
        await gateway.wait_until_ready()
        config = AuthConfig.model_validate({"keys": KEYS, **auth})
        async with serving(create_app(gateway, auth=config, owns_gateway=False)) as client:
            yield client


async def submit(client: httpx.AsyncClient, headers: dict[str, str], **fields: Any) -> str:
    answer = await client.post("/async/predict", json=job("four", **fields), headers=headers)
    assert answer.status_code == 202, answer.text
    return str(answer.json()["job_id"])


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("POST", "/sync/predict", [SHOP, BOSS]),
        ("POST", "/batch/predict", [SHOP, BOSS]),
        ("POST", "/async/predict", [SHOP, BLOG, BOSS]),
        ("GET", "/jobs", [SHOP, BLOG, BOSS]),
        ("GET", "/metrics", [PROMETHEUS, BOSS]),
    ],
)
async def test_a_key_may_do_what_its_scopes_say(
    settings: Settings, method: str, path: str, allowed: list[dict[str, str]]
) -> None:
    async with serving_keys(settings, open_metrics=False) as client:
        for headers in (SHOP, BLOG, PROMETHEUS, BOSS):
            answer = await client.request(method, path, headers=headers)
            if headers in allowed:
                assert answer.status_code not in (401, 403)
            else:
                assert "lacks the scope" in assert_problem(answer, 403)["detail"]
        for none in ({}, sent("x"), {"Authorization": "Basic s"}):
            assert_problem(await client.request(method, path, headers=none), 401)
        assert (await client.get("/health/live")).status_code == 200


async def test_the_one_key_goes_on_to_open_everything_beside_named_keys(settings: Settings) -> None:
    async with serving_keys(settings, api_key="one", open_metrics=False) as client:
        job_id = await submit(client, SHOP)
        assert (await client.get("/metrics", headers=sent("one"))).status_code == 200
        assert (await client.get(f"/jobs/{job_id}", headers=sent("one"))).json()["owner"] == "shop"
        own = await submit(client, sent("one"))
        assert_problem(await client.get(f"/jobs/{own}", headers=SHOP), 404)


async def test_the_job_of_another_key_is_as_one_that_does_not_exist(settings: Settings) -> None:
    async with serving_keys(settings) as client:
        job_id = await submit(client, SHOP)
        missing = assert_problem(await client.get("/jobs/missing", headers=BLOG), 404)["detail"]
        for method, path in (("GET", ""), ("GET", "?wait=60"), ("DELETE", ""), ("POST", "/replay")):
            answer = await client.request(method, f"/jobs/{job_id}{path}", headers=BLOG)
            assert assert_problem(answer, 404)["detail"] == missing.replace("missing", job_id)
        client.headers.update(SHOP)
        assert (await ended(client, job_id))["status"] == "succeeded"
        assert (await client.get(f"/jobs/{job_id}", headers=BOSS)).status_code == 200
        assert "not none" not in assert_problem(await client.post(f"/jobs/{job_id}/replay"), 409)["detail"]


async def test_a_key_lists_and_removes_its_own_jobs_and_an_admin_those_of_all(settings: Settings) -> None:
    async with serving_keys(settings) as client:
        jobs = {name: await submit(client, headers) for name, headers in (("shop", SHOP), ("blog", BLOG))}
        for job_id in jobs.values():
            await client.get(f"/jobs/{job_id}?wait=30", headers=BOSS)

        async def listed(headers: dict[str, str]) -> list[str]:
            return [found["job_id"] for found in (await client.get("/jobs", headers=headers)).json()["jobs"]]

        assert await listed(SHOP) == [jobs["shop"]]
        assert await listed(BLOG) == [jobs["blog"]]
        assert await listed(BOSS) == [jobs["blog"], jobs["shop"]]
        assert (await client.delete("/jobs?status=succeeded", headers=SHOP)).json() == {"purged": 1}
        assert await listed(BOSS) == [jobs["blog"]]
        assert (await client.delete("/jobs?status=succeeded", headers=BOSS)).json() == {"purged": 1}


async def test_an_idempotency_key_belongs_to_the_key_that_sent_it(settings: Settings) -> None:
    async with serving_keys(settings) as client:
        once = {"idempotency_key": "once"}
        first = await submit(client, SHOP, **once)
        assert await submit(client, SHOP, **once) == first
        assert await submit(client, BLOG, **once) != first
        other = await client.post("/async/predict", json=job("other", **once), headers=BLOG)
        assert first not in assert_problem(other, 422)["detail"]


async def test_a_route_of_its_own_requires_a_scope(settings: Settings) -> None:
    keys = configured_keys(AuthConfig.model_validate({"keys": KEYS}))
    app = create_app(LocalGateway(settings), auth=AuthConfig())

    @app.post("/admin/name", dependencies=keys.requires(KeyScope.ADMIN))
    async def name(request: Request) -> PlainTextResponse:
        return PlainTextResponse(caller_of(request).owner)

    async with serving(app) as client:
        assert (await client.post("/admin/name", headers=BOSS)).text == "boss"
        assert_problem(await client.post("/admin/name", headers=SHOP), 403)
        assert_problem(await client.post("/admin/name"), 401)
    assert configured_keys(AuthConfig()).requires(KeyScope.ADMIN) == []


async def test_a_key_has_no_more_requests_in_flight_than_it_may(settings: Settings) -> None:
    limited = {"shop": {**KEYS["shop"], "max_requests_in_flight": 2}, "blog": {**KEYS["shop"], "api_key": "b"}}
    answers: list[int] = []
    gateway = LocalGateway(settings)
    async with serving_keys(settings, gateway, keys=limited) as client:
        worker = gateway.models["lengths"].worker
        assert worker is not None
        assert isinstance(worker.pipeline, LengthPipeline)
        worker.pipeline.gate.clear()

        async def predict(headers: dict[str, str]) -> None:
            answer = await client.post("/sync/predict", json={"text": "four"}, headers=headers)
            answers.append(answer.status_code)

        async with anyio.create_task_group() as task_group:
            for _ in range(2):
                task_group.start_soon(predict, SHOP)
            while worker.statistics().accepted < 2:
                await anyio.sleep(0.001)
            refused = await client.post("/sync/predict", json={"text": "four"}, headers=SHOP)
            assert "2 requests in flight" in assert_problem(refused, 429)["detail"]
            assert refused.headers["retry-after"] == "1"
            task_group.start_soon(predict, BLOG)
            worker.pipeline.gate.set()
        assert answers == [200, 200, 200]
        for _ in range(5):  # also those that are refused, that fail, or that FastAPI answers, count once
            assert_problem(await client.post("/sync/predict", content=b"{", headers=SHOP), 400)
            assert_problem(await client.get("/jobs/x", headers=SHOP), 404)
            lines = b'{"message": {"text": "a"}}\n'
            types = {"Content-Type": "application/x-ndjson"}
            assert (await client.post("/async/predict", content=lines, headers=SHOP | types)).status_code == 200
        await predict(SHOP)
        assert answers[-1] == 200


def test_a_rate_is_held_on_average_and_says_when_to_come_again() -> None:
    now = [1000.0]
    config = KeyConfig.model_validate({"api_key": "k", "max_requests_per_second": 2, "max_items_per_second": 10})
    caller = Caller("k", config, lambda: now[0])

    def retry_after(ask: Any, *arguments: int) -> str | None:
        try:
            ask(*arguments)
        except ProblemError as error:
            return (error.headers or {})["Retry-After"]
        return None

    assert [retry_after(caller.enter) for _ in range(4)] == [None, None, None, "1"]
    now[0] += 0.5
    assert [retry_after(caller.enter) for _ in range(2)] == [None, "1"]
    # A list of any length is accepted; what follows waits until the rate holds again.
    assert [retry_after(caller.take_items, 100), retry_after(caller.take_items, 1)] == [None, "9"]
    now[0] += 9.0
    assert [retry_after(caller.take_items, 1), retry_after(caller.take_items, 1)] == [None, "1"]


async def test_a_stream_is_read_no_faster_than_items_may_come(monkeypatch: pytest.MonkeyPatch) -> None:
    now, naps = [0.0], list[float]()

    async def sleep(seconds: float) -> None:
        naps.append(seconds)
        now[0] += seconds

    monkeypatch.setattr(anyio, "sleep", sleep)
    config = KeyConfig.model_validate({"api_key": "k", "max_items_per_second": 10})
    caller = Caller("k", config, lambda: now[0])
    for _ in range(3):
        await caller.wait_for_items(50)
    assert naps == [4.0, 5.0]


async def test_limits_hold_over_http_for_lists_and_single_items(settings: Settings) -> None:
    limited = {"shop": {**KEYS["shop"], "max_items_per_second": 0.01}, "blog": {**KEYS["shop"], "api_key": "b"}}
    async with serving_keys(settings, keys=limited) as client:
        items = [{"text": "a"}, {"text": "b"}]
        assert (await client.post("/batch/predict", json=items, headers=SHOP)).status_code == 200
        for path, body in (("batch", items), ("sync", items[0]), ("async", job("a")), ("async", [job("a")])):
            refused = await client.post(f"/{path}/predict", json=body, headers=SHOP)
            assert "items per second" in assert_problem(refused, 429)["detail"]
            assert int(refused.headers["retry-after"]) > 100
        assert (await client.post("/batch/predict", json=items, headers=BLOG)).status_code == 200


async def test_an_address_with_many_wrong_keys_gets_429_and_right_keys_work_there(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web_auth, "WRONG_KEY_DELAY_S", 0.0)
    async with serving_keys(settings, max_wrong_keys_per_minute=2) as client:
        for _ in range(2):
            assert_problem(await client.get("/jobs", headers=sent("x")), 401)
        refused = await client.get("/jobs", headers=sent("x"))
        assert "too many wrong API keys" in assert_problem(refused, 429)["detail"]
        assert 0 < int(refused.headers["retry-after"]) <= 60
        assert (await client.get("/jobs", headers=SHOP)).status_code == 200


def test_wrong_keys_are_counted_by_the_minute_for_a_bounded_number_of_addresses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(web_auth, "MAX_ADDRESSES", 3)
    now = [1000.0]
    wrong = WrongKeys(1, lambda: now[0])
    assert [wrong.add("10.0.0.1"), wrong.add("10.0.0.1"), wrong.add("10.0.0.2")] == [0, 60, 0]
    now[0] += 20
    assert [wrong.add("2001:db8::1"), wrong.add("2001:db8::2"), wrong.add("10.0.0.1")] == [0, 40, 40]
    assert [wrong.add(f"10.0.1.{number}") for number in range(3)] == [0, 40, 40], "these are counted together"
    now[0] += 40
    assert [wrong.add("10.0.0.1"), wrong.add("10.0.1.2"), wrong.add("10.0.1.2")] == [0, 0, 60]
    mapped = WrongKeys(1, lambda: now[0])  # as on a socket for both versions of IP
    assert [mapped.add(f"::ffff:10.0.0.{number}") for number in (1, 2, 1)] == [0, 0, 60]
    unlimited = WrongKeys(None)
    assert [unlimited.add("") for _ in range(100)] == [0] * 100


async def test_keys_come_from_variables_files_and_as_hashes(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "blog.key").write_text("from a file\n")
    digest = hashlib.sha256(b"hashed").hexdigest()
    (tmp_path / "modalkit.yaml").write_text(f"""
app_settings:
  auth_config:
    keys:
      shop: {{max_requests_in_flight: 3}}
      blog: {{file: {tmp_path}/blog.key}}
      boss: {{api_key: "sha256:{digest}", scopes: [admin]}}
""")
    monkeypatch.setenv("MODALKIT_APP_SETTINGS__AUTH_CONFIG__KEYS__shop__API_KEY", "from a variable")
    auth = Settings.load([tmp_path / "modalkit.yaml"]).app_settings.auth_config
    async with serving(create_app(LocalGateway(settings), auth=auth)) as client:
        for key in ("from a variable", "from a file", "hashed"):
            assert (await client.get("/jobs", headers=sent(key))).status_code == 200
        for key in ("from a file\n", f"sha256:{digest}", digest, ""):
            answer = await client.get("/jobs", headers={b"authorization": b"Bearer " + key.encode().strip() + b"x"})
            assert_problem(answer, 401)


def test_the_configuration_of_the_guide_is_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (text,) = blocks(guide("keys.md"), "yaml")
    (tmp_path / "modalkit.yaml").write_text(text)
    monkeypatch.setenv("MODALKIT_APP_SETTINGS__AUTH_CONFIG__KEYS__operator__API_KEY", "k")
    auth = Settings.load([tmp_path / "modalkit.yaml"]).app_settings.auth_config
    assert auth.asks_for_key
    assert auth.uses_ssm
    assert {name: key.scopes for name, key in auth.keys.items()}["operator"] == [KeyScope.ADMIN]


def test_only_hashes_of_keys_are_kept() -> None:
    keys = configured_keys(AuthConfig(api_key="s3cret", keys={"a": {"api_key": "0ther"}}))
    kept = list(vars(keys).values())
    for held in kept:
        kept += [*held, *held.values()] if isinstance(held, dict) else []
        kept += list(vars(held).values()) if isinstance(held, Caller) else []
    assert hashlib.sha256(b"s3cret").digest() in kept
    assert not any("s3cret" in repr(held) or "0ther" in repr(held) for held in kept)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"a": {"api_key": "k"}, "b": {"api_key": "k"}}, r"keys\.b\.api_key: another name has the same key"),
        ({"a": {"api_key": "two\nlines"}}, r"keys\.a\.api_key: it has a line break"),
        ({"a": {"api_key": "sha256:two"}}, r"keys\.a\.api_key: it begins with sha256: and is no hash: give the 64 "),
        ({"a": {"api_key": f"sha256:{'2' * 63}"}}, r"keys\.a\.api_key: it begins with sha256: and is no hash"),
        ({"a": {}}, r"keys\.a: has no key: give it in one of api_key \(or MODALKIT_\w+__KEYS__a__API_KEY\), file and"),
        ({"a": {"file": "/nowhere/key"}}, r"keys\.a\.file: /nowhere/key cannot be read: No such file"),
    ],
)
def test_a_key_that_cannot_be_used_is_refused_by_its_name(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(LoadError, match=said) as refused:
        configured_keys(AuthConfig.model_validate({"keys": keys}))
    assert not any(part in str(refused.value) for part in ("two", "222"))


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_nothing_is_served_to_other_machines_without_a_key(host: str) -> None:
    with listening(host, 0) as listener:
        with pytest.raises(LoadError, match=r"api_key .*, or listen on 127\.0\.0\.1; .*--insecure") as refused:
            refuse_strangers(AuthConfig(), listener)
        assert host in str(refused.value)
        refuse_strangers(AuthConfig(insecure=True), listener)
        refuse_strangers(AuthConfig(api_key="k"), listener)
        refuse_strangers(AuthConfig.model_validate({"keys": KEYS}), listener)


def test_this_machine_needs_no_key(tmp_path: Path) -> None:
    for host in ("127.0.0.1", "localhost", "::1"):
        with listening(host, 0) as listener:
            refuse_strangers(AuthConfig(), listener)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        refuse_strangers(AuthConfig(), listener)
