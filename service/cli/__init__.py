"""The command line: ``modalkit serve | predict | check | deploy | tune | jobs``."""

from modalkit.service.cli.main import app, main

__all__ = ["app", "main"]
