"""What can go wrong while a pipeline is tuned."""

from modalkit.service.errors import ServiceError


class TuningError(ServiceError):
    """Raised when a pipeline cannot be measured, no limits meet the objective, or these cannot be written or drawn."""
