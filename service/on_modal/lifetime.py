"""Holds a context open between the hooks of a Modal class."""

import asyncio
import logging
from contextlib import AbstractAsyncContextManager
from typing import Generic, TypeVar

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Lifetime(Generic[T]):
    """Enters a context in one hook and leaves it in another.

    Modal runs each hook as a task of its own, and a task group has to be left by the task that entered it. So one task
    of ours does both, and lives in between. It is the only one without an owner: Modal's hooks leave nothing else.
    """

    def __init__(self, context: AbstractAsyncContextManager[T]) -> None:
        self._context = context
        self._leave = asyncio.Event()
        self._entered: asyncio.Future[T] | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def is_over(self) -> bool:
        """Whether the context was left, or broke down."""
        return self._task is None or self._task.done()

    async def start(self) -> T:
        """Enter the context, and return what it gives. Raises what entering it raises."""
        self._entered = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._own(self._entered), name="modalkit")
        try:
            return await self._entered
        except BaseException:
            self._task.cancel()
            await asyncio.wait([self._task])
            raise

    async def stop(self, grace_s: float) -> bool:
        """Leave the context, cut short after `grace_s` seconds. Returns whether that was enough."""
        if self._task is None:
            return True
        self._leave.set()
        _, unfinished = await asyncio.wait([self._task], timeout=grace_s)
        if unfinished:
            self._task.cancel()
            await asyncio.wait([self._task])
        if not self._task.cancelled() and (error := self._task.exception()) is not None:
            logger.error("The worker ended with an error", exc_info=error)
        return not unfinished

    async def _own(self, entered: "asyncio.Future[T]") -> None:
        try:
            async with self._context as value:
                entered.set_result(value)
                await self._leave.wait()
        except BaseException as error:
            # A cancellation that came from inside too, or whoever starts this would wait for ever.
            if entered.done():
                raise
            entered.set_exception(error)
