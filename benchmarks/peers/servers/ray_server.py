"""Ray Serve."""

import time
from typing import Any

import ray
from ray import serve
from starlette.requests import Request

from modalkit.benchmarks.peers.settings import Settings

MAX_ONGOING_REQUESTS = 1_000
"""Requests that a replica holds; Ray's default of 5 would limit the batches."""

settings = Settings.from_variable()


@serve.deployment(num_replicas=settings.workers, max_ongoing_requests=MAX_ONGOING_REQUESTS)
class Sentiments:
    """The model behind Ray Serve's interface."""

    def __init__(self, settings: Settings) -> None:
        from modalkit.benchmarks.peers.servers.pipeline import Model

        self._model = Model(settings)

    @serve.batch(max_batch_size=settings.batch, batch_wait_timeout_s=settings.wait_ms / 1000)
    async def run_batch(self, bodies: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Run one batch, in the replica's thread for user code, as Ray's own examples do."""
        return self._model(bodies)

    async def __call__(self, request: Request) -> dict[str, Any]:
        """Answer one request."""
        answer: dict[str, Any] = await self.run_batch(await request.json())
        return answer


if __name__ == "__main__":
    ray.init(include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": settings.port})
    application = Sentiments.bind(settings)  # type: ignore[attr-defined]  # the decorator adds it
    serve.run(application, route_prefix="/predict")
    while True:
        time.sleep(3600)
