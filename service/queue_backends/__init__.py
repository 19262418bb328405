"""Where the results of jobs are sent."""

from modalkit.service.queue_backends.memory import InMemoryBackend, QueueEmptyError
from modalkit.service.queue_backends.protocol import (
    BatchQueueBackend,
    NamedQueueBackend,
    NotSentError,
    QueueBackend,
    QueueBackendError,
    QueueMessage,
    QueueNameError,
    UndeliverableError,
)
from modalkit.service.queue_backends.routing import RoutingBackend
from modalkit.service.queue_backends.sqs import SQSBackend
from modalkit.service.queue_backends.taskiq import TaskIQBackend, make_taskiq_broker
from modalkit.service.queue_backends.webhook import WebhookBackend, WebhookVerificationError, verify_webhook

__all__ = [
    "BatchQueueBackend",
    "InMemoryBackend",
    "NamedQueueBackend",
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
