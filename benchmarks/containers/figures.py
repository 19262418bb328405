"""From what the callers got and what the container tells of its batches: the figures of a cell."""

import statistics
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from pydantic import ConfigDict

from modalkit.batching import SchedulerStatistics
from modalkit.benchmarks.containers.matrix import Figures


class UnmeasurableError(Exception):
    """Raised when a cell took too long, or what was collected of it does not belong together."""


@dataclass(frozen=True, slots=True)
class Report:
    """What a container tells of itself; see `MeasuredService.batch_report`."""

    device: str
    statistics: SchedulerStatistics
    records: list[Mapping[str, Any]]
    """Each has the fields of a `BatchRecord`, without its errors."""
    __pydantic_config__ = ConfigDict(arbitrary_types_allowed=True)  # the errors of a `BatchRecord`; none is reported


@dataclass
class Answers:
    """What came back to the callers."""

    latencies_s: list[float] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    elapsed_s: float = 0.0
    mean_list_length: float = 0.0


def figures_of(answers: Answers, before: SchedulerStatistics, report: Report) -> Figures:
    """The figures of a cell in which something succeeded; the container's, by how its statistics grew since `before`.

    Raises `UnmeasurableError` where these are not of the same container, or of another one than was called.
    """
    after, records = report.statistics, report.records
    if after.open_s < before.open_s:
        raise UnmeasurableError("the container was replaced while it was measured; measure this cell again")
    sizes = Counter(after.batch_sizes)
    sizes.subtract(before.batch_sizes)
    if not sizes.total() or not records:
        raise UnmeasurableError("the container that was asked ran no batches, so another one did; measure it again")
    counts = [record["count"] for record in records]
    mean_s = statistics.fmean(answers.latencies_s)
    queue_s = statistics.fmean((record["queue_s"] for record in records), counts)
    batch_s = statistics.fmean((record["total_s"] for record in records), counts)
    p50_s, p95_s, p99_s = np.quantile(answers.latencies_s, (0.5, 0.95, 0.99)).tolist()
    return Figures(
        answered=len(answers.latencies_s),
        errors=dict(answers.errors),
        elapsed_s=answers.elapsed_s,
        items_per_s=len(answers.latencies_s) / answers.elapsed_s,
        latency_mean_s=mean_s,
        latency_p50_s=p50_s,
        latency_p95_s=p95_s,
        latency_p99_s=p99_s,
        queue_s=queue_s,
        batch_s=batch_s,
        rest_s=mean_s - queue_s - batch_s,
        mean_list_length=answers.mean_list_length,
        mean_batch_size=sum(size * batches for size, batches in sizes.items()) / sizes.total(),
        batch_sizes={size: batches for size, batches in sorted(sizes.items()) if batches},
        predict_share=(after.predict_s - before.predict_s) / (after.open_s - before.open_s),
        padding_share=1 - (after.real_tokens - before.real_tokens) / (after.padded_tokens - before.padded_tokens),
    )
