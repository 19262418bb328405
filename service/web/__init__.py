"""The HTTP frontend: a FastAPI application over any gateway."""

from modalkit.service.web.app import create_app, lifespan_of

__all__ = ["create_app", "lifespan_of"]
