"""Collects items that come one by one, for a task that handles many at once."""

from typing import Generic, TypeVar

import anyio

T = TypeVar("T")


class Collector(Generic[T]):
    """Items that are added one by one and collected all together, by one task."""

    def __init__(self) -> None:
        self._items: list[T] = []
        self._change = anyio.Event()
        self._closed = False

    def add(self, *items: T) -> None:
        """Add items; returns at once."""
        self._items += items
        self._change.set()

    def close(self) -> None:
        """Nothing more will be added: `collect` returns an empty list once all has been collected."""
        self._closed = True
        self._change.set()

    async def collect(self) -> list[T]:
        """Wait until there are items, and return all of them. When cancelled, the items stay."""
        while not self._items and not self._closed:
            self._change = anyio.Event()
            await self._change.wait()
        items, self._items = self._items, []
        return items
