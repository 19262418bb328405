"""Stops ``modalkit serve`` on signals: gently within a grace, or at once; and reloads the models on SIGHUP."""

import logging
import multiprocessing
import os
import signal
import sys
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NoReturn

import anyio
from anyio.abc import TaskGroup

from modalkit.service.cli.common import notices
from modalkit.service.errors import Readiness, ServiceError
from modalkit.service.jobs import JobStoreError
from modalkit.service.local_gateway import LocalGateway
from modalkit.service.serving import Server

logger = logging.getLogger(__name__)

EXIT_AT_ONCE = 1
"""The exit code where accepted requests may not have been finished."""
EXIT_BROKEN = 3
"""The exit code where a model broke down: a supervisor should start the process again."""
COUNTING_S = 2
"""Seconds within which the store must say how many jobs have not ended, when the service stops at once."""
CLOSING_S = 3
"""Seconds after the grace of open requests within which models and deliveries have to end."""


@dataclass
class Stop:
    """Stops on signals: on the first one finishes what was accepted, within `grace_s` seconds, on the second at once.

    Jobs that have not begun stay in the store. `is_durable` says whether it keeps them. On SIGHUP, the models are
    reloaded; where it comes because the terminal was closed, the service stops.
    """

    server: Server
    gateway: LocalGateway
    grace_s: float
    is_durable: bool
    is_stopping: bool = False
    reloading: anyio.Lock = field(default_factory=anyio.Lock)

    async def on_signals(self, background: TaskGroup) -> None:
        """Wait for signals, until cancelled; `background` outlasts this task."""
        had_terminal = os.isatty(0)
        with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals:
            async for number in signals:
                has_terminal = os.isatty(0)
                if number == signal.SIGHUP and (has_terminal or not had_terminal):
                    background.start_soon(self._reload)
                elif self.is_stopping:
                    await self.stop_now("Stopped at once.")
                else:
                    self.begin(background)

    async def _reload(self) -> None:
        """Reload the models one after the other; those that cannot be go on as they were."""
        async with self.reloading:  # a second signal may come after a second change of the configuration
            for name in self.gateway.models:
                try:
                    await self.gateway.reload(name)
                except Exception as error:  # a user's module may raise anything, and the service goes on
                    explained = isinstance(error, ServiceError)
                    logger.log(logging.ERROR, "Not reloaded: %s", error, exc_info=None if explained else error)
                else:
                    notices.print(f"{name} was reloaded.")

    def begin(self, background: TaskGroup) -> None:
        """Accept no more connections, and start no more jobs; stop at once after the grace."""
        self.is_stopping = True
        background.start_soon(self._after_grace)
        self.server.should_exit = True
        self.gateway.drain()

    async def _after_grace(self) -> None:
        await anyio.sleep(self.grace_s + CLOSING_S)
        await self.stop_now(f"Stopped at the end of the grace of {self.grace_s:g} s.")

    async def stop_now(self, how: str) -> NoReturn:
        """End the process, without any clean-up that may hang."""
        unfinished = await self._unfinished_jobs()
        summarize(self.gateway, at_once=True)
        fate = "kept, and run after the next start" if self.is_durable else "lost, as the store is in memory"
        notices.print(f"{how} {unfinished}{fate}." if unfinished else how)
        for child in multiprocessing.active_children():
            child.kill()  # conversions of models
        sys.stderr.flush()
        is_broken = any(model.readiness is Readiness.BROKEN for model in self.gateway.models.values())
        os._exit(EXIT_BROKEN if is_broken else EXIT_AT_ONCE)

    async def _unfinished_jobs(self) -> str:
        """How many jobs have not ended; empty for none."""
        with suppress(JobStoreError), anyio.move_on_after(COUNTING_S):
            counts = await self.gateway.jobs.counts()
            jobs = sum(count for status, count in counts.statuses.items() if not status.has_ended)
            return f"{jobs} job{'' if jobs == 1 else 's'} had not ended: " if jobs else ""
        return "Jobs that had not ended: "


def summarize(gateway: LocalGateway, *, at_once: bool) -> None:
    """Print what each model did."""
    for model_name, model in gateway.models.items():
        if (done := model.statistics()) is None:
            continue
        spread = ""
        if sizes := sorted(Counter(done.batch_sizes).elements()):
            spread = f" (middle half {sizes[len(sizes) // 4]} to {sizes[3 * len(sizes) // 4]}, largest {sizes[-1]})"
        ended_early = "stopped before their end" if at_once else "cancelled"
        notices.print(
            f"{model_name}: {done.succeeded} succeeded, {done.failed} failed, {done.expired} expired, "
            f"{done.cancelled} {ended_early}; {done.batches} batches, {done.mean_batch_size:.1f} items each on average"
            f"{spread}"
        )
