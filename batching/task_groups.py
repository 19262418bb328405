"""A task group that lets its block's own exception through as it was raised."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
from anyio.abc import TaskGroup


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
