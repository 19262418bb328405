"""Where the results of asynchronous requests can be sent."""

from service.queue_backends import InMemoryBackend, QueueBackend

__all__ = ["InMemoryBackend", "QueueBackend"]
