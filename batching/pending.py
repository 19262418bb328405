"""Requests together with what waits for their outcomes."""

import logging
import math
from asyncio import InvalidStateError
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

from modalkit.batching.errors import number_text, text_of, users_error
from modalkit.batching.request import LARGEST_SIZE, Outcome, Priority, Request
from modalkit.batching.wakeup import Future, wake

logger = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")
R_contra = TypeVar("R_contra", contravariant=True)


class Receiver(Protocol[R_contra]):
    """What gets the outcome of a request: a future, or what acts as one."""

    def set_result(self, result: Outcome[R_contra], /) -> None:
        """Take the outcome; called once. Raises `asyncio.InvalidStateError` if the task that waits was cancelled."""
        ...


class Group:
    """Wakes one caller, who awaits `finished`, when all its requests have their outcomes."""

    __slots__ = ("finished", "unfinished")

    def __init__(self, finished: Future[None]) -> None:
        self.finished = finished
        self.unfinished = 0

    def set_result(self, _: Outcome[Any]) -> None:
        """Count one of the requests as finished; after the last one, wake the caller."""
        self.unfinished -= 1
        if not self.unfinished:
            wake(self.finished)


class Listener(Generic[R]):
    """Calls a function with the outcome of a request, in place of a caller that waits."""

    __slots__ = ("_on_outcome",)

    def __init__(self, on_outcome: Callable[[Outcome[R]], None]) -> None:
        self._on_outcome: Callable[[Outcome[R]], None] | None = on_outcome

    def stop(self) -> None:
        """Do not call the function from now on."""
        self._on_outcome = None

    def set_result(self, outcome: Outcome[R]) -> None:
        """Call the function; an exception that it raises is logged."""
        if self._on_outcome is None:
            return
        try:
            self._on_outcome(outcome)
        except BaseException as error:
            failed = "A function that was called with the outcome of a request failed"
            logger.exception(failed, exc_info=users_error(error))


class Withdraw(Protocol):
    """Withdraws a request: its listener is not called any more."""

    def __call__(self, *, only_waiting: bool = False) -> bool:
        """Withdraw it; with `only_waiting`, not if it runs or has ended. Returns whether it was withdrawn."""
        ...


class Pending(Request[T], Generic[T, R]):
    """A request with what gets its outcome; `outcome` is None until it is finished."""

    __slots__ = ("outcome", "receiver", "tag")

    def __init__(
        self,
        payload: T,
        size: int,
        priority: Priority,
        arrival_s: float,
        deadline_s: float,
        owner: str,
        tag: str | None,
        receiver: Receiver[R],
    ) -> None:
        # It does not call the base's constructor: one is made for each request, and this takes half the time.
        self.payload = payload
        self.size = size
        self.priority = priority
        self.arrival_s = arrival_s
        self.deadline_s = deadline_s
        self.owner = owner
        self.sequence = 0
        self.tag = tag
        self.receiver = receiver
        self.outcome: Outcome[R] | None = None

    def finish(self, outcome: Outcome[R]) -> None:
        """Hand out the outcome of a request that has none."""
        self.outcome = outcome
        try:  # noqa: SIM105  # one is made for each request, and `suppress` takes longer than all the rest
            self.receiver.set_result(outcome)
        except InvalidStateError:
            pass  # the task that waits was cancelled just now


class ItemSizes(Generic[T]):
    """Measures payloads by a user's function. If it fails, the nearest valid size counts, and one warning is logged."""

    def __init__(self, item_size: Callable[[T], int], name: str) -> None:
        self._item_size = item_size
        self._name = name
        self._has_warned = False

    def of(self, payload: T) -> int:
        """The size of a payload, from 1 to `LARGEST_SIZE`."""
        try:
            size = math.ceil(self._item_size(payload))
        except BaseException as error:  # noqa: BLE001  # user code; an item without a size still runs
            self._warn(f"raised {text_of(users_error(error))}; the item counts as 1")
            return 1
        if 1 <= size <= LARGEST_SIZE:
            return size
        clamped = min(max(1, size), LARGEST_SIZE)
        self._warn(f"returned {number_text(size)}; the item counts as {clamped}")
        return clamped

    def _warn(self, what: str) -> None:
        if not self._has_warned:
            logger.warning(
                "%s: item_size %s. Batches form badly like this; only this first case is logged", self._name, what
            )
            self._has_warned = True
