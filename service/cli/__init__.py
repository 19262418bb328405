"""The command line: ``modalkit serve | predict | check``."""

from service.cli.main import app, main

__all__ = ["app", "main"]
