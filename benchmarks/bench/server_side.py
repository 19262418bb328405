"""What the server tells of itself: the parts of the latency, its batches, their padding, and the GPU."""

import math
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from modalkit.batching import BatchRecord
from modalkit.benchmarks.load.client import direct_client
from modalkit.service.pipeline_batches import max_in_flight_of

if TYPE_CHECKING:
    from modalkit.service.worker import InferenceWorker

Samples = Sequence[Sample]
_Sums = Mapping[tuple[str, str], float]
"""Values by the name of a sample and its bucket or stage, summed over all other labels."""

GPU_SAMPLE_S = 0.2
_QUEUE = ("modalkit_queue_wait_seconds", "te_request_queue_duration")
_SIZE = ("modalkit_batch_size", "te_batch_next_size")


@dataclass(frozen=True, slots=True)
class Setup:
    """What runs the batches of a model."""

    engine: str | None
    """What computes it, as ``torch/float32``; None where its pipeline does not tell."""
    slots: int
    """Batches that may run at once, on all of its devices."""

    @classmethod
    def of(cls, worker: "InferenceWorker") -> "Setup":
        """That of a worker."""
        choice = worker.engine_choice
        return cls(
            None if choice is None else f"{choice.engine}/{choice.dtype}",
            len(worker.pipelines) * max_in_flight_of(worker.pipeline, worker.limits),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSide:
    """The server's part of a run; None where it does not tell."""

    queue_s: float | None = None
    """Mean seconds that a request waited for its batch."""
    stages_s: Mapping[str, float] = field(default_factory=dict)
    """Mean seconds of a batch in each stage."""
    rest_s: float | None = None
    """What remains of the mean latency: HTTP, the way there and back, and that more requests are in longer batches."""
    mean_batch_size: float | None = None
    batch_sizes: Mapping[str, float] = field(default_factory=dict)
    """How many batches had at most so many requests, and more than the size before."""
    padding_share: float | None = None
    paddings: Mapping[str, float] = field(default_factory=dict)
    """How many batches had at most such a share of padding, and more than the share before."""
    utilisation: float | None = None
    """Share, from 0 to 1, of the time in which batches ran: the mean of all that may run at once."""
    engine: str | None = None
    """What computed the model, as ``torch/float32``."""


def scrape(url: str, headers: Mapping[str, str]) -> Samples | None:
    """The metrics of a server; None where it has none."""
    try:
        with direct_client(headers=headers, timeout=5) as client:
            answer = client.get(f"{url}/metrics")
        if answer.status_code != 200:
            return None
        return [sample for family in text_string_to_metric_families(answer.text) for sample in family.samples]
    except (httpx.HTTPError, ValueError):
        return None


def server_side(before: Samples | None, after: Samples | None, mean_s: float | None) -> ServerSide | None:
    """What the models that ran batches between two scrapes did; None where the server counts no batches.

    `mean_s` is the mean latency of requests of one item; None where requests are others.
    """
    if before is None or after is None:
        return None
    batches_before, batches_after = _batches_of_models(before), _batches_of_models(after)
    models = {model for model, count in batches_after.items() if count > batches_before[model]} | {""}
    engines = {
        f"{sample.labels['engine']}/{sample.labels['dtype']}"
        for sample in after
        if sample.name == "modalkit_engine_info" and sample.labels["model"] in models
    }
    found = _difference(_sums(before, models), _sums(after, models), mean_s)
    return None if found is None else replace(found, engine=", ".join(sorted(engines)) or None)


def _batches_of_models(samples: Samples) -> Counter[str]:
    counted = Counter[str]()
    for sample in samples:
        if sample.name.removesuffix("_count") in _SIZE:
            counted[sample.labels.get("model", "")] += int(sample.value)
    return counted


def _sums(samples: Samples, models: Collection[str]) -> _Sums:
    found: defaultdict[tuple[str, str], float] = defaultdict(float)
    for sample in samples:
        if sample.labels.get("model", "") in models:
            found[sample.name, sample.labels.get("le", "") or sample.labels.get("stage", "")] += sample.value
    return found


def _difference(before: _Sums, after: _Sums, mean_s: float | None) -> ServerSide | None:
    def grown(name: str, key: str = "") -> float:
        return after.get((name, key), 0.0) - before.get((name, key), 0.0)

    queue = next((name for name in _QUEUE if grown(f"{name}_count")), None)
    size = next((name for name in _SIZE if grown(f"{name}_count")), None)
    if queue is None and size is None:
        return None
    queue_s = None if queue is None else grown(f"{queue}_sum") / grown(f"{queue}_count")
    batches = grown(f"{size}_count") if size else 0.0
    stages_s = {
        stage: grown("modalkit_stage_seconds_sum", stage) / count
        for stage in ("preprocess", "predict", "postprocess")
        if (count := grown("modalkit_stage_seconds_count", stage))
    }
    padded, open_s = grown("modalkit_padded_tokens_total"), grown("modalkit_open_seconds_total")
    return ServerSide(
        queue_s=queue_s,
        stages_s=stages_s,
        rest_s=None
        if mean_s is None or queue_s is None or not stages_s
        else max(0.0, mean_s - queue_s - sum(stages_s.values())),
        mean_batch_size=grown(f"{size}_sum") / batches if batches else None,
        batch_sizes=_buckets(before, after, f"{size}_bucket"),
        padding_share=1 - grown("modalkit_real_tokens_total") / padded if padded else None,
        paddings=_buckets(before, after, "modalkit_padding_share_bucket"),
        utilisation=_share(grown("modalkit_busy_seconds_total"), open_s) if open_s else None,
    )


def _tenth_above(share: float) -> float:
    return math.ceil(round(10 * share, 6)) / 10


def _share(busy_s: float, open_s: float) -> float:
    # A batch counts when it ends, with the time before the first scrape, and two whose stages overlap count both.
    return min(1.0, busy_s / open_s)


def _buckets(before: _Sums, after: _Sums, name: str) -> dict[str, float]:
    edges = sorted((float(key), key) for found, key in after if found == name and key)
    counts = [after[name, key] - before.get((name, key), 0.0) for _, key in edges]
    own = np.diff([0.0, *counts])
    return {
        ("more" if edge == float("inf") else f"{edge:g}"): float(n)
        for (edge, _), n in zip(edges, own, strict=True)
        if n
    }


def of_records(records: Sequence[BatchRecord], setup: Setup, elapsed_s: float, mean_s: float) -> ServerSide | None:
    """The same from the records of a worker's batches."""
    if not records:
        return None
    counts = np.array([record.count for record in records])
    queue_s = float(np.average([record.queue_s for record in records], weights=counts))
    stages_s = {
        stage: float(np.mean([getattr(record, f"{stage}_s") for record in records]))
        for stage in ("preprocess", "predict", "postprocess")
    }
    return ServerSide(
        queue_s=queue_s,
        stages_s=stages_s,
        rest_s=max(0.0, mean_s - queue_s - float(np.average([record.total_s for record in records], weights=counts))),
        mean_batch_size=float(counts.mean()),
        batch_sizes={f"{size}": float(n) for size, n in sorted(Counter(counts.tolist()).items())},
        padding_share=1
        - sum(record.real_tokens for record in records) / sum(record.padded_tokens for record in records),
        paddings={
            f"{share:g}": float(n)
            for share, n in sorted(Counter(_tenth_above(record.padding_share) for record in records).items())
        },
        utilisation=_share(sum(record.total_s for record in records), setup.slots * elapsed_s),
        engine=setup.engine,
    )


@dataclass
class GpuUse:
    """Samples of each GPU, taken while a block runs."""

    names: list[str] = field(default_factory=list)
    samples: list[list[tuple[float, float, float]]] = field(default_factory=list)
    """Of each GPU: the time by `time.perf_counter`, the utilisation, and the bytes of memory that are in use."""

    def summary(self, windows: Sequence[tuple[float, float]]) -> list[dict[str, Any]]:
        """The mean utilisation and the most memory of each GPU in these times, each from a begin to an end."""
        found: list[dict[str, Any]] = []
        for name, samples in zip(self.names, self.samples, strict=True):
            kept = [row for row in samples if any(begin_s <= row[0] <= end_s for begin_s, end_s in windows)]
            if kept:
                _, utilisation, memory_bytes = zip(*kept, strict=True)
                found.append(
                    {"name": name, "utilisation": float(np.mean(utilisation)), "memory_bytes": max(memory_bytes)}
                )
        return found


@contextmanager
def gpu_use() -> Iterator[GpuUse]:
    """Sample the GPUs of this machine by NVML while the block runs; without NVML or a GPU, nothing."""
    use = GpuUse()
    try:
        import pynvml
    except ImportError:
        yield use
        return
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        yield use
        return
    handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
    use.names = [str(pynvml.nvmlDeviceGetName(handle)) for handle in handles]
    use.samples = [[] for _ in handles]
    stopped = threading.Event()

    def sample() -> None:
        while not stopped.wait(GPU_SAMPLE_S):
            for index, handle in enumerate(handles):
                with suppress(pynvml.NVMLError):  # as for the utilisation of a part of a GPU (MIG)
                    utilisation = pynvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100
                    used = float(pynvml.nvmlDeviceGetMemoryInfo(handle).used)
                    use.samples[index].append((time.perf_counter(), utilisation, used))

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield use
    finally:
        stopped.set()
        thread.join()
        pynvml.nvmlShutdown()
