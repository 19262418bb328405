"""BentoML: its adaptive batching, and jobs by its tasks."""

from typing import Any

import bentoml

from modalkit.benchmarks.peers.settings import Settings

TIMEOUT_S = 60
settings = Settings.from_variable()
LIMITS = {"batchable": True, "max_batch_size": settings.batch, "max_latency_ms": settings.wait_ms}


@bentoml.service(workers=settings.workers, traffic={"timeout": TIMEOUT_S})
class Sentiments:
    """The model behind BentoML's interface; a request has a list of inputs."""

    def __init__(self) -> None:
        from modalkit.benchmarks.peers.servers.pipeline import Model

        self._model = Model(settings)

    @bentoml.api(route="/predict", **LIMITS)
    def predict(self, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Run one batch."""
        return self._model(inputs)

    @bentoml.task(route="/jobs", **LIMITS)
    def predict_later(self, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Run one batch of tasks."""
        return self._model(inputs)
