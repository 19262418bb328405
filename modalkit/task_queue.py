"""Where the results of asynchronous requests can be sent."""

from modalkit.service.queue_backends import (
    InMemoryBackend,
    NotSentError,
    QueueBackend,
    QueueBackendError,
    QueueEmptyError,
    QueueMessage,
    QueueNameError,
    RoutingBackend,
    SQSBackend,
    TaskIQBackend,
    UndeliverableError,
    WebhookBackend,
    WebhookVerificationError,
    make_taskiq_broker,
    verify_webhook,
)

__all__ = [
    "InMemoryBackend",
    "NotSentError",
    "QueueBackend",
    "QueueBackendError",
    "QueueEmptyError",
    "QueueMessage",
    "QueueNameError",
    "RoutingBackend",
    "SQSBackend",
    "TaskIQBackend",
    "UndeliverableError",
    "WebhookBackend",
    "WebhookVerificationError",
    "make_taskiq_broker",
    "verify_webhook",
]
