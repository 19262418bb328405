"""The HTTP client, on a real server with all its faults."""

import asyncio

import pytest

from modalkit.benchmarks.load.client import HttpTarget, Outcome, Places
from modalkit.benchmarks.load.endpoint import Endpoint

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def outcomes(url: str, times: int = 2, timeout_s: float = 10) -> list[Outcome]:
    target = HttpTarget(url=url, requests=Endpoint(url).requests([{"text": "a"}]), timeout_s=timeout_s)
    async with target.opened() as call:
        return [await call(index) for index in range(times)]


@pytest.mark.parametrize("path", ["/echo", "/chunked", "/close", "/200", "/204"])
async def test_each_kind_of_answer_is_read_to_its_end(server: str, path: str) -> None:
    assert await outcomes(server + path) == [1, 1]


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/503", "HTTP 503"),
        ("/404", "HTTP 404"),
        ("/cut", "ConnectionResetError: closed by the server"),
        ("/rubbish", "ConnectionError: the answer is not HTTP"),
    ],
)
async def test_what_fails_says_why_and_the_next_request_is_sent(server: str, path: str, reason: str) -> None:
    found = await outcomes(server + path)
    assert [str(outcome).startswith(reason) for outcome in found] == [True, True], found


async def test_a_request_without_an_answer_ends_with_its_time(server: str) -> None:
    assert await outcomes(server + "/hang", timeout_s=0.2) == ["no answer within 0.2 s"] * 2


async def test_a_name_that_is_none_is_no_connection() -> None:
    (found,) = await outcomes("http://no-such-host.invalid/", 1)
    assert str(found).startswith("no connection: gaierror")


async def test_bodies_are_kept_where_they_are_wanted(server: str) -> None:
    endpoint = Endpoint(f"{server}/echo")
    target = HttpTarget(url=endpoint.url, requests=endpoint.requests([{"a": 1}, {"a": 2}]), keeps_bodies=True)
    async with target.opened() as call:
        for index in range(3):
            await call(index)
    assert [(index, body) for index, _, body in call.kept] == [(0, b'{"a":1}'), (1, b'{"a":2}'), (0, b'{"a":1}')]


async def test_one_that_is_cancelled_as_its_turn_comes_passes_it_on() -> None:
    places = Places(1)
    await places.__aenter__()
    first, second = (asyncio.ensure_future(places.__aenter__()) for _ in range(2))
    await asyncio.sleep(0)
    await places.__aexit__()
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    await second
