"""What is done with the results: ``taskiq worker tasks:broker`` runs these tasks."""

import json
import os

from once import once
from redis.asyncio import Redis
from taskiq import SmartRetryMiddleware, TaskiqMiddleware, TaskiqScheduler
from taskiq.exceptions import NoResultError
from taskiq.serializers import JSONSerializer
from taskiq_redis import ListRedisScheduleSource

from modalkit.task_queue import make_taskiq_broker

REDIS_URL = os.environ.get("REDIS_URL", "redis://localhost:6379")

redis = Redis.from_url(REDIS_URL)
# Where retries wait. Its own serializer would be pickle, which runs what anybody puts into Redis.
retries = ListRedisScheduleSource(REDIS_URL, prefix="retries", serializer=JSONSerializer())


class DeadLetters(TaskiqMiddleware):
    """Keeps what failed for good; TaskIQ itself only logs it."""

    async def on_error(self, message, result, exception):
        if not isinstance(result.error, NoResultError):  # which means that it will be tried again
            await redis.xadd("dead_letters", {"message": message.args[0], "error": repr(exception)})


broker = make_taskiq_broker(REDIS_URL, ["word_counts", "word_count_errors"]).with_middlewares(
    DeadLetters(),  # before the retries: the last one in the list is asked first
    SmartRetryMiddleware(schedule_source=retries, default_delay=1, use_delay_exponent=True, use_jitter=True),
)
scheduler = TaskiqScheduler(broker, [retries])


@broker.task(task_name="process_word_counts", retry_on_error=True, max_retries=3)
async def process_word_counts(message: str) -> None:
    job = json.loads(message)
    async with once(redis, job["job_id"]) as first:
        if first:
            words, user = job["result"]["words"], job["meta"].get("user_id", "unknown")
            if words > 1000:
                raise ValueError(f"{words} words are too many for us")
            await redis.hincrby("words_by_user", user, words)


@broker.task(task_name="process_word_count_errors")
async def process_word_count_errors(message: str) -> None:
    job = json.loads(message)
    await redis.hset("errors_by_job", job["job_id"], job["error"])
