"""Entities in texts, by any token-classification model of the transformers library."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field
from torch import Tensor, nn
from transformers import AutoModelForTokenClassification

from modalkit.pipelines.classifier_settings import TextModelEntry
from modalkit.pipelines.errors import ModelLoadError
from modalkit.pipelines.iomodel import InferenceOutputModel
from modalkit.pipelines.loading import Task
from modalkit.pipelines.texts import Truncated
from modalkit.pipelines.transformer_pipeline import ModelWithEnd, TransformerPipeline

Floats = NDArray[np.float32]
OUTSIDE = "O"


class TokenClassificationEntry(TextModelEntry):
    """The entry of a token classifier."""

    aggregation: Literal["simple", "first", "average", "max"] = Field(
        default="simple", description="simple, first, average or max"
    )


class Entity(BaseModel):
    """Consecutive tokens of one label."""

    entity_group: str = Field(description="The label, without the prefix B- or I-.")
    score: float = Field(ge=0, le=1, description="The mean probability of the label.")
    word: str = Field(description="The entity as it is in the text: from `start` to `end`.")
    start: int = Field(description="The index of its first character in the text.")
    end: int = Field(description="The index after its last character.")


class TokenClassificationResponse(InferenceOutputModel):
    """The entities of one text."""

    entities: list[Entity] = Field(description="In the order of the text, without the label O.")
    truncated: Truncated = False


class TokenClassificationPipeline(TransformerPipeline[TokenClassificationEntry]):
    """Finds entities in texts, such as names, as transformers' own pipeline does.

    A key of its entry beside those of `TransformerPipeline`: ``aggregation``, what becomes of words of several tokens.
    With ``simple``, the default, each token has its own label; with ``first``, ``average`` and ``max`` a word has the
    label of its first token, of the mean of its tokens, or of the most certain one.
    """

    output_model: ClassVar[type[InferenceOutputModel]] = TokenClassificationResponse
    task = Task(AutoModelForTokenClassification, "token classifier", "token classification")
    entry_model = TokenClassificationEntry
    needs_offsets = True

    def prepare(self) -> nn.Module:
        """The model without the outputs of padding."""
        if not self.checkpoint.tokenizer.is_fast:
            raise ModelLoadError(
                f"the tokenizer in {self.checkpoint.source} does not tell where tokens are in the text: use a model "
                "with a tokenizer.json"
            )
        return _MaskedLogits(self.checkpoint.model)

    def postprocess(self, input_list: list[BaseModel], raw_output: dict[str, Any]) -> list[InferenceOutputModel]:
        """The entities of each text."""
        logits = raw_output["logits"].numpy()
        powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
        probabilities = powers / powers.sum(axis=-1, keepdims=True)
        responses: list[InferenceOutputModel] = []
        for item, row, place, encoding, truncated in zip(
            input_list,
            probabilities,
            raw_output["places"],
            raw_output["encoded"].encodings,
            raw_output["truncated"],
            strict=True,
        ):
            words = list(self._words(row[place], encoding))
            responses.append(
                TokenClassificationResponse(entities=_entities(str(self.to_text(item)), words), truncated=truncated)
            )
        return responses

    def _words(self, probabilities: Floats, encoding: Any) -> Iterator["_Word"]:
        """The parts of the text that have a label of their own: tokens, or words, as `aggregation` says."""
        specials, offsets = encoding.special_tokens_mask, encoding.offsets
        tokens = [i for i in range(len(offsets)) if not specials[i]]
        if self.entry.aggregation == "simple":
            groups = [[i] for i in tokens]
        else:
            groups = [list(group) for _, group in groupby(tokens, encoding.word_ids.__getitem__)]
        for group in groups:
            chances = self._merge(probabilities[group])
            best = int(chances.argmax())
            label = self.checkpoint.labels[best]
            yield _Word(label, float(chances[best]), offsets[group[0]][0], offsets[group[-1]][1])

    def _merge(self, chances: Floats) -> Floats:
        best = chances.max(axis=1).argmax()
        merged: Floats = {"average": chances.mean(axis=0), "max": chances[best]}.get(self.entry.aggregation, chances[0])
        return merged


@dataclass(frozen=True)
class _Word:
    label: str
    score: float
    start: int
    end: int

    @property
    def name(self) -> str:
        return self.label[2:] if self.label.startswith(("B-", "I-")) else self.label


def _entities(text: str, words: list[_Word]) -> list[Entity]:
    groups: list[list[_Word]] = []
    for word in words:
        if groups and groups[-1][-1].name == word.name and not word.label.startswith("B-"):
            groups[-1].append(word)
        else:
            groups.append([word])
    found = []
    for group in groups:
        start, end = group[0].start, group[-1].end
        start += len(text[start:end]) - len(text[start:end].lstrip())  # some tokenizers count the space before a word
        if (name := group[0].name) != OUTSIDE:
            score = float(np.mean([word.score for word in group]))
            found.append(Entity(entity_group=name, score=score, word=text[start:end], start=start, end=end))
    return found


class _MaskedLogits(ModelWithEnd):
    def end(self, outputs: Any, mask: Tensor) -> dict[str, Tensor]:
        """Logits of 0 where there is padding, so that these do not count when engines are compared."""
        return {"logits": outputs.logits * mask.unsqueeze(-1)}
