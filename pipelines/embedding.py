"""Embeddings of texts, by any encoder of the transformers library, sentence-transformers' models included."""

import json
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel, Field
from torch import Tensor, nn
from transformers import AutoModel
from transformers.utils.hub import cached_file

from modalkit.pipelines.classifier_settings import TextModelEntry
from modalkit.pipelines.errors import ModelLoadError
from modalkit.pipelines.iomodel import InferenceOutputModel
from modalkit.pipelines.loading import Task, quiet_transformers
from modalkit.pipelines.texts import Truncated
from modalkit.pipelines.transformer_pipeline import ModelWithEnd, TransformerPipeline

Pooling = Literal["mean", "cls", "last"]

POOLING_MODES: dict[str, Pooling] = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "last",
}
"""The keys of sentence-transformers' configuration of a pooling module."""


class EmbeddingEntry(TextModelEntry):
    """The entry of an embedding model."""

    pooling: Literal["auto", "mean", "cls", "last"] = Field(
        default="auto", description="auto (what the model's files say, else mean), mean, cls or last"
    )
    normalize: bool = Field(default=True, strict=True, description="true or false")


class EmbeddingResponse(InferenceOutputModel):
    """The vector of one text."""

    embedding: list[float] = Field(description="The vector; its length is 1, unless `normalize` is false.")
    truncated: Truncated = False


class EmbeddingPipeline(TransformerPipeline[EmbeddingEntry]):
    """Turns texts into vectors, as sentence-transformers does.

    Keys of its entry beside those of `TransformerPipeline`: ``pooling`` (``mean`` of the tokens, ``cls`` for the first
    one, ``last``; ``auto``, the default, takes that of a sentence-transformers model, and ``mean`` for others) and
    ``normalize`` (true by default: vectors of length 1). ``max_length`` is that of a sentence-transformers model if it
    has one.
    """

    output_model: ClassVar[type[InferenceOutputModel]] = EmbeddingResponse
    task = Task(AutoModel, "embedding model", "sentence embedding", min_labels=0, unused_weights=("pooler.",))
    entry_model = EmbeddingEntry

    def length_limit(self) -> int:
        """The limit in sentence-transformers' files, if that is lower than the model's."""
        limit = super().length_limit()
        return min(limit, (self._read_json("sentence_bert_config.json") or {}).get("max_seq_length") or limit)

    def prepare(self) -> nn.Module:
        """The model with its pooling."""
        own = self._own_pooling
        pooling = own or "mean" if self.entry.pooling == "auto" else self.entry.pooling
        return _Pooled(self.checkpoint.model, pooling, normalize=self.entry.normalize)

    def postprocess(
        self,
        input_list: list[BaseModel],  # noqa: ARG002  # part of the interface
        raw_output: dict[str, Any],
    ) -> list[InferenceOutputModel]:
        """The vector of each text."""
        vectors = raw_output["embedding"].tolist()
        return [
            EmbeddingResponse(embedding=vector, truncated=truncated)
            for vector, truncated in zip(vectors, raw_output["truncated"], strict=True)
        ]

    @cached_property
    def _own_pooling(self) -> Pooling | None:
        """The pooling that a sentence-transformers model names in its files."""
        modules = {module["type"].rpartition(".")[2]: module for module in self._read_json("modules.json") or []}
        if others := sorted(modules.keys() - {"Transformer", "Pooling", "Normalize"}):
            raise ModelLoadError(
                f"the embedding model in {self.checkpoint.source} has a module that this pipeline does not run: "
                f"{others[0]}. Use another model, or a pipeline of your own with sentence-transformers"
            )
        if "Pooling" not in modules or self.entry.pooling != "auto":
            return None
        config = self._read_json(f"{modules['Pooling']['path']}/config.json") or {}
        modes = [key for key, value in config.items() if key.startswith("pooling_mode_") and value is True]
        if len(modes) != 1 or modes[0] not in POOLING_MODES:
            raise ModelLoadError(
                f"the embedding model in {self.checkpoint.source} has the pooling {' + '.join(modes) or 'none'}, which "
                f"is not supported: set model_settings.model_entries.{self.model_name}.pooling to mean, cls or last"
            )
        return POOLING_MODES[modes[0]]

    def _read_json(self, name: str) -> Any:
        """What a file of the model holds; None if there is no such file."""
        with quiet_transformers():
            path = cached_file(
                self.checkpoint.source,
                name,
                revision=self.entry.revision,
                _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_connection_errors=False,
            )
        return None if path is None else json.loads(Path(path).read_text(encoding="utf-8"))


class _Pooled(ModelWithEnd):
    """A model whose output is one vector for each text."""

    def __init__(self, model: nn.Module, pooling: Pooling, *, normalize: bool) -> None:
        super().__init__(model)
        self.pooling, self.normalize = pooling, normalize

    def extra_repr(self) -> str:
        """What it does beside the model: a kept engine is found by it."""
        return f"pooling={self.pooling}, normalize={self.normalize}"

    def end(self, outputs: Any, mask: Tensor) -> dict[str, Tensor]:
        """Pool the last hidden state, in float32."""
        hidden = outputs.last_hidden_state.float()
        if self.pooling == "mean":
            weights = mask.unsqueeze(-1).float()
            vectors = (hidden * weights).sum(dim=1) / weights.sum(dim=1)
        else:
            # The first maximum: of the mask at the first token, of the counted tokens at the last one.
            places = (mask if self.pooling == "cls" else mask.cumsum(dim=1)).argmax(dim=1)
            vectors = hidden[torch.arange(hidden.shape[0], device=hidden.device), places]
        return {"embedding": nn.functional.normalize(vectors, dim=1) if self.normalize else vectors}
