"""Ends what a client asked for when the client goes away."""

from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import TypeVar

from fastapi import Request

from modalkit.batching.task_groups import plain_task_group
from modalkit.service.web.problems import ProblemError

T = TypeVar("T")


async def while_connected(request: Request, call: Callable[[], Awaitable[T]]) -> T:
    """Await a call; when the client goes away, cancel it, so that what waits in a queue for it leaves the queue."""
    async with plain_task_group() as task_group:

        async def watch() -> None:
            # The body has been read, so the only message left to come says that the client has gone.
            while (await request.receive())["type"] != "http.disconnect":
                pass
            task_group.cancel_scope.cancel()

        task_group.start_soon(watch)
        result = await call()
        task_group.cancel_scope.cancel()
        return result
    raise ProblemError(HTTPStatus.REQUEST_TIMEOUT, "the client has gone")
