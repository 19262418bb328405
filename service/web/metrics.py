"""Metrics for Prometheus of models, batches, jobs and deliveries, made from snapshots at each request."""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from prometheus_client import PlatformCollector, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from modalkit.service.gateway import Gateway, Model, Readiness
from modalkit.service.jobs import JobCounts, JobStoreError
from modalkit.service.web.admission import Admission

logger = logging.getLogger(__name__)

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


async def exposition(gateway: Gateway, admission: Admission) -> bytes:
    """All metrics, in Prometheus's text format."""
    metrics = [*_of_models(gateway.models.values()), *_of_bodies(admission)]
    if (administration := gateway.jobs.administration) is not None:
        is_up = GaugeMetricFamily("modalkit_job_store_up", "0 where the job store cannot be read.")
        try:
            metrics += _of_jobs(await administration.counts())
            is_up.add_metric([], 1)
        except JobStoreError:
            is_up.add_metric([], 0)
            logger.exception("The jobs could not be counted")
        metrics.append(is_up)
    metrics += [*ProcessCollector(registry=None).collect(), *PlatformCollector(registry=None).collect()]
    return generate_latest(_Snapshot(metrics))


@dataclass
class _Snapshot(Collector):
    metrics: Iterable[Metric]

    def collect(self) -> Iterable[Metric]:
        return self.metrics


def _of_models(models: Iterable[Model]) -> Iterator[Metric]:
    ready = GaugeMetricFamily("modalkit_model_ready", "1 where a model takes requests.", labels=["model"])
    engines = InfoMetricFamily("modalkit_engine", "What computes a model, and how.", labels=["model"])
    queued = GaugeMetricFamily("modalkit_queued_requests", "Requests that wait.", labels=["model", "priority"])
    running = GaugeMetricFamily("modalkit_running_requests", "Requests in batches that run.", labels=["model"])
    stuck = GaugeMetricFamily("modalkit_stuck_threads", "Calls past the batch timeout that hang.", labels=["model"])
    requests = CounterMetricFamily("modalkit_requests", "Requests by what became of them.", labels=["model", "outcome"])
    batches = CounterMetricFamily("modalkit_batches", "Batches that ran.", labels=["model"])
    items = CounterMetricFamily("modalkit_batched_requests", "Requests in batches that ran.", labels=["model"])
    busy = CounterMetricFamily("modalkit_busy_seconds", "Seconds that batches ran.", labels=["model"])
    real = CounterMetricFamily("modalkit_real_tokens", "Tokens in batches, without padding.", labels=["model"])
    padded = CounterMetricFamily("modalkit_padded_tokens", "Tokens in batches, padding included.", labels=["model"])
    latency = GaugeMetricFamily(
        "modalkit_latency_seconds",
        "Quantiles over the last 4,096 requests that succeeded.",
        labels=["model", "quantile"],
    )
    for model in models:
        name, done = model.name, model.statistics()
        ready.add_metric([name], model.readiness is Readiness.READY)
        if (choice := model.engine_choice) is not None:
            engines.add_metric([name], {"engine": choice.engine, "dtype": choice.dtype})
        if done is None:
            continue
        for priority, count in done.queued.items():
            queued.add_metric([name, priority], count)
        for outcome in ("succeeded", "failed", "expired", "cancelled", "refused"):
            requests.add_metric([name, outcome], getattr(done, outcome))
        for percent in (50, 90, 99):
            latency.add_metric([name, f"{percent / 100:g}"], getattr(done, f"latency_p{percent}_s"))
        running.add_metric([name], done.running)
        stuck.add_metric([name], done.stuck_threads)
        batches.add_metric([name], done.batches)
        items.add_metric([name], sum(size * count for size, count in done.batch_sizes.items()))
        busy.add_metric([name], done.busy_s)
        real.add_metric([name], done.real_tokens)
        padded.add_metric([name], done.padded_tokens)
    yield from (ready, engines, queued, running, stuck, requests, batches, items, busy, real, padded, latency)


def _of_bodies(admission: Admission) -> Iterator[Metric]:
    yield CounterMetricFamily("modalkit_cut_bodies", "Bodies that their clients cut.", value=admission.cut_bodies)
    yield GaugeMetricFamily(
        "modalkit_held_body_bytes", "Bytes of large bodies that arrive or wait.", value=admission.held_bytes
    )


def _of_jobs(counts: JobCounts) -> Iterator[Metric]:
    jobs = GaugeMetricFamily("modalkit_jobs", "Stored jobs by state.", labels=["status"])
    for status, count in counts.statuses.items():
        jobs.add_metric([status], count)
    deliveries = GaugeMetricFamily("modalkit_deliveries", "Stored jobs by their delivery.", labels=["delivery"])
    for delivery, count in counts.deliveries.items():
        deliveries.add_metric([delivery], count)
    yield from (jobs, deliveries)
