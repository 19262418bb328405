"""Metrics for Prometheus: those counted in the process, and what is read of models and jobs at each scrape."""

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from prometheus_client import PlatformCollector, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from modalkit.service.errors import Readiness
from modalkit.service.gateway import Gateway, Model
from modalkit.service.jobs import JobCounts, JobStoreError
from modalkit.service.metrics import REGISTRY
from modalkit.service.web.admission import Admission

logger = logging.getLogger(__name__)

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


async def exposition(gateway: Gateway, admission: Admission) -> str:
    """The metrics of all processes of a service, in Prometheus's text format.

    Where there are several, those of each have its id as the label `process`.
    """
    own = await own_exposition(gateway, admission)
    texts = await gateway.metrics_of_processes(own)
    return own if list(texts) == [""] else _merged(texts)


async def own_exposition(gateway: Gateway, admission: Admission | None = None) -> str:
    """The metrics of this process, in Prometheus's text format; with an `admission`, those of its bodies too."""
    metrics = list(of_this_process(gateway.models.values()))
    if admission is not None:
        metrics += _of_bodies(admission)
    if (administration := gateway.jobs.administration) is not None:
        is_up = GaugeMetricFamily("modalkit_job_store_up", "0 where the job store cannot be read.")
        try:
            metrics += _of_jobs(await administration.counts(), administration.clock())
            is_up.add_metric([], 1)
        except JobStoreError:
            is_up.add_metric([], 0)
            logger.exception("The jobs could not be counted")
        metrics.append(is_up)
    return text_of(metrics)


def of_this_process(models: Iterable[Model]) -> Iterator[Metric]:
    """What is known without jobs."""
    yield from _counted()
    yield from _of_models(models)
    yield from ProcessCollector(registry=None).collect()
    yield from PlatformCollector(registry=None).collect()


def text_of(metrics: Iterable[Metric]) -> str:
    """Metrics in Prometheus's text format."""
    return generate_latest(_Snapshot(metrics)).decode()


def _merged(texts: Mapping[str, str]) -> str:
    families: dict[str, Metric] = {}
    for process_id, text in texts.items():
        for metric in text_string_to_metric_families(text):
            family = families.setdefault(metric.name, Metric(metric.name, metric.documentation, metric.type))
            family.samples += [
                sample._replace(labels={**sample.labels, "process": process_id}) for sample in metric.samples
            ]
    return text_of(families.values())


@dataclass
class _Snapshot(Collector):
    metrics: Iterable[Metric]

    def collect(self) -> Iterable[Metric]:
        return self.metrics


def _counted() -> Iterator[Metric]:
    for metric in REGISTRY.collect():
        # In this format, the times at which counters began would be further metrics of no use.
        metric.samples = [sample for sample in metric.samples if not sample.name.endswith("_created")]
        yield metric


def _of_models(models: Iterable[Model]) -> Iterator[Metric]:
    ready = GaugeMetricFamily("modalkit_model_ready", "1 where a model takes requests.", labels=["model"])
    engines = InfoMetricFamily("modalkit_engine", "What computes a model, and how.", labels=["model"])
    queued = GaugeMetricFamily("modalkit_queued_requests", "Requests that wait.", labels=["model", "priority"])
    queued_s = GaugeMetricFamily(
        "modalkit_queue_seconds", "Seconds that one worker is predicted to need for all that wait.", labels=["model"]
    )
    oldest = GaugeMetricFamily(
        "modalkit_queue_oldest_seconds",
        "Seconds that the oldest waiting request has waited.",
        labels=["model", "priority"],
    )
    running = GaugeMetricFamily("modalkit_running_requests", "Requests in batches that run.", labels=["model"])
    stuck = GaugeMetricFamily("modalkit_stuck_threads", "Calls past the batch timeout that hang.", labels=["model"])
    requests = CounterMetricFamily("modalkit_requests", "Requests by what became of them.", labels=["model", "outcome"])
    busy = CounterMetricFamily("modalkit_busy_seconds", "Seconds that batches ran.", labels=["model"])
    open_s = CounterMetricFamily(
        "modalkit_open_seconds", "Seconds since the model took requests, for each batch that may run.", labels=["model"]
    )
    real = CounterMetricFamily("modalkit_real_tokens", "Tokens in batches, without padding.", labels=["model"])
    padded = CounterMetricFamily("modalkit_padded_tokens", "Tokens in batches, padding included.", labels=["model"])
    for model in models:
        name, done = model.name, model.statistics()
        ready.add_metric([name], model.readiness is Readiness.READY)
        if (choice := model.engine_choice) is not None:
            engines.add_metric([name], {"engine": choice.engine, "dtype": choice.dtype})
        if done is None:
            continue
        for priority, count in done.queued.items():
            queued.add_metric([name, priority], count)
            oldest.add_metric([name, priority], done.oldest_s[priority])
        for outcome in ("succeeded", "failed", "expired", "cancelled", "refused"):
            requests.add_metric([name, outcome], getattr(done, outcome))
        queued_s.add_metric([name], done.queued_s)
        running.add_metric([name], done.running)
        stuck.add_metric([name], done.stuck_threads)
        busy.add_metric([name], done.busy_s)
        open_s.add_metric([name], done.open_s)
        real.add_metric([name], done.real_tokens)
        padded.add_metric([name], done.padded_tokens)
    yield from (ready, engines, queued, queued_s, oldest, running, stuck, requests, busy, open_s, real, padded)


def _of_bodies(admission: Admission) -> Iterator[Metric]:
    yield CounterMetricFamily("modalkit_cut_bodies", "Bodies that their clients cut.", value=admission.cut_bodies)
    yield GaugeMetricFamily(
        "modalkit_held_body_bytes",
        "Bytes of large bodies that wait, and of large answers that are sent.",
        value=admission.held_bytes,
    )


def _of_jobs(counts: JobCounts, now: float) -> Iterator[Metric]:
    jobs = GaugeMetricFamily("modalkit_jobs", "Stored jobs by state.", labels=["status"])
    for status, count in counts.statuses.items():
        jobs.add_metric([status], count)
    deliveries = GaugeMetricFamily("modalkit_deliveries", "Stored jobs by their delivery.", labels=["delivery"])
    for delivery, count in counts.deliveries.items():
        deliveries.add_metric([delivery], count)
    oldest = GaugeMetricFamily(
        "modalkit_oldest_queued_job_seconds", "Seconds since the oldest queued job was accepted.", labels=["model"]
    )
    for model, created_at in counts.oldest_queued_at.items():
        oldest.add_metric([model], max(0.0, now - created_at))
    yield from (jobs, deliveries, oldest)
