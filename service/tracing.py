"""Traces: spans by OpenTelemetry (extra `otel`), once a program calls `enable_tracing`, and W3C's `traceparent`.

Without OpenTelemetry, the `traceparent` of a request still travels with its jobs to their messages.
"""

import logging
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from modalkit.batching import BatchRecord
from modalkit.pipelines.extras import install_command
from modalkit.service.version import VERSION

if TYPE_CHECKING:
    from opentelemetry.trace import Span, TracerProvider

logger = logging.getLogger(__name__)

NS_PER_S = 1_000_000_000
EXPORTER = "OTEL_TRACES_EXPORTER"
EXPORTER_VARIABLES = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")

_VALID = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")

given_traceparent: ContextVar[str | None] = ContextVar("modalkit_traceparent", default=None)
"""The `traceparent` that the current request came with, where nothing is traced."""


class Tracing:
    """Makes spans. A `traceparent` of None as a parent begins a trace."""

    def __init__(self, provider: "TracerProvider | None") -> None:
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._api = trace
        self._propagator = TraceContextTextMapPropagator()
        self._tracer = trace.get_tracer("modalkit", VERSION, provider)

    @contextmanager
    def request(self, method: str, parent: str | None, attributes: Mapping[str, Any]) -> "Iterator[Span]":
        """The current span is one of a request, for as long as the context is open.

        Its parent is the current span, as of an instrumented application that mounts this one, or else `parent`. An
        exception that leaves the context makes it an error, without the text, which may be confidential.
        """
        is_inner = self._api.get_current_span().get_span_context().is_valid
        context = None if is_inner else self._context(parent)
        with self._tracer.start_as_current_span(
            method,
            context,
            self._api.SpanKind.SERVER,
            attributes,
            record_exception=False,
            set_status_on_exception=False,
        ) as span:
            try:
                yield span
            except Exception:
                span.set_status(self._api.StatusCode.ERROR)
                raise

    def end_request(self, span: "Span", method: str, route: str, status: int) -> None:
        """Name the span of a request, before its context is left; `status` is 0 where nothing was answered."""
        span.update_name(f"{method} {route}")
        span.set_attributes({"http.request.method": method, "http.route": route})
        if status:
            span.set_attribute("http.response.status_code", status)
        if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            span.set_status(self._api.StatusCode.ERROR)

    def record_batch(self, model: str, record: BatchRecord) -> None:
        """Record a batch that has just ended, in a trace of its own that is linked to its requests."""
        end_ns = time.time_ns()
        contexts = [self._api.get_current_span(self._context(tag)).get_span_context() for tag in record.tags]
        span = self._tracer.start_span(
            f"batch {model}",
            self._context(None),
            links=[self._api.Link(context) for context in contexts],
            start_time=end_ns - int(record.total_s * NS_PER_S),
            attributes={
                "modalkit.model": model,
                "modalkit.batch.size": record.count,
                "modalkit.batch.failed": record.failed,
                "modalkit.batch.reason": record.reason,
                "modalkit.batch.priority": record.priority,
                "modalkit.batch.padding_share": record.padding_share,
                "modalkit.batch.predicted_seconds": record.predicted_s,
                "modalkit.batch.queue_seconds": record.queue_s,
                "modalkit.batch.preprocess_seconds": record.preprocess_s,
                "modalkit.batch.predict_seconds": record.predict_s,
                "modalkit.batch.postprocess_seconds": record.postprocess_s,
            },
        )
        if record.failed:
            span.set_status(self._api.StatusCode.ERROR, type(record.errors[0]).__name__ if record.errors else None)
        span.end(end_ns)

    def record_job(self, parent: str | None, attributes: Mapping[str, Any], start_s: float, end_s: float) -> None:
        """Record a job from its acceptance to its end, in wall-clock Unix seconds."""
        span = self._tracer.start_span(
            "job", self._context(parent), attributes=attributes, start_time=int(start_s * NS_PER_S)
        )
        span.end(int(end_s * NS_PER_S))

    def start_delivery(self, parent: str | None, attributes: Mapping[str, Any]) -> "Span":
        """Start the span of an attempt to deliver a message."""
        return self._tracer.start_span("deliver", self._context(parent), self._api.SpanKind.PRODUCER, attributes)

    def end_delivery(self, span: "Span", error: str | None) -> None:
        """End the span of an attempt; the `error` itself may hold what is confidential."""
        if error is not None:
            span.set_status(self._api.StatusCode.ERROR)
        span.end()

    def traceparent(self, span: "Span | None" = None) -> str | None:
        """The `traceparent` of a span, by default the current one; None where there is none."""
        carrier: dict[str, str] = {}
        context = None if span is None else self._api.set_span_in_context(span)
        self._propagator.inject(carrier, context)
        return carrier.get("traceparent")

    def _context(self, parent: str | None) -> Any:
        from opentelemetry.context import Context

        return self._propagator.extract({} if parent is None else {"traceparent": parent}, Context())


_tracing: Tracing | None = None


def enable_tracing(provider: "TracerProvider | None" = None) -> None:
    """Make spans from now on, by a tracer provider or by OpenTelemetry's global one.

    Raises `ModuleNotFoundError` without the extra `otel`.
    """
    global _tracing  # noqa: PLW0603  # as the tracer provider is: one for the process
    _tracing = Tracing(provider)


def active_tracing() -> Tracing | None:
    """What makes spans, if it is enabled."""
    return _tracing


def enable_tracing_from_environment() -> None:
    """Export spans by OTLP over HTTP where OpenTelemetry's variables name a collector, as of an application.

    A tracer provider that the program has set is kept.
    """
    is_off = os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true" or os.environ.get(EXPORTER) == "none"
    if is_off or not any(map(os.environ.get, EXPORTER_VARIABLES)):
        return
    try:
        from opentelemetry import trace
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ModuleNotFoundError as error:
        logger.warning("Nothing is traced, because %s is not installed: %s", error.name, install_command("otel"))
        return
    if isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):
        resource = Resource.create({"service.name": "modalkit", "service.version": VERSION})
        provider = TracerProvider(resource=resource.merge(OTELResourceDetector().detect()))  # the user's go first
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        trace.set_tracer_provider(provider)  # its spans are sent when the process ends, too
    enable_tracing()


def checked_traceparent(value: str) -> str | None:
    """A `traceparent` as a caller gave it, or None where it is none (W3C Trace Context)."""
    return value if _VALID.fullmatch(value) else None


def current_traceparent() -> str | None:
    """That of the current span, or else of the current request."""
    return given_traceparent.get() if _tracing is None else _tracing.traceparent() or given_traceparent.get()
