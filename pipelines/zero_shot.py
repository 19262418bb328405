"""Labels that a request names, by any natural-language-inference model of the transformers library."""

from typing import Annotated, Any, ClassVar, cast

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field
from torch import nn
from transformers import AutoModelForSequenceClassification

from modalkit.pipelines.classifier_settings import TextModelEntry
from modalkit.pipelines.errors import ModelLoadError, RejectItem
from modalkit.pipelines.iomodel import InferenceOutputModel
from modalkit.pipelines.loading import Task
from modalkit.pipelines.texts import TextRequest, Truncated
from modalkit.pipelines.transformer_pipeline import TransformerPipeline

MAX_LABELS = 100
MAX_LABEL_CHARACTERS = 1000
ROWS = 32
"""Most pairs of a text and a label that the model reads at a time."""
SAMPLE_LABELS = ["good", "bad"]

Labels = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=MAX_LABEL_CHARACTERS)]],
    Field(min_length=1, max_length=MAX_LABELS),
]


class ZeroShotEntry(TextModelEntry):
    """The entry of a zero-shot classifier."""

    labels: Labels | None = Field(default=None, description=f"a list of 1 to {MAX_LABELS} labels, or null")
    hypothesis_template: str = Field(
        default="This example is {}.", pattern=r"\{\}", description="a sentence with {} in the place of the label"
    )
    multi_label: bool = Field(default=False, strict=True, description="true or false")


class ZeroShotRequest(TextRequest):
    """One text, and the labels that it may have."""

    labels: Labels | None = Field(
        default=None,
        description="The labels to choose from; null for those of the model's entry.",
        examples=[["travel", "cooking"]],
    )


class ZeroShotResponse(InferenceOutputModel):
    """The labels of one text."""

    labels: list[str] = Field(description="All labels, the most probable one first.")
    scores: list[float] = Field(description="Their probabilities; the sum is 1, unless `multi_label` is set.")
    truncated: Truncated = False


class ZeroShotPipeline(TransformerPipeline[ZeroShotEntry]):
    """Chooses between labels that the model was not trained on, as transformers' own pipeline does.

    The model judges whether a text entails "This example is ..." for each label. Keys of its entry beside those of
    `TransformerPipeline`: ``labels`` (for requests without any), ``hypothesis_template`` (the sentence, with ``{}`` in
    the place of the label) and ``multi_label`` (true: each label has its own probability; false by default).
    """

    input_model: ClassVar[type[BaseModel]] = ZeroShotRequest
    output_model: ClassVar[type[InferenceOutputModel]] = ZeroShotResponse
    cost_feature = "total"
    task = Task(AutoModelForSequenceClassification, "zero-shot classifier", "natural language inference")
    entry_model = ZeroShotEntry
    reads_pairs = True

    def prepare(self) -> nn.Module:
        """Find the model's output for entailment."""
        labels = self.checkpoint.labels
        found = [i for i, label in enumerate(labels) if label.lower().startswith("entail")]
        if not found:
            raise ModelLoadError(
                f"the model in {self.checkpoint.source} is no zero-shot classifier: none of its labels "
                f"({', '.join(labels[:10])}) is entailment. Use one that was trained for natural language inference"
            )
        self._entailment = found[0]
        self._contradiction = len(labels) - 1 if self._entailment == 0 else 0
        return self.checkpoint.model

    def labels_of(self, item: BaseModel) -> list[str]:
        """The labels of a request, else those of the entry; none if there are none."""
        return cast("ZeroShotRequest", item).labels or self.entry.labels or []

    def item_size(self, item: BaseModel) -> int:
        """The tokens of all pairs of the text and a label."""
        request, labels = cast("ZeroShotRequest", item), self.labels_of(item)
        return max(1, len(labels)) * self._counter.count(f"{request.text} {self._hypothesis((labels or [''])[0])}")

    def sample_items(self, n: int, size: int) -> list[BaseModel]:
        """Requests whose pairs have together about `size` tokens."""
        labels = self.entry.labels or SAMPLE_LABELS
        own = sum(self._encoder.word_lengths(self._hypothesis(labels[0]).split()))
        items = super().sample_items(n, size // len(labels) - own)
        return [item.model_copy(update={"labels": labels}) for item in items]

    def preprocess(self, input_list: list[BaseModel]) -> dict[str, Any]:
        """Pairs of similar length together: ``order`` (indexes of all pairs), and ``parts``, each padded for itself."""
        requests = cast("list[ZeroShotRequest]", input_list)
        pairs = [(item.text, self._hypothesis(label)) for item in requests for label in self.labels_of(item)]
        order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]) + len(pairs[i][1]))
        parts = [self.encode([pairs[i] for i in order[at : at + ROWS]]) for at in range(0, len(order), ROWS)]
        return {"order": order, "parts": parts}

    def predict(
        self,
        input_list: list[BaseModel],  # noqa: ARG002  # part of the interface
        preprocessed_data: dict[str, Any],
    ) -> dict[str, Any]:
        """Run the model: ``logits`` (pairs, classes), and whether each pair was ``truncated``."""
        order, parts = preprocessed_data["order"], preprocessed_data["parts"]
        rows = [self.compute(part["tensors"])["logits"].numpy() for part in parts]
        logits = np.empty((len(order), len(self.checkpoint.labels)), np.float32)
        truncated = np.zeros(len(order), bool)
        if order:
            logits[order], truncated[order] = np.concatenate(rows), [t for part in parts for t in part["truncated"]]
        return {"logits": logits, "truncated": truncated}

    def postprocess(self, input_list: list[BaseModel], raw_output: dict[str, Any]) -> list[InferenceOutputModel] | Any:
        """The labels of each text."""
        responses: list[InferenceOutputModel | RejectItem] = []
        at = 0
        for item in input_list:
            labels = self.labels_of(item)
            if not labels:
                why = "there are no labels: give labels in the request, or in the model's entry in the configuration"
                responses.append(RejectItem(why))
                continue
            rows = slice(at, at := at + len(labels))
            scores = self._scores(raw_output["logits"][rows])
            best = np.argsort(-scores, kind="stable").tolist()
            responses.append(
                ZeroShotResponse(
                    labels=[labels[i] for i in best],
                    scores=scores[best].tolist(),
                    truncated=bool(raw_output["truncated"][rows].any()),
                )
            )
        return responses

    def _hypothesis(self, label: str) -> str:
        return self.entry.hypothesis_template.replace("{}", label)

    def _scores(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        if self.entry.multi_label or len(logits) == 1:
            return _softmax(logits[:, [self._contradiction, self._entailment]], axis=1)[:, 1]
        return _softmax(logits[:, self._entailment], axis=0)


def _softmax(values: NDArray[np.float32], axis: int) -> NDArray[np.float32]:
    powers = np.exp(values - values.max(axis=axis, keepdims=True))
    softmax: NDArray[np.float32] = powers / powers.sum(axis=axis, keepdims=True)
    return softmax
