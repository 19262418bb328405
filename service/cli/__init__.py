"""The command line: ``modalkit init | serve | predict | check | config | deploy | tune | jobs | reload``."""

from modalkit.service.cli.main import app, main

__all__ = ["app", "main"]
