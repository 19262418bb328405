"""Requests together with what waits for their outcomes."""

import asyncio
import logging
import math
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

import anyio

from modalkit.batching.errors import number_text, text_of
from modalkit.batching.request import LARGEST_SIZE, Outcome, Priority, Request
from modalkit.batching.wakeup import Wakeup

logger = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")


class Waiter(Wakeup):
    """Wakes one caller when all its requests have their outcomes. Times are those of the event loop's clock."""

    __slots__ = ("arrival_s", "deadline_s", "owner", "tag", "unfinished")

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop | None,
        arrival_s: float,
        timeout_s: float | None,
        owner: str,
        tag: str | None,
    ) -> None:
        # It does not call the base's constructor, for the same reason as `Pending`.
        if loop is None:
            self._future, self._event = None, anyio.Event()
        else:
            self._future = loop.create_future()
        self.unfinished = 1
        self.owner = owner
        self.tag = tag
        self.arrival_s = arrival_s
        self.deadline_s = math.inf if timeout_s is None else arrival_s + timeout_s

    def end_one(self) -> None:
        """Count one of the caller's requests as finished; after the last one, wake the caller."""
        self.unfinished -= 1
        if not self.unfinished:
            self.set()


class Listener(Generic[R]):
    """Calls a function with the outcome of one request, in place of a caller that waits."""

    __slots__ = ("_on_outcome", "arrival_s", "deadline_s", "owner", "request", "tag")

    def __init__(self, on_outcome: Callable[[Outcome[R]], None], arrival_s: float, owner: str, tag: str | None) -> None:
        self._on_outcome: Callable[[Outcome[R]], None] | None = on_outcome
        self.arrival_s = arrival_s
        self.deadline_s = math.inf
        self.owner = owner
        self.tag = tag
        self.request: Pending[Any, R] | None = None

    def stop(self) -> None:
        """Do not call the function from now on."""
        self._on_outcome = None

    def end_one(self) -> None:
        """Call the function with the outcome; an exception of the function is logged."""
        if self.request is None or self.request.outcome is None:
            raise AssertionError("a request ended without an outcome: this is a bug in modalkit")
        outcome, self.request = self.request.outcome, None  # so that listener and request do not refer to each other
        if self._on_outcome is None:
            return
        try:
            self._on_outcome(outcome)
        except Exception:
            logger.exception("A function that was called with the outcome of a request failed")


class Withdraw(Protocol):
    """Withdraws a request: its listener is not called any more."""

    def __call__(self, *, only_waiting: bool = False) -> bool:
        """Withdraw it; with `only_waiting`, not if it runs or has ended. Returns whether it was withdrawn."""
        ...


class Pending(Request[T], Generic[T, R]):
    """A request with the waiter or listener that gets its outcome; `outcome` is None until it is finished."""

    __slots__ = ("outcome", "waiter")

    def __init__(self, payload: T, size: int, priority: Priority, waiter: Waiter | Listener[R]) -> None:
        # It does not call the base's constructor: one is made for each request, and this takes half the time.
        self.payload = payload
        self.size = size
        self.priority = priority
        self.arrival_s = waiter.arrival_s
        self.deadline_s = waiter.deadline_s
        self.owner = waiter.owner
        self.sequence = 0
        self.waiter = waiter
        self.outcome: Outcome[R] | None = None


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
        except (Exception, SystemExit) as error:  # noqa: BLE001  # user code; an item without a size still runs
            self._warn(f"raised {text_of(error)}; the item counts as 1")
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
