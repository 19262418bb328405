"""A pipeline worked by each of the rivals, within this process."""

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
    """What the model is given for one batch, in tokens."""

    rows: int
    real_tokens: int
    padded_tokens: int


class BundledPipeline(SentimentPipeline):
    """The bundled model, which notes the shape of each batch: counted, where the scheduler has estimates."""

    def __init__(self) -> None:
        super().__init__("sentiment", str(Path.cwd()), {})
        self.shapes: list[BatchShape] = []

    def preprocess(self, input_list: list[BaseModel]) -> dict[str, Any]:
        """Tokenize and pad, and note the shape."""
        preprocessed = super().preprocess(input_list)
        mask = preprocessed["tensors"]["attention_mask"].numpy()
        self.shapes.append(BatchShape(len(input_list), int(mask.sum()), mask.size))
        return preprocessed

    def token_count(self, item: BaseModel) -> int:
        """The tokens of an item, exactly."""
        return int(super().preprocess([item])["tensors"]["attention_mask"].numpy().sum())


def corpus_items(limit: int | None = None) -> list[BaseModel]:
    """The mixed-length texts as the bundled pipeline takes them."""
    return [SentimentRequest(text=text) for text in mixed_length_texts(limit)]


@dataclass
class Records:
    """What a worker tells of its batches."""

    batches: list[BatchRecord] = field(default_factory=list)

    def shapes(self) -> list[BatchShape]:
        """The batches by the sizes that the scheduler goes by."""
        return [BatchShape(batch.count, batch.real_tokens, batch.padded_tokens) for batch in self.batches]

    def cost_error(self, skipped: int) -> float:
        """The median of how far predicted seconds were from measured ones, relative to these; the first are skipped.

        Not a number where no more batches ran.
        """
        errors = [abs(batch.predicted_s / batch.measured_s - 1) for batch in self.batches[skipped:]]
        return statistics.median(errors) if errors else math.nan


@asynccontextmanager
async def worker_of(
    pipeline: InferencePipeline, records: Records, **batch_config: object
) -> AsyncIterator[InferenceWorker]:
    """A worker as users have it, warm and calibrated, with a queue that holds everything."""
    settings = Settings(app_settings={"batch_config": {"max_queue_size": 1_000_000, **batch_config}})
    async with InferenceWorker(
        pipeline, settings=settings, job_store=MemoryJobStore(), on_batch=records.batches.append
    ) as worker:
        yield worker


@asynccontextmanager
async def arrival_order_scheduler(
    pipeline: InferencePipeline, max_batch_size: int
) -> AsyncIterator[BatchScheduler[BaseModel, InferenceOutputModel]]:
    """The scheduler made to ignore sizes: where all requests have the same, the oldest ones fill each batch."""
    async with BatchScheduler(
        run_batch_of(pipeline),
        policy=BatchPolicy(max_batch_size=max_batch_size),
        cost_model=PaddedCostModel(),
        name="in order of arrival",
    ) as scheduler:
        yield scheduler


def run_sorted(pipeline: InferencePipeline, by_size: Sequence[BaseModel], batch_size: int) -> None:
    """Run a list that is sorted already, batch by batch: what one can do who has everything in advance."""
    for start in range(0, len(by_size), batch_size):
        pipeline.run_inference(list(by_size[start : start + batch_size]))


def raise_failures(outcomes: Sequence[Outcome[InferenceOutputModel]]) -> None:
    """Raise the first error, if any: a rate of failures would be meaningless."""
    for outcome in outcomes:
        if isinstance(outcome, Failure):
            raise outcome.error


def padding_share(shapes: Sequence[BatchShape], queued_at_first: int, least_queued: int) -> float:
    """The share of padding in the batches that were formed while at least `least_queued` waited, of `queued_at_first`.

    Not a number where no batch was.
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
