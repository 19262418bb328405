"""A model that is quick and predictable: it measures texts, and fails on demand."""

import threading
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from modalkit.pipelines import InferenceOutputModel, InferencePipeline

POISON = "poison"
REJECTED = "rejected"


class Text(BaseModel):
    model_config = ConfigDict(extra="forbid")

    text: str = Field(min_length=1, max_length=1000)


class Length(InferenceOutputModel):
    length: int


class LengthPipeline(InferencePipeline):
    """Answers with the length of each text.

    A batch with the text `POISON` raises, the text `REJECTED` is answered with an error. `batches` has the texts of
    every call; calls wait while `gate` is cleared, and `entered` counts those that have begun.
    """

    input_model: ClassVar[type[BaseModel]] = Text
    output_model: ClassVar[type[InferenceOutputModel]] = Length

    def __init__(
        self,
        model_name: str = "lengths",
        all_model_data_folder: str = ".",
        common_settings: dict[str, Any] | None = None,
        **model_entry: Any,
    ) -> None:
        super().__init__(model_name, all_model_data_folder, common_settings or {}, **model_entry)
        self.batches: list[list[str]] = []
        self.entered = threading.Semaphore(0)
        self.gate = threading.Event()
        self.gate.set()

    def preprocess(self, input_list: list[BaseModel]) -> dict[str, Any]:
        return {"texts": [item.text for item in input_list if isinstance(item, Text)]}

    def predict(self, input_list: list[BaseModel], preprocessed_data: dict[str, Any]) -> dict[str, Any]:
        texts = preprocessed_data["texts"]
        self.batches.append(texts)
        self.entered.release()
        self.gate.wait(timeout=60)
        if POISON in texts:
            raise ValueError("this batch is poisoned")
        return {"texts": texts}

    def postprocess(self, input_list: list[BaseModel], raw_output: dict[str, Any]) -> list[InferenceOutputModel]:
        return [
            InferenceOutputModel(status="error", error="rejected by the model")
            if text == REJECTED
            else Length(length=len(text))
            for text in raw_output["texts"]
        ]

    def item_size(self, item: BaseModel) -> int:
        return len(item.text) if isinstance(item, Text) else 1

    def sample_items(self, n: int, size: int) -> list[BaseModel]:
        return [Text(text="x" * min(size, 1000))] * n


class UnloadablePipeline(LengthPipeline):
    """Cannot be constructed."""

    def __init__(self, *args: Any, **model_entry: Any) -> None:
        raise RuntimeError("the weights are not there")
