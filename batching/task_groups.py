"""Keeps what goes wrong in one task from being taken for something else in another."""

import asyncio
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from typing import TypeVar

import anyio
from anyio.abc import TaskGroup

from modalkit.batching.errors import BatchingError

T = TypeVar("T")


@asynccontextmanager
async def plain_task_group() -> AsyncIterator[TaskGroup]:
    """Like `anyio.create_task_group`, but an exception of the block alone is not wrapped in a group.

    Whoever uses an object with a task group inside writes ``except ValueError``, and need not know what is inside.
    """
    raised: BaseException | None = None
    try:
        async with anyio.create_task_group() as task_group:
            try:
                yield task_group
            except BaseException as error:
                raised = error
                raise
    except BaseExceptionGroup as group:
        if raised is not None and group.exceptions == (raised,):
            raise raised from raised.__cause__
        raise


async def without_foreign_cancellation(awaitable: Awaitable[T]) -> T:
    """Await a user's code, and turn a cancellation that nobody asked this task for into a `BatchingError`.

    Code that awaits an asyncio task which somebody else cancelled raises what would end our own task in silence.
    """
    try:
        return await awaitable
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise BatchingError("it was cancelled by something inside it") from error
