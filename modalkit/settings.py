"""The configuration."""

from modalkit.service.settings import Settings

__all__ = ["Settings"]
