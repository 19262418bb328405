"""The pipeline that every server runs, modalkit's own included, except Infinity, which has its own code."""

from typing import Any

from pydantic import BaseModel

from modalkit.benchmarks.peers.servers.poison import POISON
from modalkit.benchmarks.peers.settings import Settings
from modalkit.pipelines.sentiment import SentimentPipeline, SentimentRequest


class PoisonedError(ValueError):
    """Raised when a batch has the poisoned text in it."""


class Sentiment(SentimentPipeline):
    """The bundled pipeline, in which one text makes the whole batch fail."""

    def predict(self, input_list: list[BaseModel], preprocessed_data: dict[str, Any]) -> dict[str, Any]:
        """Run the model. Raises `PoisonedError` for a batch with the text `POISON`."""
        if any(self.to_text(item) == POISON for item in input_list):
            raise PoisonedError(POISON)
        return super().predict(input_list, preprocessed_data)


class Model:
    """What the servers call: bodies of requests in, bodies of answers out."""

    def __init__(self, settings: Settings) -> None:
        common = {"device": "cpu", "threads": settings.threads}
        entry = {"model_path": "bundled", "engine": settings.engine, "dtype": settings.dtype}
        self._pipeline = Sentiment("sentiment", ".", common, **entry)

    def __call__(self, bodies: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Run one batch."""
        items: list[BaseModel] = [SentimentRequest.model_validate(body) for body in bodies]
        return [output.model_dump() for output in self._pipeline.run_inference(items)]
