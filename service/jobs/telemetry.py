"""What metrics and traces are told of jobs: their ends, and the attempts to deliver their results."""

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from modalkit.batching.errors import users_error
from modalkit.service.jobs.messages import result_message, utc_timestamp
from modalkit.service.jobs.model import DeliveryRecord, DeliveryStatus, Job, JobStatus
from modalkit.service.metrics import delivery_attempts, delivery_seconds, job_age_seconds
from modalkit.service.queue_backends import QueueMessage
from modalkit.service.tracing import active_tracing

if TYPE_CHECKING:
    from opentelemetry.trace import Span

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")


def record_end(job: Job, status: JobStatus, now: float) -> None:
    """Record that a job ended, at the wall-clock time `now`."""
    job_age_seconds(job.model_name, status).observe(max(0.0, now - job.created_at))
    if (tracing := active_tracing()) is not None:
        attributes = {"modalkit.model": job.model_name, "modalkit.job_id": job.job_id, "modalkit.job.status": status}
        _call(tracing.record_job, job.traceparent, attributes, job.created_at, now)


class Sending:
    """One attempt to deliver the messages of some ended jobs: makes their `messages`, records what became of them."""

    def __init__(self, jobs: Sequence[Job], now: float) -> None:
        self._jobs = jobs
        self._tracing = active_tracing()
        self._spans: list[Span | None] = list(map(self._start_span, jobs))
        timestamp = utc_timestamp(now)
        self.messages = [self._message(job, span, timestamp) for job, span in zip(jobs, self._spans, strict=True)]

    def end(self, records: Sequence[DeliveryRecord], now: float) -> None:
        """Record what became of each message."""
        attempted = [
            record.status
            for job, record in zip(self._jobs, records, strict=True)
            if record.attempts > job.delivery_attempts
        ]
        for status, attempts in Counter(attempted).items():
            delivery_attempts(status).inc(attempts)
        for job, span, record in zip(self._jobs, self._spans, records, strict=True):
            if record.status is not DeliveryStatus.PENDING:
                ended_at = now if job.finished_at is None else job.finished_at
                delivery_seconds(job.model_name, record.status).observe(max(0.0, now - ended_at))
            if self._tracing is not None and span is not None:
                _call(self._tracing.end_delivery, span, record.error)

    def _start_span(self, job: Job) -> "Span | None":
        if self._tracing is None:
            return None
        attributes = {"modalkit.model": job.model_name, "modalkit.job_id": job.job_id}
        return _call(self._tracing.start_delivery, job.traceparent, attributes)

    def _message(self, job: Job, span: "Span | None", timestamp: str) -> QueueMessage:
        traceparent = job.traceparent if self._tracing is None or span is None else self._tracing.traceparent(span)
        body = result_message(job, timestamp, traceparent)
        return QueueMessage(job.delivery_queue or "", body, job.job_id, traceparent, job.finished_at)


def _call(trace: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
    """Call a method of the tracing; if it raises, as a user's span processor may, log that and return None."""
    try:
        return trace(*args, **kwargs)
    except BaseException as error:
        failed = "A span is incomplete: a span processor or sampler of OpenTelemetry raised"
        logger.exception(failed, exc_info=users_error(error))
        return None
