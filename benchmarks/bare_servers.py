"""The baseline for requests and durable jobs: the least that a FastAPI service can do with the same requests.

`app` validates and stores nothing; with ``BENCHMARK_REDIS_URL`` it sends each item as a TaskIQ task, one by one.
"""

import os
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from taskiq_redis import RedisStreamBroker

from modalkit.benchmarks.nothing import Text
from modalkit.pipelines import AsyncInputModel, AsyncOutputModel, InferenceOutputModel

REDIS_URL = os.environ.get("BENCHMARK_REDIS_URL", "redis://localhost:6379")
QUEUE = "results"

broker = RedisStreamBroker(REDIS_URL, queue_name="bare", max_connection_pool_size=128)


@broker.task(task_name=f"process_{QUEUE}")
async def process(message: str) -> None:
    """Do nothing: no worker runs this task."""


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    """Close the broker's connections at the end."""
    yield
    await broker.shutdown()


app = FastAPI(lifespan=lifespan)


@app.post("/echo")
async def echo(request: Text) -> InferenceOutputModel:  # noqa: ARG001  # only its parsing is measured
    """Validate, and answer as a pipeline that does nothing."""
    return InferenceOutputModel()


@app.post("/validate", status_code=202)
async def validate(request: AsyncInputModel[Text]) -> AsyncOutputModel:  # noqa: ARG001  # only its parsing is measured
    """Validate, and store nothing."""
    return AsyncOutputModel(job_id=str(uuid.uuid4()))


@app.post("/send", status_code=202)
async def send(request: AsyncInputModel[Text]) -> AsyncOutputModel:
    """Validate, and send a task."""
    job_id = str(uuid.uuid4())
    await process.kiq(request.model_dump_json())
    return AsyncOutputModel(job_id=job_id)
