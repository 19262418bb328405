"""Scores for pairs of a query and a text, by any cross-encoder of the transformers library."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, cast

import numpy as np
import torch
from pydantic import BaseModel, Field
from torch import nn
from transformers import AutoModelForSequenceClassification

from modalkit.pipelines.classifier_settings import TextModelEntry
from modalkit.pipelines.engines import Outputs, Same
from modalkit.pipelines.errors import ModelLoadError
from modalkit.pipelines.iomodel import InferenceOutputModel
from modalkit.pipelines.loading import Task
from modalkit.pipelines.texts import Text, TextRequest, Truncated
from modalkit.pipelines.transformer_pipeline import TransformerPipeline

STEEPEST = 0.25
"""The steepest slope of the sigmoid: how much a confidence may change when a logit changes by 1."""


class RerankEntry(TextModelEntry):
    """The entry of a reranker."""

    activation: Literal["auto", "sigmoid", "none"] = Field(
        default="auto", description="auto (what the model's config.json says, else sigmoid), sigmoid or none"
    )


class RerankRequest(TextRequest):
    """A query, and a text that may answer it."""

    query: Text = Field(description="Not blank.", examples=["What is the capital of France?"])


class RerankResponse(InferenceOutputModel):
    """How well one text answers the query."""

    score: float = Field(description="Higher is better; from 0 to 1, unless the model's activation is none.")
    truncated: Truncated = False


class RerankPipeline(TransformerPipeline[RerankEntry]):
    """Scores pairs of query and text with a cross-encoder, as sentence-transformers' CrossEncoder does.

    A key of its entry beside those of `TransformerPipeline`: ``activation`` (``sigmoid``, or ``none`` for the model's
    bare output; ``auto``, the default, takes what a CrossEncoder's ``config.json`` says, and ``sigmoid`` for others).
    """

    input_model: ClassVar[type[BaseModel]] = RerankRequest
    output_model: ClassVar[type[InferenceOutputModel]] = RerankResponse
    task = Task(AutoModelForSequenceClassification, "reranker", "reranking", min_labels=1)
    entry_model = RerankEntry
    reads_pairs = True

    def prepare(self) -> nn.Module:
        """Find out how the model's output becomes a score."""
        config, count = self.checkpoint.model.config, len(self.checkpoint.labels)
        if count != 1:
            raise ModelLoadError(
                f"the model in {self.checkpoint.source} is no reranker: it has {count} outputs. Use a cross-encoder "
                "with one"
            )
        named = (getattr(config, "sentence_transformers", None) or {}).get("activation_fn")
        name = str(named or getattr(config, "sbert_ce_default_activation_function", None) or "Sigmoid")
        known = {"Sigmoid": True, "Identity": False}.get(name.rpartition(".")[2])
        if self.entry.activation == "auto" and known is None:
            raise ModelLoadError(
                f"the reranker in {self.checkpoint.source} has the activation {name}, which this pipeline does not "
                f"have: set model_settings.model_entries.{self.model_name}.activation to sigmoid or none"
            )
        self._is_sigmoid = bool(known) if self.entry.activation == "auto" else self.entry.activation == "sigmoid"
        return self.checkpoint.model

    def same(self) -> Same:
        """Logits may change by what changes a confidence in the steepest part of the sigmoid by its limit."""
        limit = self._engine_settings.sameness.confidence_change / STEEPEST

        def same_scores(reference: Sequence[Outputs], found: Sequence[Outputs]) -> str | None:
            expected, other = (torch.cat([o["logits"].float().cpu().flatten() for o in b]) for b in (reference, found))
            change = float((expected - other).abs().quantile(0.99))
            return None if change <= limit else f"scores change by up to {change:.3f}"

        return same_scores

    def to_text(self, item: BaseModel) -> tuple[str, str]:
        """The query and the text."""
        request = cast("RerankRequest", item)
        return request.query, request.text

    def sample_item(self, text: str) -> RerankRequest:
        """The first word as the query."""
        query, _, rest = text.partition(" ")
        return RerankRequest(query=query, text=rest or "a")

    def postprocess(
        self,
        input_list: list[BaseModel],  # noqa: ARG002  # part of the interface
        raw_output: dict[str, Any],
    ) -> list[InferenceOutputModel]:
        """The score of each pair."""
        logits = raw_output["logits"].numpy()[:, 0].astype(np.float64)
        scores = ((1 + np.tanh(logits / 2)) / 2 if self._is_sigmoid else logits).tolist()  # sigmoid
        return [
            RerankResponse(score=score, truncated=truncated)
            for score, truncated in zip(scores, raw_output["truncated"], strict=True)
        ]
