"""Ray Serve's asynchronous inference: tasks by Celery. The option of the settings is the URL of a Redis server."""

import asyncio
import time
from typing import Any

import ray
from ray import serve
from ray.serve.schema import CeleryAdapterConfig, TaskProcessorConfig
from ray.serve.task_consumer import instantiate_adapter_from_config, task_consumer, task_handler
from starlette.requests import Request

from modalkit.benchmarks.peers.settings import Settings

settings = Settings.from_variable()
config = TaskProcessorConfig(
    queue_name="jobs", adapter_config=CeleryAdapterConfig(broker_url=settings.option, backend_url=settings.option)
)


@serve.deployment
@task_consumer(task_processor_config=config)
class Consumer:
    """Runs the tasks, one at a time."""

    def __init__(self, settings: Settings) -> None:
        from modalkit.benchmarks.peers.servers.pipeline import Model

        self._model = Model(settings)

    @task_handler(name="predict")
    def predict(self, body: dict[str, Any]) -> dict[str, Any]:
        """Run one task."""
        return self._model([body])[0]


@serve.deployment(max_ongoing_requests=1_000)
class Submitter:
    """Takes the jobs."""

    def __init__(self, consumer: Any) -> None:
        self._consumer = consumer
        self._tasks = instantiate_adapter_from_config(task_processor_config=config)

    async def __call__(self, request: Request) -> dict[str, str]:
        """Enqueue a job; other paths only tell that the server is there."""
        if request.url.path != "/jobs":
            return {}
        task = await asyncio.to_thread(self._tasks.enqueue_task_sync, "predict", [await request.json()])
        return {"task_id": task.id}


if __name__ == "__main__":
    ray.init(include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": settings.port})
    serve.run(Submitter.bind(Consumer.bind(settings)), route_prefix="/")
    while True:
        time.sleep(3600)
