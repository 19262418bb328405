"""Tasks for a worker under test, which tells a Redis list what they did."""

import json
import os

import anyio
from redis.asyncio import Redis

from modalkit.service.queue_backends.taskiq import make_taskiq_broker
from tests.support.taskiq_worker import DONE, HANG

broker = make_taskiq_broker(
    os.environ["REDIS_URL"], os.environ["QUEUES"].split(","), idle_timeout_s=float(os.environ["IDLE_TIMEOUT_S"])
)


async def tell(text: str) -> None:
    async with Redis.from_url(os.environ["REDIS_URL"]) as redis:
        await redis.rpush(DONE, text)


@broker.task(task_name="process_results")
async def process_results(message: str) -> None:
    await tell(message)
    if json.loads(message) == HANG and os.environ.get("HANGS"):
        await anyio.sleep_forever()


@broker.task(task_name="process_errors")
async def process_errors(message: str) -> None:
    await tell(message)
