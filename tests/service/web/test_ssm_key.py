"""API keys from AWS SSM, on moto's server."""

import asyncio
import math
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass

import anyio
import anyio.lowlevel
import httpx
import pytest
from aiobotocore.session import get_session  # type: ignore[import-untyped]  # ships no types
from fastapi import FastAPI
from fastapi.responses import JSONResponse

from modalkit.service.loading import LoadError
from modalkit.service.local_gateway import LocalGateway
from modalkit.service.settings import AuthConfig, Settings
from modalkit.service.web import create_app, ssm_key
from modalkit.service.web.ssm_key import SsmKey, key_digest
from tests.support.http_client import assert_problem
from tests.support.http_server import serving
from tests.support.sqs_server import REGION, SqsServer, forget_aws_settings

pytestmark = pytest.mark.anyio

NAME = "/keys/modalkit"
AUTH = AuthConfig(ssm_key=NAME)

Put = Callable[..., Awaitable[None]]


@dataclass(frozen=True)
class Nap:
    is_over: anyio.Event
    seconds: float


class Time:
    """Passes when the test says so."""

    def __init__(self) -> None:
        self.now = 0.0
        self.naps = asyncio.Queue[Nap]()

    async def wait(self, wanted: anyio.Event, seconds: float) -> None:
        self.naps.put_nowait(Nap(wanted, seconds))
        await wanted.wait()

    async def refresh(self) -> float:
        """End the wait, wait until the next one has begun, and give its length."""
        (await self.naps.get()).is_over.set()
        nap = await self.naps.get()
        self.naps.put_nowait(nap)
        return nap.seconds


@pytest.fixture(scope="module")
def module_server() -> Iterator[SqsServer]:
    server = SqsServer()
    server.start()
    yield server
    server.stop()


@pytest.fixture
def server(module_server: SqsServer, monkeypatch: pytest.MonkeyPatch) -> SqsServer:
    """A server that the environment says to use."""
    forget_aws_settings(monkeypatch)
    monkeypatch.setenv("AWS_ENDPOINT_URL_SSM", module_server.url)
    monkeypatch.setenv("AWS_REGION", REGION)
    return module_server


@pytest.fixture
async def put(server: SqsServer) -> AsyncIterator[Put]:
    """Gives the parameter a value; it is deleted at the end."""
    async with get_session().create_client("ssm", region_name=REGION, endpoint_url=server.url) as client:

        async def put(value: str, kind: str = "SecureString") -> None:
            await client.put_parameter(Name=NAME, Value=value, Type=kind, Overwrite=True)
            server.requests.clear()

        yield put
        await client.delete_parameters(Names=[NAME])


