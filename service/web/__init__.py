"""The HTTP frontend: a FastAPI application over any gateway."""

from modalkit.service.web.app import create_app

__all__ = ["create_app"]
