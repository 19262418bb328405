"""Pipelines that do nothing, to measure everything except the model."""

import threading
from typing import Any, ClassVar

from pydantic import BaseModel

from modalkit.pipelines import InferenceOutputModel, InferencePipeline


class Text(BaseModel):
    """A text to classify."""

    text: str


class NothingPipeline(InferencePipeline):
    """Answers every item with a success and nothing else."""

    input_model: ClassVar[type[BaseModel]] = Text

    def preprocess(self, input_list: list[BaseModel]) -> dict[str, Any]:  # noqa: ARG002  # part of the interface
        """Prepare nothing."""
        return {}

    def predict(self, input_list: list[BaseModel], preprocessed_data: dict[str, Any]) -> dict[str, Any]:  # noqa: ARG002
        """Compute nothing."""
        return {}

    def postprocess(self, input_list: list[BaseModel], raw_output: dict[str, Any]) -> list[InferenceOutputModel]:  # noqa: ARG002
        """Return an output for each item."""
        return [InferenceOutputModel() for _ in input_list]


class NeverPipeline(NothingPipeline):
    """Returns nothing until `released` is set, which may be never, so that requests and jobs only wait."""

    released: ClassVar[threading.Event] = threading.Event()

    def predict(self, input_list: list[BaseModel], preprocessed_data: dict[str, Any]) -> dict[str, Any]:  # noqa: ARG002
        """Wait."""
        self.released.wait()
        return {}
