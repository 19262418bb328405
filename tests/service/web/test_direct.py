"""Requests on the short way: what happens to one whose client leaves."""

import asyncio
import json

import anyio
import pytest
from fastapi import Request
from starlette.types import Message, Scope

from modalkit.service.web.admission import Admission, Reception
from modalkit.service.web.direct import PART_BYTES, list_response, while_connected
from modalkit.service.web.problems import ProblemError

pytestmark = pytest.mark.anyio


class Client:
    """A client that stays connected until it leaves."""

    def __init__(self) -> None:
        self.has_left = anyio.Event()
        self.request = Request({"type": "http", "headers": []}, self._receive)

    async def _receive(self) -> Message:
        await self.has_left.wait()
        return {"type": "http.disconnect"}


async def test_only_the_call_of_a_client_that_leaves_is_cancelled() -> None:
    """Also where the calls began at different times, and others had begun and ended before."""
    leaving, staying, answer = Client(), Client(), asyncio.Event()
    assert await while_connected(leaving.request, asyncio.sleep(0, "at once")) == "at once"
    others = [asyncio.create_task(while_connected(staying.request, answer.wait())) for _ in range(2)]
    await asyncio.sleep(0)
    call = asyncio.create_task(while_connected(leaving.request, asyncio.Event().wait()))
    leaving.has_left.set()
    with pytest.raises(ProblemError, match="the client has gone"):
        await call
    answer.set()
    assert await asyncio.gather(*others) == [True, True]


@pytest.mark.parametrize("count", [0, 1, 5])
async def test_a_long_list_is_sent_in_parts_between_which_others_have_their_turn(count: int) -> None:
    items, sent, turns = [json.dumps("x" * PART_BYTES).encode()] * count, list[Message](), list[int]()

    async def send(message: Message) -> None:
        sent.append(message)
        asyncio.get_running_loop().call_soon(turns.append, len(sent))

    scope: Scope = {"type": "http"}
    with Reception(Admission(), scope):
        await list_response(items)(scope, Client().request.receive, send)
    start, *parts = sent
    body = b"".join(part["body"] for part in parts)
    assert json.loads(body) == list(map(json.loads, items))
    assert dict(start["headers"])[b"content-length"] == str(len(body)).encode()
    assert [part.get("more_body", False) for part in parts] == [True] * count + [False]
    assert len(turns) >= count


async def test_a_call_that_something_else_cancels_is_cancelled() -> None:
    """It is no client that has gone: the cancellation is passed on."""
    call = asyncio.create_task(while_connected(Client().request, asyncio.Event().wait()))
    await asyncio.sleep(0)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
