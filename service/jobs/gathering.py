"""Gathers what single events bring, so that it can be dealt with in one go."""

from typing import Generic, TypeVar

import anyio

T = TypeVar("T")


class Gathering(Generic[T]):
    """Items that come one by one and are taken all at once, by one task."""

    def __init__(self) -> None:
        self._items: list[T] = []
        self._change = anyio.Event()
        self._closed = False

    def add(self, *items: T) -> None:
        """Add items; returns at once."""
        self._items += items
        self._change.set()

    def close(self) -> None:
        """Add nothing more: once all has been taken, `take` returns an empty list."""
        self._closed = True
        self._change.set()

    async def take(self) -> list[T]:
        """Take all there are, once there are any. When cancelled, it takes none."""
        while not self._items and not self._closed:
            self._change = anyio.Event()
            await self._change.wait()
        items, self._items = self._items, []
        return items
