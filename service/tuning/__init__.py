"""What ``modalkit tune`` is made of: measuring a pipeline, choosing limits, trying them, and writing them to a file."""

from modalkit.service.errors import ServiceError


class TuningError(ServiceError):
    """Raised when a pipeline cannot be measured, no limits meet the objective, or these cannot be written or drawn."""
