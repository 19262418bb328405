"""Collects items that come one by one, so that one task can store many of them in one step."""

import logging
import math
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

import anyio

from modalkit.service.backoff import backoff_with_jitter
from modalkit.service.jobs.errors import JobStoreError

logger = logging.getLogger(__name__)

STORE_RETRY_S = 5.0
"""Maximum seconds until a store that failed is asked again."""
MIN_INTERVAL_S = 0.005
"""Minimum seconds between two collections."""

T = TypeVar("T")


class Collector(Generic[T]):
    """Items that are added one by one and collected all together, by one task."""

    def __init__(self) -> None:
        self._items: list[T] = []
        self._change = anyio.Event()
        self._closed = False
        self._collected_s = -math.inf

    def add(self, *items: T) -> None:
        """Add items; returns at once."""
        self._items += items
        self._change.set()

    def close(self) -> None:
        """Nothing more will be added: `collect` returns an empty list once all has been collected."""
        self._closed = True
        self._change.set()

    async def collect(self) -> list[T]:
        """Wait until there are items, and return all of them. When cancelled, the items stay.

        While items keep coming, it returns at most once in `MIN_INTERVAL_S`, so that many are stored in one step.
        """
        if self._items and (pause_s := self._collected_s + MIN_INTERVAL_S - anyio.current_time()) > 0:
            await anyio.sleep(pause_s)
        while not self._items and not self._closed:
            self._change = anyio.Event()
            await self._change.wait()
        items, self._items = self._items, []
        self._collected_s = anyio.current_time()
        return items


async def store_until_closing(what: str, store: Callable[[], Awaitable[None]], closing: anyio.Event) -> None:
    """Await `store`, and repeat it with backoff while it raises `JobStoreError`.

    Once `closing` is set, an error is not followed by another attempt. Each error is logged in a line that begins with
    `what`.
    """
    attempt = 1
    while True:
        try:
            return await store()
        except JobStoreError:
            logger.exception("%s could not be stored", what)
            if closing.is_set():
                return None
        with anyio.move_on_after(backoff_with_jitter(attempt, first_s=0.1, longest_s=STORE_RETRY_S, factor=2)):
            await closing.wait()
        attempt += 1
