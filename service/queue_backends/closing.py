"""Lets go of a queue backend."""

import logging

from modalkit.service.queue_backends.protocol import QueueBackend
from modalkit.service.queue_backends.sending import await_backend

logger = logging.getLogger(__name__)


async def close_backend(backend: QueueBackend | None) -> None:
    """Close a backend that can be closed. Logs what goes wrong: all that was to be done with it is done."""
    aclose = getattr(backend, "aclose", None)
    if aclose is not None:
        try:
            await await_backend(aclose())
        except Exception:
            logger.exception("The queue backend could not be closed")
