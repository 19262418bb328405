"""The baseline for requests and durable jobs: the least that a FastAPI service can do with the same requests.

`app` validates and stores nothing; with ``BENCHMARK_REDIS_URL`` it sends each item as a TaskIQ task, one by one.
"""

import os
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from modalkit.benchmarks.nothing import Text
from modalkit.pipelines import AsyncInputModel, AsyncOutputModel, InferenceOutputModel

QUEUE = "results"


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """With a Redis server, the task that ``/send`` sends, over connections that are closed at the end."""
    url = os.environ.get("BENCHMARK_REDIS_URL")
    if url is None:
        yield
        return
    from taskiq_redis import RedisStreamBroker

    broker = RedisStreamBroker(url, queue_name="bare", max_connection_pool_size=128)

    @broker.task(task_name=f"process_{QUEUE}")
    async def process(message: str) -> None:
        """Do nothing: no worker runs this task."""

    app.state.process = process
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
    await app.state.process.kiq(request.model_dump_json())
    return AsyncOutputModel(job_id=job_id)
