"""Measures a sentiment model, in the same way as it is served, on the held-out sentences."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from modalkit.pipelines.sentiment import SentimentPipeline, SentimentRequest
from modalkit.pipelines.training.data import LABELS, SOURCES, Sentence

BATCH_SIZE = 32
NEGATIVE, NEUTRAL, POSITIVE = range(len(LABELS))


@dataclass(frozen=True)
class Accuracy:
    """The accuracy of the model on some sentences."""

    count: int
    three_way: float
    """The share of all sentences whose most probable label is right."""
    polar_count: int
    polarity: float
    """Of the sentences that are not neutral, the share whose right pole has the higher probability of the two."""


def evaluate(pipeline: SentimentPipeline, sentences: Iterable[Sentence]) -> dict[str, Accuracy]:
    """The accuracy of a model with the labels `LABELS` by source, and over ``all``.

    Raises `ValueError` for a model with other labels.
    """
    if sorted(pipeline.labels) != sorted(LABELS):
        raise ValueError(f"the model must have the labels {', '.join(LABELS)}, it has {', '.join(pipeline.labels)}")
    scored = _score(pipeline, sorted(sentences, key=lambda sentence: len(sentence.text)))
    groups = {source: [pair for pair in scored if pair[0].source == source] for source in SOURCES}
    return {name: _accuracy(pairs) for name, pairs in {**groups, "all": scored}.items() if pairs}


Scored = tuple[Sentence, dict[int, float]]
"""A sentence, and the probability of each index of `LABELS`."""


def _score(pipeline: SentimentPipeline, sentences: list[Sentence]) -> list[Scored]:
    index_of = [LABELS.index(label) for label in pipeline.labels]
    scored: list[Scored] = []
    for start in range(0, len(sentences), BATCH_SIZE):
        batch = sentences[start : start + BATCH_SIZE]
        items: list[Any] = [SentimentRequest(text=sentence.text) for sentence in batch]
        rows = pipeline.predict(items, pipeline.preprocess(items))["probabilities"].tolist()
        scored += [(s, dict(zip(index_of, row, strict=True))) for s, row in zip(batch, rows, strict=True)]
    return scored


def _accuracy(scored: list[Scored]) -> Accuracy:
    right = sum(max(given, key=given.__getitem__) == sentence.label for sentence, given in scored)
    polar = [(sentence, given) for sentence, given in scored if sentence.label != NEUTRAL]
    right_pole = sum((given[POSITIVE] > given[NEGATIVE]) == (sentence.label == POSITIVE) for sentence, given in polar)
    return Accuracy(
        count=len(scored),
        three_way=right / len(scored),
        polar_count=len(polar),
        polarity=right_pole / len(polar) if polar else 0.0,
    )