@pytest.fixture
async def client(settings: Settings, put: Put) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a service whose key, in SSM, is "first"."""
    await put("first")
    gateway = LocalGateway(settings)
    async with gateway:
        await gateway.wait_until_ready()
        async with serving(create_app(gateway, auth=AUTH, owns_gateway=False)) as client:
            yield client


async def call(client: httpx.AsyncClient, key: str) -> httpx.Response:
    return await client.post("/sync/predict", json={"text": "four"}, headers={"Authorization": f"Bearer {key}"})


async def test_a_caller_with_the_key_gets_in_and_costs_aws_nothing(
    server: SqsServer, client: httpx.AsyncClient
) -> None:
    for _ in range(3):
        assert (await call(client, "first")).status_code == 200
    assert (await client.get("/jobs", headers={"Authorization": "Bearer first"})).status_code == 200
    assert_problem(await client.post("/sync/predict", json={"text": "four"}), 401)
    assert server.requests == ["GetParameter"]


async def test_a_changed_key_works_at_once_and_the_old_one_no_longer(client: httpx.AsyncClient, put: Put) -> None:
    await put("second")
    assert (await client.get("/jobs", headers={"Authorization": "Bearer second"})).status_code == 200
    refused = await call(client, "first")
    assert "the API key is wrong" in assert_problem(refused, 401)["detail"]
    assert "second" not in refused.text


async def test_a_flood_of_wrong_keys_reads_the_parameter_once(
    server: SqsServer, client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ssm_key, "WRONG_KEY_INTERVAL_S", math.inf)
    assert (await call(client, "first")).status_code == 200  # the key was read
    server.requests.clear()
    statuses: list[int] = []

    async def guess(number: int) -> None:
        statuses.append((await call(client, f"guess-{number}")).status_code)

    async with anyio.create_task_group() as task_group:
        for number in range(50):
            task_group.start_soon(guess, number)
    assert statuses == [401] * 50
    assert server.requests == ["GetParameter"]
    assert (await call(client, "first")).status_code == 200


async def test_a_wrong_name_fails_at_the_start_before_anything_is_served(server: SqsServer, settings: Settings) -> None:
    app = create_app(LocalGateway(settings), auth=AUTH)
    with pytest.raises(LoadError, match=r"app_settings\.auth_config\.ssm_key: parameter '/keys/modalkit'"):
        async with app.router.lifespan_context(app):
            pytest.fail("it was served")


async def test_no_request_gets_in_where_the_server_skipped_the_start(settings: Settings, put: Put) -> None:
    await put("first")
    app = create_app(LocalGateway(settings), auth=AUTH)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        assert "lifespan" in assert_problem(await call(client, "first"), 503)["detail"]
        assert_problem(await client.post("/sync/predict", json={"text": "four"}), 503)


async def test_the_key_is_read_again_every_refresh_seconds(put: Put) -> None:
    await put("first")
    time = Time()
    key = SsmKey(NAME, refresh_s=60, clock=lambda: time.now, wait=time.wait)
    async with key.opened():
        assert key.digest == key_digest("first")
        await put("second\n")
        assert await time.refresh() == 60
        assert key.digest == key_digest("second")


async def test_the_last_key_stays_valid_while_aws_cannot_be_reached(
    server: SqsServer, put: Put, caplog: pytest.LogCaptureFixture
) -> None:
    await put("first")
    time = Time()
    key = SsmKey(NAME, refresh_s=60, clock=lambda: time.now, wait=time.wait)
    async with key.opened():
        server.stop()
        try:
            waits_s = [await time.refresh() for _ in range(5)]
        finally:
            server.start()
        assert key.digest == key_digest("first")
        assert 0 < waits_s[0] < waits_s[1] < waits_s[2] < waits_s[4] == 60
        assert caplog.text.count("the last one stays valid") == 5
        assert "first" not in caplog.text
        await put("second")
        assert await time.refresh() == 60
        assert key.digest == key_digest("second")


async def test_a_parameter_that_is_spoilt_later_leaves_the_last_key_valid(
    put: Put, caplog: pytest.LogCaptureFixture
) -> None:
    await put("first")
    time = Time()
    key = SsmKey(NAME, clock=lambda: time.now, wait=time.wait)
    async with key.opened():
        await put(" ")
        assert await time.refresh() < 300
        assert key.digest == key_digest("first")
        assert "it is empty" in caplog.text


async def test_a_wrong_key_has_the_parameter_read_every_few_seconds_at_most(server: SqsServer, put: Put) -> None:
    await put("first")
    time = Time()
    key = SsmKey(NAME, clock=lambda: time.now, wait=time.wait)
    async with key.opened():
        await put("second")
        await key.refresh()
        assert key.digest == key_digest("second")
        await put("third")
        for time.now in (0.0, ssm_key.WRONG_KEY_INTERVAL_S - 0.1):
            await key.refresh()
            assert key.digest == key_digest("second")
        assert server.requests == []
        time.now = ssm_key.WRONG_KEY_INTERVAL_S
        await key.refresh()
        assert key.digest == key_digest("third")
    await key.refresh()
    assert server.requests == ["GetParameter"]


async def test_a_request_that_is_cancelled_leaves_the_reading_to_the_others(server: SqsServer, put: Put) -> None:
    await put("first")
    key = SsmKey(NAME)
    async with key.opened():
        await put("second")
        with anyio.CancelScope() as scope:
            scope.cancel()
            await key.refresh()
        assert scope.cancelled_caught
        assert key.digest == key_digest("first")
        await key.refresh()
        assert key.digest == key_digest("second")
        assert server.requests == ["GetParameter"]


async def test_who_waits_for_a_reading_is_let_go_at_the_end(put: Put) -> None:
    await put("first")
    key = SsmKey(NAME)
    with anyio.fail_after(60):
        async with anyio.create_task_group() as task_group:
            async with key.opened():
                task_group.start_soon(key.refresh)
                await anyio.lowlevel.checkpoint()


async def opened_once(key: SsmKey) -> None:
    async with key.opened():
        pass


@pytest.mark.parametrize(
    ("value", "kind", "message"),
    [
        (" ", "String", "it is empty"),
        ("a,b", "StringList", "it is a StringList; make it a SecureString"),
        ("a\nb", "SecureString", "it has a line break"),
    ],
)
async def test_a_parameter_that_is_no_key_is_refused_by_name(put: Put, value: str, kind: str, message: str) -> None:
    await put(value, kind)
    with pytest.raises(LoadError, match=f"ssm_key: parameter '{NAME}' of AWS SSM in {REGION}: {message}"):
        await opened_once(SsmKey(NAME))


async def test_a_parameter_that_does_not_exist_is_refused_by_name(server: SqsServer) -> None:
    with pytest.raises(LoadError, match=rf"parameter '{NAME}' .* ParameterNotFound: .*; create it in this region, or"):
        await opened_once(SsmKey(NAME))


@pytest.mark.parametrize(
    ("code", "said", "remedy"),
    [
        (
            "AccessDeniedException",
            "User: arn:aws:iam::123456789012:user/a is not authorized to perform: ssm:GetParameter",
            "allow ssm:GetParameter on it, and kms:Decrypt",
        ),
        (
            "UnrecognizedClientException",
            "The security token included in the request is invalid.",
            "give AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
        ),
        ("InvalidKeyId", "The key is disabled.", ""),
    ],
)
async def test_what_aws_refuses_is_told_with_a_remedy(
    server: SqsServer, monkeypatch: pytest.MonkeyPatch, code: str, said: str, remedy: str
) -> None:
    """With answers in the form of AWS's own: moto's, without permission, are of another protocol."""
    app = FastAPI()

    @app.post("/")
    async def answer() -> JSONResponse:
        return JSONResponse({"__type": code, "message": said}, 400, media_type="application/x-amz-json-1.1")

    async with serving(app) as aws:
        monkeypatch.setenv("AWS_ENDPOINT_URL_SSM", str(aws.base_url))
        with pytest.raises(LoadError) as refused:
            await opened_once(SsmKey(NAME))
    assert f"parameter '{NAME}' of AWS SSM in {REGION}: AWS answers {code}: {said.rstrip('.')}" in str(refused.value)
    assert remedy in str(refused.value)


async def test_missing_credentials_say_which_to_give(server: SqsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name)
    with pytest.raises(LoadError, match=r"ssm_key: .* credentials; give AWS_ACCESS_KEY_ID"):
        await opened_once(SsmKey(NAME))


async def test_half_of_the_credentials_is_not_enough(server: SqsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(LoadError, match=r"ssm_key: .*Partial credentials .*; give AWS_ACCESS_KEY_ID"):
        await opened_once(SsmKey(NAME))


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9", "nonsense"])
async def test_an_endpoint_that_does_not_answer_fails_the_start(
    server: SqsServer, monkeypatch: pytest.MonkeyPatch, endpoint: str
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_SSM", endpoint)
    with pytest.raises(LoadError, match=f"ssm_key: parameter '{NAME}' .*{endpoint}"):
        await opened_once(SsmKey(NAME))


async def test_the_region_of_the_settings_goes_first(server: SqsServer, put: Put) -> None:
    await put("first")
    await opened_once(SsmKey(NAME, region=REGION))
    with pytest.raises(LoadError, match="in eu-west-1: AWS answers ParameterNotFound"):
        await opened_once(SsmKey(NAME, region="eu-west-1"))


def test_without_a_region_the_error_comes_at_once(server: SqsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_REGION")
    with pytest.raises(LoadError, match=r"set app_settings\.auth_config\.ssm_region or the variable AWS_REGION"):
        SsmKey(NAME)


def test_without_the_library_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "aiobotocore.session", None)
    with pytest.raises(LoadError, match=r"ssm_key needs aiobotocore .*pip install .*/.+\[aws\]'"):
        SsmKey(NAME)


def test_it_does_not_run_on_trio(server: SqsServer) -> None:
    with pytest.raises(LoadError, match="asyncio"):
        anyio.run(opened_once, SsmKey(NAME), backend="trio")
