"""The metrics of processes that no scraper can reach: each publishes its own, and any frontend shows them all."""

import logging
import os
import socket
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager

import anyio

from modalkit.batching.task_groups import plain_task_group
from modalkit.service.calls.engine import KeyValueStore
from modalkit.service.jobs import JobStoreError

logger = logging.getLogger(__name__)

PUBLISH_INTERVAL_S = 15.0
STALE_S = 90.0
"""Seconds after which what a process published is forgotten: it has ended."""
READ_TIMEOUT_S = 5.0
LAST_TIMEOUT_S = 2.0
"""Seconds that a process which ends may take to publish its last metrics."""


class PublishedMetrics:
    """Texts in Prometheus's format in a key-value store of their own, by the id of the process that wrote them."""

    def __init__(
        self, store: KeyValueStore, *, process_id: str | None = None, clock: Callable[[], float] = time.time
    ) -> None:
        self.process_id = process_id or os.environ.get("MODAL_TASK_ID") or f"{socket.gethostname()}-{os.getpid()}"
        self._store = store
        self._clock = clock

    async def publish(self, text: str) -> None:
        """Replace what this process published. What fails is logged."""
        try:
            await self._store.put(self.process_id, (self._clock(), text))
        except JobStoreError as error:
            logger.warning("The metrics of this process could not be published: %s", error)

    async def with_own(self, text: str) -> dict[str, str]:
        """The texts of all processes; `text` is this one's. Those of others are missing where they cannot be read."""
        found: dict[str, str] = {}
        try:
            with anyio.fail_after(READ_TIMEOUT_S):
                items = await self._store.items()
                stale_before = self._clock() - STALE_S
                found = {
                    key: published for key, (published_at, published) in items.items() if published_at >= stale_before
                }
                for process_id in items.keys() - found.keys():
                    await self._store.remove(process_id)
        except (JobStoreError, TimeoutError) as error:
            logger.warning("The metrics of other processes could not all be read, or forgotten: %s", error)
        return {**found, self.process_id: text}

    @asynccontextmanager
    async def publishing(self, text: Callable[[], Awaitable[str]]) -> AsyncGenerator[None]:
        """Publish `text` every 15 seconds while the context is open, and once more at its end."""

        async def publish_forever() -> None:
            while True:
                await self.publish(await text())
                await anyio.sleep(PUBLISH_INTERVAL_S)

        async with plain_task_group() as task_group:
            task_group.start_soon(publish_forever)
            try:
                yield
            finally:
                task_group.cancel_scope.cancel()
                with anyio.move_on_after(LAST_TIMEOUT_S, shield=True):
                    await self.publish(await text())
