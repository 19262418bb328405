"""The contenders that run a pipeline in this process."""

import math
import statistics
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from modalkit.batching import BatchPolicy, BatchRecord, BatchScheduler, Failure, Outcome, PaddedCostModel
from modalkit.benchmarks.corpus import mixed_length_texts
from modalkit.pipelines import InferenceOutputModel, InferencePipeline
from modalkit.pipelines.sentiment import SentimentPipeline, SentimentRequest
from modalkit.service.jobs import MemoryJobStore
from modalkit.service.pipeline_batches import run_batch_of
from modalkit.service.settings import Settings
from modalkit.service.worker import InferenceWorker


@dataclass(frozen=True, slots=True)
class BatchShape:
    """The shape of one batch as the model gets it, in tokens."""

    rows: int
    real_tokens: int
    padded_tokens: int


class BundledPipeline(SentimentPipeline):
    """The bundled model, which records the real shape of each batch; the scheduler has estimates."""

    def __init__(self, **model_entry: Any) -> None:
        super().__init__("sentiment", str(Path.cwd()), {}, **model_entry)
        self.shapes: list[BatchShape] = []

    def preprocess(self, input_list: list[BaseModel]) -> dict[str, Any]:
        """Tokenize and pad, and record the shape."""
        preprocessed = super().preprocess(input_list)
        mask = preprocessed["tensors"]["attention_mask"].numpy()
        self.shapes.append(BatchShape(len(input_list), int(mask.sum()), mask.size))
        return preprocessed

    def token_count(self, item: BaseModel) -> int:
        """The exact number of tokens of an item."""
        return int(super().preprocess([item])["tensors"]["attention_mask"].numpy().sum())


def corpus_items(limit: int | None = None) -> list[BaseModel]:
    """The texts of mixed lengths, as items of the bundled pipeline."""
    return [SentimentRequest(text=text) for text in mixed_length_texts(limit)]


@dataclass
class Records:
    """The records of a worker's batches."""

    batches: list[BatchRecord] = field(default_factory=list)

    def shapes(self) -> list[BatchShape]:
        """The shapes of the batches by the scheduler's sizes."""
        return [BatchShape(batch.count, batch.real_tokens, batch.padded_tokens) for batch in self.batches]

    def cost_error(self, skipped: int) -> float:
        """The median relative error of the predicted seconds, after the first `skipped` batches; NaN without more."""
        errors = [abs(batch.predicted_s / batch.measured_s - 1) for batch in self.batches[skipped:]]
        return statistics.median(errors) if errors else math.nan


@asynccontextmanager
async def worker_of(
    pipeline: InferencePipeline, records: Records, **batch_config: object
) -> AsyncIterator[InferenceWorker]:
    """A worker with default settings, warmed up and calibrated, with a queue for all items."""
    settings = Settings(app_settings={"batch_config": {"max_queue_size": 1_000_000, **batch_config}})
    async with InferenceWorker(
        pipeline,
        settings=settings,
        job_store=MemoryJobStore(),
        on_batch=records.batches.append,
        owns_pipeline=False,
    ) as worker:
        yield worker


@asynccontextmanager
async def arrival_order_scheduler(
    pipeline: InferencePipeline, max_batch_size: int
) -> AsyncIterator[BatchScheduler[BaseModel, InferenceOutputModel]]:
    """A scheduler that ignores sizes: all requests have the same size, so the oldest ones fill each batch."""
    async with BatchScheduler(
        run_batch_of(pipeline),
        policy=BatchPolicy(max_batch_size=max_batch_size),
        cost_model=PaddedCostModel(),
        name="in order of arrival",
    ) as scheduler:
        yield scheduler


def run_sorted(pipeline: InferencePipeline, by_size: Sequence[BaseModel], batch_size: int) -> None:
    """Run a sorted list batch by batch, which is possible if all items are known in advance."""
    for start in range(0, len(by_size), batch_size):
        pipeline.run_inference(list(by_size[start : start + batch_size]))


def raise_failures(outcomes: Sequence[Outcome[InferenceOutputModel]]) -> None:
    """Raise the first error, if any, because a rate of failures would be meaningless."""
    for outcome in outcomes:
        if isinstance(outcome, Failure):
            raise outcome.error


def padding_share(shapes: Sequence[BatchShape], queued_at_first: int, least_queued: int) -> float:
    """The share of padding in the batches that were formed while at least `least_queued` items waited.

    At first `queued_at_first` items waited. NaN if there was no such batch.
    """
    real = padded = 0
    queued = queued_at_first
    for shape in shapes:
        if queued < least_queued:
            break
        queued -= shape.rows
        real += shape.real_tokens
        padded += shape.padded_tokens
    return 1 - real / padded if padded else math.nan
