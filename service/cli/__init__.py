"""The command ``modalkit``."""

from modalkit.service.cli.main import app, main

__all__ = ["app", "main"]
