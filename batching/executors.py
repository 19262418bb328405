"""All executors of one function: as many for each device as batches may run at once."""

import inspect
import logging
import math
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Generic, TypedDict, TypeVar

import anyio

from modalkit.batching.execution import DeviceUse, Executor, Preparation
from modalkit.batching.stages import RunBatch
from modalkit.batching.task_groups import await_users_code

logger = logging.getLogger(__name__)

MAX_CLOSE_S = 10.0
"""Seconds that `on_close` may take; then it goes on in its thread."""
STUCK_SHARE = 0.5
"""Of that time: how long batches that were given up are waited for before, because they may still run."""

T = TypeVar("T")
R = TypeVar("R")


class RunOptions(TypedDict, total=False):
    """How batches run: arguments of a `BatchScheduler`, beside the function that runs them."""

    max_in_flight: int
    """Batches that run at once on each device, 1 by default; overlapping ones count as one."""
    batch_timeout_s: float | None
    """Seconds that a batch may take. One that takes longer runs again item by item, and an item that takes as long
    alone fails with `BatchTimeoutError`. A synchronous function goes on in its thread, and its result is dropped."""
    preparations: Sequence[Preparation | None]
    """How each device gets ready to run batches, such as by a new start of its process; None for always ready."""
    on_close: Callable[[], object] | None
    """Called once, after the last batch and in its thread, and awaited if it is asynchronous; its errors are logged.
    A batch that was given up, and still runs, is waited for, but not for long."""


class Executors(Generic[T, R]):
    """The executors of a function, or of one for each device: warmed up, paused and closed together.

    Raises `ValueError` for an option out of range.
    """

    def __init__(
        self,
        run_batch: RunBatch[T, R] | Sequence[RunBatch[T, R]],
        name: str,
        *,
        max_in_flight: int = 1,
        batch_timeout_s: float | None = None,
        preparations: Sequence[Preparation | None] | None = None,
        on_close: Callable[[], object] | None = None,
    ) -> None:
        if max_in_flight < 1:
            raise ValueError(f"max_in_flight must be at least 1, got {max_in_flight!r}")
        if batch_timeout_s is not None and batch_timeout_s <= 0:
            raise ValueError(f"batch_timeout_s must be positive or None, got {batch_timeout_s!r}")
        devices = run_batch if isinstance(run_batch, Sequence) else [run_batch]
        self.devices = len(devices)
        """The number of devices."""
        self.max_in_flight = max_in_flight
        self.on_close = on_close
        self._before: list[Executor[T, R]] = []  # of the same pipeline, whose calls may still run
        self._name = name
        timeout_s = math.inf if batch_timeout_s is None else batch_timeout_s
        uses = [None if each is None else DeviceUse(each) for each in preparations or [None] * len(devices)]
        self._executors: list[Executor[T, R]] = [
            Executor(run, timeout_s, f"{name} {device * max_in_flight + i}", device, use, rank=i)
            for device, (run, use) in enumerate(zip(devices, uses, strict=True))
            for i in range(max_in_flight)
        ]

    def __iter__(self) -> Iterator[Executor[T, R]]:
        return iter(self._executors)

    def __len__(self) -> int:
        return len(self._executors)

    @property
    def stuck_threads(self) -> int:
        """Calls that ran past the batch timeout and have not returned; each holds a thread."""
        return sum(executor.stuck_threads for executor in (*self._before, *self))

    def first_of(self, device: int) -> Executor[T, R]:
        """The first executor of a device."""
        return next(executor for executor in self if executor.device == device)

    async def warm_up(self, functions: Sequence[Callable[[], object]]) -> None:
        """Call a function for each device in a thread of it, and await what it returns. Raises what it raises."""
        for device, function in enumerate(functions):
            result = await self.first_of(device).run_while_paused(function, None)
            if isinstance(result, Awaitable):
                await await_users_code(result)

    @asynccontextmanager
    async def paused(self) -> AsyncGenerator[None]:
        """Wait until no batch is in any stage, and let none start in the block."""
        async with AsyncExitStack() as paused:
            for executor in self:
                await paused.enter_async_context(executor.paused())
            yield

    def take_over(self, before: "Executors[T, R]") -> None:
        """Call the `on_close` of those before, unless these have one: both run the same pipeline then."""
        if self.on_close is None:
            self.on_close, before.on_close = before.on_close, None
            earlier = (*before._before, *before)  # noqa: SLF001  # of its own class
            self._before = [each for each in earlier if each.stuck_threads or not each.has_ended.is_set()]

    async def close(self) -> None:
        """Call `on_close` in a thread, await what it returns, and end the threads. An error is logged."""
        try:
            if (on_close := self.on_close) is not None:
                with anyio.fail_after(MAX_CLOSE_S, shield=True):
                    async with self.paused():
                        result = await self.first_of(0).run_while_paused(
                            partial(self._close_after_stuck, on_close), None
                        )
                    if inspect.isawaitable(result):
                        await await_users_code(result)
        except Exception:
            logger.exception("%s: closing failed; what it holds may not be free", self._name)
        finally:
            self.end_threads()

    def _close_after_stuck(self, on_close: Callable[[], object]) -> object:
        """Call `on_close` once the batches that were given up have ended; those that hang are not waited for long."""
        until_s = time.monotonic() + STUCK_SHARE * MAX_CLOSE_S
        for executor in (*self._before, *self):
            executor.wait_for_stuck(until_s)
        return on_close()

    def end_threads(self) -> None:
        """End the threads after their current calls."""
        for executor in self:
            executor.close()
