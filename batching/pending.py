"""Requests together with the callers that wait for their outcomes."""

import asyncio
import math
from typing import Generic, TypeVar

from batching.request import Outcome, Priority, Request
from batching.wakeup import Wakeup

T = TypeVar("T")
R = TypeVar("R")


class Waiter(Wakeup):
    """Wakes one caller when all its requests have their outcomes. Times are those of the event loop's clock."""

    __slots__ = ("arrival_s", "deadline_s", "timeout_s", "unfinished")

    def __init__(self, loop: asyncio.AbstractEventLoop | None, arrival_s: float, timeout_s: float | None) -> None:
        super().__init__(loop)
        self.unfinished = 1
        self.arrival_s = arrival_s
        self.timeout_s = timeout_s
        self.deadline_s = math.inf if timeout_s is None else arrival_s + timeout_s

    def one_done(self) -> None:
        """Count one of the caller's requests as finished."""
        self.unfinished -= 1
        if not self.unfinished:
            self.set()


class Pending(Request[T], Generic[T, R]):
    """A request with the caller that waits for it; it has an outcome once it is finished."""

    __slots__ = ("outcome", "waiter")

    def __init__(self, payload: T, size: int, priority: Priority, waiter: Waiter) -> None:
        # Not by the base's constructor: one is made for every request, and this takes half the time.
        self.payload = payload
        self.size = size
        self.priority = priority
        self.arrival_s = waiter.arrival_s
        self.deadline_s = waiter.deadline_s
        self.place = 0
        self.waiter = waiter
        self.outcome: Outcome[R] | None = None
