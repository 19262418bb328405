"""The sentiment pipeline, for any sequence-classification model of the transformers library."""

from typing import Any, ClassVar

import torch
from pydantic import BaseModel, Field
from torch import nn

from modalkit.pipelines.classifier_settings import ClassifierEntry
from modalkit.pipelines.engines import Same, same_labels
from modalkit.pipelines.iomodel import InferenceOutputModel
from modalkit.pipelines.loading import TEXT_CLASSIFICATION
from modalkit.pipelines.texts import TextRequest, Truncated
from modalkit.pipelines.transformer_pipeline import TransformerPipeline

COMMON_LABELS = frozenset({"positive", "neutral", "negative"})


class SentimentRequest(TextRequest):
    """One text to judge."""

    scores: bool = Field(default=False, description="Whether the answer has the probability of each label.")


class SentimentResponse(InferenceOutputModel):
    """The sentiment of one text."""

    sentiment: str = Field(description="The model's most probable label: positive, neutral or negative.")
    confidence: float = Field(ge=0, le=1, description="That label's probability.")
    scores: dict[str, float] | None = Field(
        default=None,
        exclude_if=lambda scores: scores is None,
        description="The probability of each label, where the request asks for `scores`.",
    )
    truncated: Truncated = False


class SentimentPipeline(TransformerPipeline[ClassifierEntry]):
    """Classifies texts with a transformers model, by default the bundled one (``model_path: bundled``).

    `TransformerPipeline` has the keys of its entry.
    """

    input_model: ClassVar[type[BaseModel]] = SentimentRequest
    output_model: ClassVar[type[InferenceOutputModel]] = SentimentResponse
    task = TEXT_CLASSIFICATION
    entry_model = ClassifierEntry

    def prepare(self) -> nn.Module:
        """Read the labels of the model."""
        names = self.checkpoint.labels
        self.labels = [name.lower() if name.lower() in COMMON_LABELS else name for name in names]
        self._multi_label = self.checkpoint.model.config.problem_type == "multi_label_classification"
        return self.checkpoint.model

    def same(self) -> Same:
        """Engines must agree on the labels, and nearly on the confidences."""
        return same_labels(self._engine_settings.sameness, probabilities=self._probabilities)

    def predict(
        self,
        input_list: list[BaseModel],  # noqa: ARG002  # part of the interface
        preprocessed_data: dict[str, Any],
    ) -> dict[str, Any]:
        """Run the model: ``probabilities`` of shape (batch, labels), float32 on the CPU."""
        with torch.inference_mode():
            probabilities = self._probabilities(self._engine(**preprocessed_data["tensors"])["logits"])
        return {"probabilities": probabilities.cpu(), "truncated": preprocessed_data["truncated"]}

    def postprocess(
        self,
        input_list: list[BaseModel],
        raw_output: dict[str, Any],
    ) -> list[InferenceOutputModel]:
        """The most probable label of each text, and the probabilities of all where its item has true `scores`.

        It uses numpy, because a reduction by torch in a second thread would start more OpenMP threads. With more of
        them than cores, libgomp sleeps between parallel regions instead of spinning, and `predict` takes 15 % longer.
        """
        probabilities = raw_output["probabilities"].numpy()
        labels, confidences = probabilities.argmax(axis=-1), probabilities.max(axis=-1)
        return [
            SentimentResponse(
                sentiment=self.labels[label],
                confidence=confidence,
                scores=dict(zip(self.labels, row.tolist(), strict=True)) if getattr(item, "scores", False) else None,
                truncated=truncated,
            )
            for item, row, label, confidence, truncated in zip(
                input_list,
                probabilities,
                labels.tolist(),
                confidences.tolist(),
                raw_output["truncated"],
                strict=True,
            )
        ]

    def _probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.sigmoid() if self._multi_label else logits.softmax(dim=-1)
