"""Entities in texts, by any token-classification model of the transformers library."""

from collections.abc import Iterator
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
        logits, encoded = raw_output["logits"].numpy(), raw_output["encoded"]
        powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
        chances = powers / powers.sum(axis=-1, keepdims=True)
        rows = zip(input_list, chances, raw_output["places"], encoded.encodings, encoded.truncated, strict=True)
        return [
            TokenClassificationResponse(
                entities=list(self._entities(str(self.to_text(item)), row[place], encoding)), truncated=truncated
            )
            for item, row, place, encoding, truncated in rows
        ]

    def _entities(self, text: str, chances: Floats, encoding: Any) -> Iterator[Entity]:
        """Words, or tokens, whose labels follow each other, as one entity."""
        tokens = [i for i, is_special in enumerate(encoding.special_tokens_mask) if not is_special]
        offsets, word_ids = encoding.offsets, encoding.word_ids
        words = tokens if self.entry.aggregation == "simple" else [word_ids[i] for i in tokens]
        starts = [at for at, word in enumerate(words) if at == 0 or word != words[at - 1]]
        if not tokens:
            return
        places = [offsets[i] for i in tokens]
        merged = self._merge(chances[tokens], starts)
        labels = [self.checkpoint.labels[i] for i in merged.argmax(axis=1)]
        names = [label[2:] if label.startswith(("B-", "I-")) else label for label in labels]
        heads = [i for i, label in enumerate(labels) if i == 0 or label.startswith("B-") or names[i] != names[i - 1]]
        for head, after in zip(heads, [*heads[1:], len(labels)], strict=True):
            if names[head] == OUTSIDE:
                continue
            start, end = places[starts[head]][0], places[[*starts, len(tokens)][after] - 1][1]
            start += len(text[start:end]) - len(text[start:end].lstrip())  # some tokenizers count the space before it
            score = float(merged[head:after].max(axis=1).mean())
            yield Entity(entity_group=names[head], score=score, word=text[start:end], start=start, end=end)

    def _merge(self, chances: Floats, starts: list[int]) -> Floats:
        """The probabilities of each word, from those of its tokens; `starts` has the index of its first one."""
        ends = [*starts[1:], len(chances)]
        if self.entry.aggregation == "average":
            sums: Floats = np.add.reduceat(chances, starts, axis=0)
            return sums / np.subtract(ends, starts).astype(np.float32)[:, None]
        if self.entry.aggregation == "max":
            best = chances.max(axis=1)
            starts = [start + int(best[start:end].argmax()) for start, end in zip(starts, ends, strict=True)]
        return chances[starts]


class _MaskedLogits(ModelWithEnd):
    def end(self, outputs: Any, mask: Tensor) -> dict[str, Tensor]:
        """Logits of 0 where there is padding, so that these do not count when engines are compared."""
        return {"logits": outputs.logits * mask.unsqueeze(-1)}
