"""Keeps exceptions and cancellation of one task apart from those of other tasks."""

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
    """Like `anyio.create_task_group`, but an exception of the block alone is not wrapped in an exception group.

    So a user of an object that has a task group inside can write ``except ValueError``.
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
    """Await a user's code; raise a `BatchingError` if it is cancelled though this task is not.

    Code that awaits an asyncio task which other code cancelled raises `CancelledError`. That would end our own task
    without a message.
    """
    try:
        return await awaitable
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise BatchingError("it was cancelled by something inside it") from error


def is_cancellation(error: BaseException) -> bool:
    """Whether an error is the cancellation of a task, or a group that has one: it must go on to the scope's owner."""
    cancelled = anyio.get_cancelled_exc_class()
    in_group = isinstance(error, BaseExceptionGroup) and error.subgroup(cancelled) is not None
    return in_group or isinstance(error, cancelled)
