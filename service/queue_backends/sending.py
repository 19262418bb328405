"""Sends many messages through any queue backend: in one call where it has `send_messages`, else concurrently."""

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, TypeVar

import anyio
from anyio.lowlevel import current_token

from modalkit.batching.task_groups import await_users_code
from modalkit.service.errors import describe_value
from modalkit.service.queue_backends.protocol import (
    BatchQueueBackend,
    NotSentError,
    QueueBackend,
    QueueBackendError,
    QueueMessage,
    id_of_text,
)

logger = logging.getLogger(__name__)

SEND_TIMEOUT_S = 30.0
"""Seconds after which an attempt to deliver messages has failed."""
ATTEMPT_S = 25.0  # less than that, so that the outcomes beside a message that hangs are not lost

T = TypeVar("T")


class _Connection:
    """A connection in one event loop, opened by the first call of `get` that succeeds."""

    def __init__(self, connect: Callable[[AsyncExitStack], Awaitable[Any]]) -> None:
        self.event_loop = current_token()
        self._connect = connect
        self._lock = anyio.Lock(fast_acquire=True)
        self._stack = AsyncExitStack()
        self._opened: Any = None
        self._closed = False

    async def get(self) -> Any:
        async with self._lock:
            if self._closed:
                raise NotSentError("the backend was closed while the message waited to be sent")
            if self._opened is None:
                self._stack = AsyncExitStack()
                self._opened = await self._connect(self._stack)
            return self._opened

    async def aclose(self) -> None:
        self._closed = True
        async with self._lock:
            await self._stack.aclose()


class ConnectedBackend(ABC):
    """A queue backend that sends many messages, over a connection that belongs to one event loop until `aclose`."""

    _needs_asyncio = False
    _stays_in_one_loop = False  # whether `aclose` leaves it bound to its event loop
    _current: _Connection | None = None  # all mutable state

    @abstractmethod
    async def _connect(self, stack: AsyncExitStack) -> Any:
        """Open a connection; `aclose` closes `stack`, that of the last attempt, also if it failed."""

    @abstractmethod
    async def send_messages(self, messages: Sequence[QueueMessage]) -> list[Exception | None]:
        """Send messages; returns the outcome of each. Raises `QueueBackendError`."""

    async def send_message(self, queue_name: str, message: str) -> bool:
        """Send a JSON text. Raises `QueueBackendError`."""
        [outcome] = await self.send_messages([QueueMessage(queue_name, message, id_of_text(message))])
        if outcome is not None:
            raise outcome
        return True

    async def aclose(self) -> None:
        """Close the connection, in the event loop that opened it; messages being sent fail. Idempotent."""
        if self._current is not None:
            connection = self._connection()
            self._current = _Connection(self._connect) if self._stays_in_one_loop else None
            with anyio.CancelScope(shield=True):
                await connection.aclose()

    def _connection(self) -> _Connection:
        name = type(self).__name__
        if self._current is None:
            if self._needs_asyncio and anyio.get_cancelled_exc_class() is not asyncio.CancelledError:
                raise QueueBackendError(f"{name} needs the event loop of asyncio; it does not run on trio")
            self._current = _Connection(self._connect)
        if self._current.event_loop != current_token():
            remedy = "make" if self._stays_in_one_loop else "await its aclose() there, or make"
            raise QueueBackendError(f"this {name} was opened in another event loop: {remedy} one for each")
        return self._current


async def send_all(
    backend: QueueBackend,
    messages: Sequence[QueueMessage],
    *,
    max_concurrent: int = 100,  # as many as a delivery holds, so that no message waits for another one
    timeout_s: float = ATTEMPT_S,
) -> list[Exception | None]:
    """Send messages; returns, in the same order, None for each accepted message and an error for each other one.

    An exception of the backend's `send_messages` is the error of every message. For a backend that has `send_message`
    alone, `max_concurrent` limits the concurrent calls, and `timeout_s` the seconds of each. A cancelled call may have
    sent any of the messages.
    """
    if not messages:
        return []
    if not isinstance(backend, BatchQueueBackend):

        async def send(message: QueueMessage) -> None:
            taken = await backend.send_message(message.queue_name, message.body)
            if taken is None:
                name = type(backend).__name__
                raise QueueBackendError(
                    f"{name}.send_message returned None; it must return True for a message that it took, else False"
                )
            if not taken:
                raise QueueBackendError("the backend did not take the message")

        return await outcomes_of(send, messages, anyio.CapacityLimiter(max_concurrent), timeout_s)

    async def send_together() -> list[Exception | None]:
        return _checked(backend, messages, await backend.send_messages(messages))

    try:
        return await await_users_code(send_together())
    except Exception as error:  # noqa: BLE001  # a backend may raise anything; the caller logs and retries
        return [error] * len(messages)


async def outcomes_of(
    send: Callable[[QueueMessage], Awaitable[None]],
    messages: Sequence[QueueMessage],
    limiter: anyio.CapacityLimiter,
    timeout_s: float = ATTEMPT_S,
) -> list[Exception | None]:
    """Await `send` for each message, concurrently within `limiter`; its exception is the message's outcome.

    A message that takes longer than `timeout_s`, not counting the wait for the limiter, gets a `QueueBackendError`.
    """
    outcomes: list[Exception | None] = [QueueBackendError("it was not attempted")] * len(messages)

    async def attempt(position: int, message: QueueMessage) -> None:
        async with limiter:
            with anyio.move_on_after(timeout_s) as scope:
                try:
                    await await_users_code(send(message))
                    outcomes[position] = None
                except Exception as error:  # noqa: BLE001  # one message's failure is no other's
                    outcomes[position] = error
            if scope.cancelled_caught:
                outcomes[position] = QueueBackendError(f"no answer within {timeout_s:g} s")

    async with anyio.create_task_group() as task_group:
        for position, message in enumerate(messages):
            task_group.start_soon(attempt, position, message)
    return outcomes


@asynccontextmanager
async def hold(limiter: anyio.CapacityLimiter, wait_s: float, problem: str) -> AsyncIterator[None]:
    """Hold a token of `limiter`; raises `NotSentError` with the text `problem` after `wait_s` seconds without."""
    try:
        limiter.acquire_nowait()
    except anyio.WouldBlock:
        with anyio.move_on_after(wait_s) as waiting:
            await limiter.acquire()
        if waiting.cancelled_caught:
            raise NotSentError(problem) from None
    try:
        yield
    finally:
        limiter.release()


def _checked(backend: QueueBackend, messages: Sequence[QueueMessage], outcomes: object) -> list[Exception | None]:
    if not isinstance(outcomes, Sequence):
        problem = describe_value(outcomes)
    elif len(outcomes) != len(messages):
        problem = f"{len(outcomes)} outcomes for {len(messages)} messages"
    elif wrong := [outcome for outcome in outcomes if not (outcome is None or isinstance(outcome, Exception))]:
        problem = f"{describe_value(wrong[0])} as an outcome"
    else:
        return list(outcomes)
    raise QueueBackendError(
        f"{type(backend).__name__}.send_messages returned {problem}; it must return a sequence with one outcome for "
        "each message, in their order: None for a message that was taken, and else an exception"
    )


async def close_backend(backend: QueueBackend | None) -> None:
    """Close a backend that can be closed. An error is logged: everything that needed the backend is done."""
    aclose = getattr(backend, "aclose", None)
    if aclose is not None:
        try:
            await await_users_code(aclose())
        except Exception:
            logger.exception("The queue backend could not be closed")
