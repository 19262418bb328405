"""Handles what comes more than once for a job only once, by its job_id."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from redis.asyncio import Redis
from redis.asyncio.lock import Lock
from redis.exceptions import RedisError

LOCKED_S = 30.0  # how long the lock of a worker that died keeps others from the job
REMEMBERED_S = 7 * 24 * 3600


@asynccontextmanager
async def once(redis: Redis, job_id: str) -> AsyncIterator[bool]:
    """True for the first message of a job; False if an earlier one was handled without an error.

    Waits while another worker handles one: that may fail, or its worker die.
    """
    async with redis.lock(f"running:{job_id}", LOCKED_S, sleep=LOCKED_S / 30, raise_on_release_error=False) as lock:
        first = not await redis.exists(f"handled:{job_id}")
        renewing = asyncio.create_task(_renew(lock))
        try:
            yield first
            if first:
                await redis.set(f"handled:{job_id}", "done", ex=REMEMBERED_S)
        finally:
            renewing.cancel()


async def _renew(lock: Lock) -> None:
    while True:
        await asyncio.sleep(LOCKED_S / 3)
        with suppress(RedisError):  # Redis is away: the next time, maybe
            await lock.reacquire()
