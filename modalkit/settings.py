"""The configuration."""

from service.settings import Settings

__all__ = ["Settings"]
