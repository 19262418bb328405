"""Keeps exceptions and cancellation of one task apart from those of other tasks."""

from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from typing import TypeVar

import anyio
from anyio.abc import TaskGroup

from modalkit.batching.errors import users_error

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


async def await_users_code(awaitable: Awaitable[T]) -> T:
    """Await users' code. All that it raises is an `Exception`, by the rule of `users_error`."""
    try:
        return await awaitable
    except Exception:
        raise
    except BaseException as error:
        raise users_error(error) from error
